"""pyproject.toml, requirements.lock, environment.yaml and what is installed say the same."""

import platform
import re
import subprocess
import sys
import sysconfig
from importlib import metadata

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests.conftest import ROOT, environment

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

PYTHONS = ("3.10", "3.11", "3.12", "3.13")
LOCK = (ROOT / "requirements.lock").read_text()
CONDA = yaml.safe_load((ROOT / "environment.yaml").read_text())
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def requirements() -> list[Requirement]:
    groups = [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
    return [Requirement(text) for group in groups for text in group]


def locked_versions(python: str) -> dict[str, str]:
    """{canonical name: version} of the lock's lines that hold for `python` ("3.11.0") here."""
    where = {"python_version": ".".join(python.split(".")[:2]), "python_full_version": python}
    lines = [Requirement(line) for line in LOCK.splitlines() if line and line[0] != "#"]
    pins = [pin for pin in lines if pin.marker is None or pin.marker.evaluate(where)]
    return {canonicalize_name(p.name): next(iter(p.specifier)).version for p in pins}


@pytest.mark.parametrize("python", PYTHONS)
def test_lock_satisfies_every_range_of_pyproject(python):
    versions = locked_versions(f"{python}.0")
    for requirement in requirements():
        version = versions[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), (requirement, version)
    # torchvision 0.29 accepts any later torch, so only our own bounds keep the pair together
    pair = {r.name: r.specifier for r in requirements() if r.name in ("torch", "torchvision")}
    assert not pair["torch"].contains("2.15.0") and not pair["torchvision"].contains("0.30.0")


def test_environment_yaml_installs_all_as_locked_without_an_index_or_machine_path():
    python = CONDA["dependencies"][0].removeprefix("python=")
    extras = ",".join(PROJECT["optional-dependencies"])
    assert CONDA["name"] == "tokenbridge" and python in PYTHONS
    installed = ["--constraint requirements.lock", f"--editable .[{extras}]"]
    assert CONDA["dependencies"][-1]["pip"] == installed
    assert not re.search(r"://|--index|--find-links|--extra|/root|/home|/tmp", LOCK)


def test_installed_is_all_that_is_asked_for_in_the_locked_versions():
    # Of this environment: setuptools, once imported, adds its own old copies to sys.path.
    folders = sorted({sysconfig.get_path(name) for name in ("purelib", "platlib")})
    distributions = metadata.distributions(path=folders)
    installed = {canonicalize_name(d.metadata["Name"]): Version(d.version) for d in distributions}
    locked = locked_versions(platform.python_version())
    common = [name for name in locked if name in installed]
    different = [name for name in common if installed[name].public != locked[name]]
    assert not different, [(name, installed[name], locked[name]) for name in different]
    assert {canonicalize_name(requirement.name) for requirement in requirements()} <= set(installed)


COMMANDS = PROJECT["scripts"]
ASK_FOR_HELP = """
import runpy, sys
from importlib.metadata import entry_points
for name in sys.argv[1:]:
    sys.argv = [name, "--help"]
    try:
        if "." in name:
            runpy.run_module(name, run_name="__main__", alter_sys=True)
        else:
            entry_points(group="console_scripts")[name].load()()
    except SystemExit as end:
        assert not end.code, name
"""


def test_commands_and_modules_of_the_documentation_run_in_any_folder(tmp_path):
    """As installed. In one process, which takes the seconds of the imports once."""
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    modules = {m for page in pages for m in re.findall(r"-m (util\.\w+)", page.read_text())}
    (tmp_path / "ask.py").write_text(ASK_FOR_HELP)
    asked = [sys.executable, "ask.py", *modules, *COMMANDS]
    how = dict(cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=300)
    result = subprocess.run(asked, **how)
    assert result.returncode == 0, result.stderr
    programs = {f"{module.partition('.')[2]}.py" for module in modules} | set(COMMANDS)
    assert set(re.findall(r"^usage: (\S+)", result.stdout, flags=re.MULTILINE)) == programs
