"""pyproject.toml, requirements.lock and environment.yaml say the same, and commands run."""

import re
import subprocess
import sys

import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

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


def test_lock_satisfies_every_range_of_pyproject():
    for python in PYTHONS:
        versions = locked_versions(f"{python}.0")
        for requirement in requirements():
            version = versions[canonicalize_name(requirement.name)]
            assert requirement.specifier.contains(version), (python, requirement, version)
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


COMMANDS = PROJECT["scripts"]
ASK_FOR_HELP = """
import sys
from importlib.metadata import entry_points
for name in sys.argv[1:]:
    sys.argv = [name, "--help"]
    try:
        entry_points(group="console_scripts")[name].load()()
    except SystemExit as end:
        assert not end.code, name
print(*sys.modules)
"""
SLOW = {"timm", "torchvision", "scipy", "matplotlib", "diffusers", "torch_fidelity", "torchmetrics"}
SLOW |= {"jinja2", "gradio", "tensorboard", "torch._dynamo"}


def test_installed_commands_help_in_any_folder_and_import_nothing_that_takes_seconds(tmp_path):
    """One process for all, in which what one of them imports would be seen."""
    (tmp_path / "ask.py").write_text(ASK_FOR_HELP)
    how = dict(cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=300)
    result = subprocess.run([sys.executable, "ask.py", *COMMANDS], **how)
    assert result.returncode == 0, result.stderr
    assert re.findall(r"^usage: (\S+)", result.stdout, flags=re.MULTILINE) == list(COMMANDS)
    assert not SLOW & set(result.stdout.splitlines()[-1].split())
