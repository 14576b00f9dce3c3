"""Write requirements.lock (exact versions) and environment.yaml (conda) from pyproject.toml.

Run by `make lock`. The lock is resolved by uv for every platform and for Python 3.10 and newer,
so one file with environment markers serves them all; it is used as a pip constraints file.
environment.yaml repeats the lock's versions of the direct dependencies for one Python.
"""

import subprocess
import sys
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
OLDEST_PYTHON = "3.10"
CONDA_PYTHON = "3.11"

LOCK_HEADER = f"""\
# The exact versions that the tests ran with, for Python {OLDEST_PYTHON} and newer.
# Made by `make lock` (uv pip compile --universal) from pyproject.toml; not edited by hand.
# A constraints file: pip install -c requirements.lock -e ".[demo,app,diffusers,dev]"
"""
ENVIRONMENT = """\
# Made by `make lock` from pyproject.toml and requirements.lock; not edited by hand.
# conda env create -f environment.yaml && conda activate tokenbridge
name: tokenbridge
channels:
  - conda-forge
  - nodefaults
dependencies:
  - python={python}
  - pip
  - pip:
      - --constraint requirements.lock
{pins}
      - --editable .
"""


def direct_dependencies() -> list[str]:
    """Canonical names of what pyproject.toml asks for, extras included, in its order."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    return [canonicalize_name(Requirement(text).name) for group in groups for text in group]


def locked_versions(lock: str, python: str) -> dict[str, str]:
    """{canonical name: version} of the lock's lines that hold for `python` ("3.11") here."""
    versions = {}
    for line in lock.splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        requirement = Requirement(line)
        where = {"python_version": python, "python_full_version": f"{python}.0"}
        if requirement.marker is None or requirement.marker.evaluate(where):
            (pin,) = requirement.specifier
            versions[canonicalize_name(requirement.name)] = pin.version
    return versions


def render_environment(lock: str) -> str:
    """The text of environment.yaml for a lock's text."""
    versions = locked_versions(lock, CONDA_PYTHON)
    pins = "\n".join(f"      - {name}=={versions[name]}" for name in direct_dependencies())
    return ENVIRONMENT.format(python=CONDA_PYTHON, pins=pins)


def resolve(arguments: list[str]) -> str:
    """The lock's text. Versions already locked are kept unless `--upgrade` is given."""
    options = ["--universal", "--python-version", OLDEST_PYTHON, "--all-extras"]
    options += ["--no-annotate", "--no-header", "--quiet", "--output-file", "requirements.lock"]
    command = [sys.executable, "-m", "uv", "pip", "compile", *options, *arguments]
    subprocess.run([*command, "pyproject.toml"], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    pins = [line for line in lock_path().read_text().splitlines() if not line.startswith("#")]
    return LOCK_HEADER + "\n".join(pins) + "\n"


def lock_path() -> Path:
    return ROOT / "requirements.lock"


def main() -> None:
    lock = resolve(sys.argv[1:])
    lock_path().write_text(lock)
    (ROOT / "environment.yaml").write_text(render_environment(lock))


if __name__ == "__main__":
    main()
