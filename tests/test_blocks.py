"""Every shell block of the documentation runs, in the small world of tests/blocks.py.

What a CPU cannot run says so: <!-- not run: REASON --> stands above it.
"""

import re
import subprocess
from pathlib import Path

import pytest

from tests.blocks import Block, find_blocks, make_world, run_bash, settle
from tests.conftest import ROOT
from tests.hub import in_place_of_the_hub
from util.download import PLACES, REPOSITORY

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES += [page for page in [ROOT / "CONTRIBUTING.md"] if page.exists()]
BLOCKS = [block for page in PAGES for block in find_blocks(page)]
PYTHON_BLOCKS = [block for page in PAGES for block in find_blocks(page, "python")]
# Pages whose blocks go on from each other, in one folder.
TOURS = ("tokenizers.md", "own_dataset.md")
UNITS = [[b] for b in BLOCKS if b.page.name not in TOURS and not b.reason]
UNITS += [[b for b in BLOCKS if b.page.name == name and not b.reason] for name in TOURS]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def hub(world, monkeypatch):
    """The hub's stand-in, with the world's weights and a VAE of diffusers."""
    with in_place_of_the_hub(monkeypatch) as hub:
        weights = world / "pretrained_models"
        hub.repos[REPOSITORY] = {name: (weights / name).read_bytes() for name in PLACES.values()}
        hub.repos["stabilityai/sd-vae-ft-mse"] = diffusers_vae(world / "sd-vae-ft-mse")
        yield hub


def diffusers_vae(folder: Path) -> dict[str, bytes]:
    from tests.test_diffusers_vae import network

    if not folder.exists():
        network(levels=4).save_pretrained(folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit[0].name)
def test_blocks_run(unit: list[Block], world, hub, tmp_path):
    text = "".join(block.text for block in unit)
    result = run_bash(text, tmp_path, settle(world, tmp_path, text))
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("block", PYTHON_BLOCKS, ids=lambda block: block.name)
def test_python_blocks_run(block, world, tmp_path, monkeypatch):
    settle(world, tmp_path, block.text)
    monkeypatch.chdir(tmp_path)
    exec(compile(block.text.replace('"cuda"', '"cpu"'), block.name, "exec"), {})


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.reason], ids=lambda block: block.name)
def test_what_is_not_run_is_sound(block):
    """And its commands are understood: tests/test_docs.py."""
    assert len(block.reason.split()) >= 3, "say why"
    checked = subprocess.run(["bash", "-n"], input=block.text, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr
    targets = re.findall(r"^make (\w+)", block.text, flags=re.MULTILINE)
    assert not [t for t in targets if f"\n{t}:" not in (ROOT / "Makefile").read_text()]


@pytest.fixture
def bare(tmp_path):
    """The project's folder and the variables, without the world."""
    (tmp_path / "nothing").mkdir()
    return tmp_path / "here", settle(tmp_path / "nothing", tmp_path / "here", "")


TIMED = "python -m benchmarks.run --only train"


def test_a_block_ends_where_a_command_fails(bare):
    for failing in (
        "python main_cache.py --nonsense",
        "false | cat",
        "echo ${NOT_SET}",
        "make",
        TIMED,
    ):
        result = run_bash(f"{failing}\necho after", *bare)
        assert result.returncode and "after" not in result.stdout, failing


def test_programs_print_where_the_shell_sends_it(bare):
    text = "python -m util.report --help >page\ntorchrun --nproc_per_node=8 main_cache.py --help"
    result = run_bash(text, *bare)
    assert result.returncode == 0, result.stderr
    assert "usage: main_cache.py" in result.stdout
    assert "usage: report.py" in (bare[0] / "page").read_text()


def test_flags_of_torchrun_are_read_by_torchrun(bare):
    result = run_bash("torchrun --nprocesses=8 main_cache.py --help", *bare)
    assert result.returncode == 2 and "nprocesses" in result.stderr
