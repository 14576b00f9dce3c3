"""--json: the figures as one JSON object on stdout, and all else on stderr."""

import json
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout

from util import dist


@contextmanager
def figures_on_stdout(asked: bool) -> Iterator[dict]:
    """A dict to fill, which is printed by the main process at the end, where asked."""
    figures = {}
    if not asked:
        yield figures
        return
    with redirect_stdout(sys.stderr):
        yield figures
    if dist.is_main():
        print(json.dumps(finite(figures), indent=1), flush=True)


def finite(value):
    """JSON has no NaN and no infinity: null."""
    if isinstance(value, dict):
        return {key: finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
