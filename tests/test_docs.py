"""The documentation's commands are understood, its blocks run, its links lead somewhere."""

import re
import shlex
import subprocess
from importlib import import_module

import pytest

from tests.blocks import Block, find_blocks, make_world, run_bash, settle
from tests.conftest import ROOT
from tests.hub import in_place_of_the_hub
from tests.runs import contents
from util.download import PLACES, REPOSITORY

# Of the commands that are not run.
SCRIPTS = {"main_tokenbridge.py", "main_cache.py", "reconstruction.py", "benchmarks.run"}
SCRIPTS |= {"util.fid_stats", "util.download", "util.export"}
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = [block for page in PAGES for block in find_blocks(page)]
PYTHON_BLOCKS = [block for page in PAGES for block in find_blocks(page, "python")]
# Pages whose blocks go on from each other, in one folder.
TOURS = ("tokenizers.md", "data.md", "recipe.md")
UNITS = [[b] for b in BLOCKS if b.page.name not in TOURS and not b.reason]
UNITS += [[b for b in BLOCKS if b.page.name == name and not b.reason] for name in TOURS]


def test_commands_that_are_not_run_are_understood():
    found = set()
    for line in "".join(b.text.replace("\\\n", " ") for b in BLOCKS if b.reason).splitlines():
        words = shlex.split(line, comments=True)
        for i, word in enumerate(words):
            if word in SCRIPTS:
                import_module(word.removesuffix(".py")).make_parser().parse(words[i + 1 :])
                found.add(word)
    assert found == SCRIPTS  # a page whose commands were overlooked would pass


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def hub(world, monkeypatch):
    """The hub's stand-in, with the world's weights and a VAE of diffusers."""
    from tests.test_diffusers_vae import network  # skips what needs it where it is not installed

    with in_place_of_the_hub(monkeypatch) as hub:
        weights = world / "pretrained_models"
        hub.repos[REPOSITORY] = {
            PLACES[name]: (weights / PLACES[name]).read_bytes() for name in ("vae", "large", "huge")
        }
        if not (vae := world / "sd-vae-ft-mse").exists():
            network(levels=4).save_pretrained(vae)
        hub.repos["stabilityai/sd-vae-ft-mse"] = contents(vae)
        yield hub


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
def test_what_is_not_run_says_why_and_is_sound(block):
    assert len(block.reason.split()) >= 3, "say why"
    checked = subprocess.run(["bash", "-n"], input=block.text, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr
    targets = re.findall(r"^make (\w+)", block.text, flags=re.MULTILINE)
    assert not [t for t in targets if f"\n{t}:" not in (ROOT / "Makefile").read_text()]


def anchors(text: str) -> set[str]:
    """Names of the headings as GitHub makes them."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_within_the_project_lead_somewhere(page):
    for target, anchor in re.findall(r"\]\(([^)#]*)(?:#([^)]*))?\)", page.read_text()):
        if re.match(r"[a-z]+:", target):
            continue
        place = page.parent / target if target else page
        assert place.exists(), target
        assert not anchor or anchor in anchors(place.read_text()), f"{target}#{anchor}"


def test_every_page_is_linked_from_the_readme_and_there_are_ten_at_most():
    linked = re.findall(r"\]\((docs/[\w]+\.md)", (ROOT / "README.md").read_text())
    pages = {f"docs/{p.name}" for p in PAGES if p.parent != ROOT}
    assert pages == set(linked) and len(pages) <= 10
