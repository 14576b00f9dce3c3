"""Commands in the documentation are understood by the scripts they call."""

import re
import shlex

import pytest

import main_cache
import main_tokenbridge
import reconstruction
from benchmarks import render
from benchmarks import run as benchmark
from demo import app
from tests.conftest import ROOT
from util import doctor, download, export, fid_stats
from util.report import __main__ as report

PARSERS = {
    "main_tokenbridge.py": main_tokenbridge.make_parser,
    "main_cache.py": main_cache.make_parser,
    "reconstruction.py": reconstruction.make_parser,
    "demo/app.py": app.make_parser,
    "util.fid_stats": fid_stats.make_parser,
    "util.doctor": doctor.make_parser,
    "util.report.__main__": report.make_parser,
    "util.download": download.make_parser,
    "util.export": export.make_parser,
    "benchmarks.run": benchmark.make_parser,
    "benchmarks.render": render.make_parser,
    "scripts/train_torchrun.sh": main_tokenbridge.make_parser,
    "scripts/train_slurm.sh": main_tokenbridge.make_parser,
}
OUTSIDE_THE_DEMO = {"util.doctor", "util.report.__main__", "util.download", "benchmarks.run"}
OUTSIDE_THE_DEMO |= {"benchmarks.render", *(n for n in PARSERS if n.startswith("scripts/"))}
OUTSIDE_THE_DEMO |= {"demo/app.py"}
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]


def commands(text: str) -> list[list[str]]:
    """The command lines in blocks marked as bash, continued lines joined, comments left out."""
    blocks = re.findall(r"^```bash\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    lines = (line for block in blocks for line in block.replace("\\\n", " ").splitlines())
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def script_and_flags(words: list[str]) -> tuple[str, list[str]] | None:
    found = next((i for i, word in enumerate(words) if word in PARSERS), None)
    return (words[found], words[found + 1 :]) if found is not None else None


CALLS = [
    pytest.param(*call, id=f"{page.name}-{number}")
    for page in PAGES
    for number, words in enumerate(commands(page.read_text()))
    if (call := script_and_flags(words))
]


@pytest.mark.parametrize(("script", "flags"), CALLS)
def test_command_is_understood(script, flags):
    args = PARSERS[script]().parse(flags)
    assert args.explicit or not any(flag.startswith("--") for flag in flags)


def test_commands_of_the_demo_are_understood():
    """Their flags; what the shell puts in for its variables does not matter but for numbers."""
    text = (ROOT / "demo" / "run.sh").read_text().replace("\\\n", " ")
    text = text.replace('"${bits[@]}"', "-1 4").replace('"$seed"', "0")
    text = re.sub(r'"\$\{\w+\[@\]\}"', "", text)  # what --quick adds
    lines = (line for line in text.splitlines() if line.startswith("stage "))
    words = [shlex.split(line) for line in lines]
    calls = [call for line in words if (call := script_and_flags(line))]
    assert {script for script, _ in calls} == set(PARSERS) - OUTSIDE_THE_DEMO
    for script, flags in calls:
        PARSERS[script]().parse(flags)


def test_commands_are_found():
    """A page whose commands were overlooked would pass."""
    text = "```bash\n# a comment\ntorchrun \\\n  main_cache.py --seed 3 # why\n```\n"
    assert script_and_flags(*commands(text)) == ("main_cache.py", ["--seed", "3"])
    scripts = [call.values[0] for call in CALLS]
    assert len(scripts) >= 5 and set(scripts) == set(PARSERS)


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


def test_every_page_is_linked_from_the_readme():
    linked = re.findall(r"\]\((docs/[\w]+\.md)", (ROOT / "README.md").read_text())
    assert {f"docs/{p.name}" for p in PAGES if p.parent != ROOT} == set(linked)
