"""Do harm to training, saving and caching, many times; print what became of it.

python -m tests.faults.soak             the long form, `make soak`
python -m tests.faults.soak --short     once each, as the tests do
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import astuple
from functools import partial
from pathlib import Path

from tests.faults import caching, training
from tests.faults.harness import Row
from tests.runs import make_inputs

HEAD = ("fault", "injected", "survived", "steps lost", "result")
LINE = "{:43}  {:>8}  {:>8}  {:>10}  {}"


def scenarios(inputs: Path, folder: Path, kills: int, seed: int) -> list[Callable[[], Row]]:
    """kills: of a training; the rest follows from it."""
    few, half = max(1, kills // 8), max(1, kills // 2)
    return [
        partial(training.kill_training, inputs, folder, kills, seed),
        partial(training.kill_saving, inputs, folder, half, seed),
        partial(caching.kill_caching, inputs, folder, half, seed),
        partial(training.terminate, inputs, folder, max(3, kills // 4), seed),
        partial(training.full_disk, inputs, folder),
        partial(training.damaged_newest, inputs, folder, few, seed),
        partial(training.kill_worker, inputs, folder, few, seed),
        partial(training.kill_node, inputs, folder),
        partial(training.hang, inputs, folder),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=26, help="of a training")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--short", action="store_true", help="once each")
    args = parser.parse_args()
    rows, began = [], time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        inputs = make_inputs(Path(name) / "inputs")
        for scenario in scenarios(inputs, Path(name), 1 if args.short else args.kills, args.seed):
            rows.append(scenario())
            print(f"{rows[-1].fault}: {rows[-1].result}", flush=True)
    columns = list(zip(*map(astuple, rows), strict=True))[1:4]
    total = ("all", *map(sum, columns), "")
    print("", *(LINE.format(*row) for row in (HEAD, *map(astuple, rows), total)), "", sep="\n")
    print(f"seed {args.seed}, {time.monotonic() - began:.0f} s")
    return 0 if all(row.survived == row.injected > 0 for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
