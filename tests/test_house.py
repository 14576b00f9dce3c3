"""The house in figures: lines, doors, imports and parameters stay within the budget.

Counted from the syntax trees of tracked files. The bars of lines stand where the code is: they fall
with it, and rise only for a new ability, in a commit that says for which and why.
"""

import ast
import subprocess
from pathlib import Path

import pytest

from tests.conftest import ROOT

PRODUCT_LINES, TEST_LINES = 15_192, 11_000
CORE_LINES, CORE_FILES, UTIL_ENTRIES = 7_371, 38, 22
WIDE_FUNCTIONS = 1  # sample_latents: the interface for researchers, who shall see each argument
SCRIPTS = ("main_tokenbridge.py", "main_cache.py", "reconstruction.py", "engine_tokenbridge.py")
ROOTS = ("engine_tokenbridge.py", "main_tokenbridge.py")
# Other evenings: evaluation, report, tokenizers and the other heads.
APART = ("util/evaluation/", "util/report/", "models/tokenizers/")
TEXTS = (".html", ".js", ".css", ".sh", ".jinja", ".jinja2", ".j2")

pytestmark = pytest.mark.skipif(not (ROOT / ".git").exists(), reason="counts tracked files")


def tracked() -> list[str]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    return [name for name in listed.stdout.split() if (ROOT / name).exists()]


FILES = tracked() if (ROOT / ".git").exists() else []
PYTHON = [name for name in FILES if name.endswith(".py")]
PRODUCT = [name for name in PYTHON if not name.startswith(("tests/", "docs/"))]
MODULES = {name[:-3].replace("/", ".").removesuffix(".__init__"): name for name in PYTHON}


def lines(name: str) -> int:
    return (ROOT / name).read_text().count("\n")


def tree(name: str) -> ast.Module:
    return ast.parse((ROOT / name).read_text())


def imports(name: str) -> set[str]:
    """The project's files that a file imports, anywhere in it."""
    modules = []
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return {MODULES[module] for module in modules if module in MODULES} - {name}


GRAPH = {name: imports(name) for name in PRODUCT}


def closure(*roots: str) -> set[str]:
    reached, waiting = set(), list(roots)
    while waiting:
        name = waiting.pop()
        if name not in reached:
            reached.add(name)
            waiting += GRAPH.get(name, ())
    return reached


def is_core(name: str) -> bool:
    head = name.startswith("models/heads/") and Path(name).name not in ("channel.py", "__init__.py")
    return not (name.startswith(APART) or head)


def test_product_and_tests_are_within_their_lines():
    texts = [n for n in FILES if n.endswith(TEXTS) and not n.startswith(("tests/", "docs/"))]
    assert sum(map(lines, [*PRODUCT, *texts])) <= PRODUCT_LINES
    assert sum(lines(name) for name in PYTHON if name.startswith("tests/")) <= TEST_LINES


def test_a_training_is_read_in_an_evening():
    core = [name for name in closure(*ROOTS) if is_core(name)]
    assert sum(map(lines, core)) <= CORE_LINES
    assert len(core) <= CORE_FILES
    doors = {name.split("/")[1] for name in FILES if name.startswith("util/")}
    assert len(doors) <= UTIL_ENTRIES, sorted(doors)


def test_imports_lead_one_way():
    circles = [name for name in PRODUCT if any(name in closure(other) for other in GRAPH[name])]
    upward = [n for n in PRODUCT if n.startswith("util/") for other in GRAPH[n] if other in SCRIPTS]
    models = [n for n in PRODUCT if n.startswith("models/")]
    outward = [n for n in models for other in GRAPH[n] if other.startswith("util/")]
    tests = [n for n in PRODUCT if any(other.startswith("tests/") for other in GRAPH[n])]
    assert (circles, upward, outward, tests) == ([], [], [], [])


def test_few_functions_take_more_than_six_parameters():
    wide = []
    for name in PRODUCT:
        for node in ast.walk(tree(name)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                count = len([a for a in given if a.arg not in ("self", "cls", "ctx")])
                wide += [f"{name}:{node.name}"] if count > 6 else []
    assert len(wide) <= WIDE_FUNCTIONS, wide
