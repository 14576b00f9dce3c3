"""Do harm to training, saving and caching, many times; print what became of it.

python -m tests.faults.soak              the long form, `make soak`
python -m tests.faults.soak --kills 2    little more than once each, as the tests do
"""

import argparse
import sys
import tempfile
import time
from dataclasses import astuple
from functools import partial
from pathlib import Path

from tests.faults import caching, training
from tests.runs import make_inputs

HEAD = ("fault", "injected", "survived", "steps lost", "result")
LINE = "{:43}  {:>8}  {:>8}  {:>10}  {}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=26, help="of a training")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args = parser.parse_args()
    kills = max(1, args.kills // 2)
    scenarios = training.scenarios(args.kills, args.seed)
    scenarios += [partial(caching.kill_caching, kills=kills, seed=args.seed)]
    rows, began = [], time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        inputs = make_inputs(Path(name) / "inputs")
        for scenario in scenarios:
            rows.append(scenario(inputs, Path(name)))
            print(f"{rows[-1].fault}: {rows[-1].result}", flush=True)
    columns = list(zip(*map(astuple, rows), strict=True))[1:4]
    total = ("all", *map(sum, columns), "")
    print("", *(LINE.format(*row) for row in (HEAD, *map(astuple, rows), total)), "", sep="\n")
    print(f"seed {args.seed}, {time.monotonic() - began:.0f} s")
    return 0 if all(row.survived == row.injected > 0 for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
