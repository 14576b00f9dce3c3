"""How fast everything is, as one table.

python -m benchmarks.run [--model tokenbridge_base --batch_size 2 --precision fp32 bf16]
python -m benchmarks.run --only train head --repeats 5 [--json FILE]

Beside every run the rate of a matrix product is measured.
"""

import json
import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median

import torch

from benchmarks.works import WORKS, Settings, Work
from models.config import PRESETS, TokenBridgeConfig, preset
from models.flops import peak_memory, readable
from util import dist
from util.args import Parser, positive_int
from util.device import resolve_device
from util.errors import as_user_error
from util.files import check_writable
from util.logging import environment

RESULTS = Path(__file__).resolve().parent / "results"
SIZES = {"cuda": ("tokenbridge_large", 64), "cpu": ("tokenbridge_base", 2)}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MATRIX = {"cpu": 2048, "mps": 2048, "cuda": 8192}  # side; a GPU is not filled by less
SHORTEST = 0.2  # seconds: what is over sooner is called several times
HEAD = ("work", "precision", "seconds, median (range)", "a second", "of products", "memory")


def make_parser() -> Parser:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--device", default="cuda", help="cuda, mps or cpu; what is there if absent")
    add("--model", choices=PRESETS, help="[tokenbridge_base; on CUDA tokenbridge_large]")
    add("--batch_size", type=positive_int, help="[2; on CUDA 64]")
    add("--img_size", type=positive_int, default=256, help="pixels")
    add("--num_iter", type=positive_int, default=8, help="of the sampling")
    add("--precision", nargs="+", choices=tuple(DTYPES), default=["bf16"], help="arithmetic")
    add("--only", nargs="+", choices=tuple(WORKS), help="these works [all]")
    add("--repeats", type=positive_int, default=3, help="timed runs of each")
    add("--compile", action="store_true", help="compile the blocks")
    add("--json", type=Path, help="file to write [benchmarks/results/DEVICE.json; --only: none]")
    return parser


class Machine:
    """What is timed on it, and the products that are timed beside."""

    def __init__(self, device: torch.device, side: int | None = None):
        self.device, side = device, side or MATRIX[device.type]
        self.operands = {
            name: [torch.randn(side, side, device=device, dtype=dtype) for _ in range(3)]
            for name, dtype in DTYPES.items()
        }

    def synchronize(self) -> None:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)

    def seconds(self, call: Callable[[], object], times: int) -> float:
        """Of each of so many calls, until the device is done with them."""
        self.synchronize()
        started = time.perf_counter()
        for _ in range(times):
            call()
        self.synchronize()
        return (time.perf_counter() - started) / times

    def product_rate(self, precision: str) -> float:
        """FLOP/s of a product of two square matrices, 2 n^3 operations; the median of three."""
        a, b, out = self.operands[precision]
        times = 20 if self.device.type == "cuda" else 1  # a single one is soon over
        taken = (self.seconds(lambda: torch.mm(a, b, out=out), times) for _ in range(3))
        return 2 * len(a) ** 3 / median(taken)


def measure(work: Work, machine: Machine, precisions: Sequence[str], repeats: int) -> list[dict]:
    """A row for each precision, run in turn, so that what else a shared machine does meets all."""
    rows = []
    for precision in work.precisions or precisions:
        row = dict(title=work.title, precision=precision)
        row |= dict(items=work.items, unit=work.unit, operations=work.operations)
        rows.append(row | dict(seconds=[], product_rates=[], memory=None, times=1))
        time_once(work, rows[-1], machine)  # what comes first takes longer
        rows[-1]["times"] = math.ceil(SHORTEST / rows[-1]["seconds"].pop()) or 1
        rows[-1]["product_rates"].pop()
    for _ in range(repeats):
        for row in rows:
            time_once(work, row, machine)
    return rows


def time_once(work: Work, row: dict, machine: Machine) -> None:
    """Product rates are the mean of one before and one after; memory is known on CUDA alone."""
    on_cuda = machine.device.type == "cuda"
    before = machine.product_rate(row["precision"])
    if on_cuda:
        torch.cuda.reset_peak_memory_stats()
    row["seconds"].append(machine.seconds(partial(work.run, row["precision"]), row["times"]))
    row["memory"] = peak_memory(machine.device) if on_cuda else None
    row["product_rates"].append((before + machine.product_rate(row["precision"])) / 2)


def cells(row: dict) -> list[str]:
    """A line of the table: see HEAD."""
    seconds, share = median(row["seconds"]), ""
    if row["operations"] is not None:
        pairs = zip(row["seconds"], row["product_rates"], strict=True)
        share = f"{median(row['operations'] / s / rate for s, rate in pairs):.0%}"
    return [
        *(row["title"], row["precision"]),
        f"{seconds:.3g} ({min(row['seconds']):.3g} to {max(row['seconds']):.3g})",
        f"{readable(row['items'] / seconds, '').strip()} {row['unit']}",
        *(share, "" if row["memory"] is None else readable(row["memory"], "B")),
    ]


def line(row: Sequence[str]) -> str:
    return f"| {' | '.join(row)} |"


def main() -> None:
    args = make_parser().parse()
    device, precisions = resolve_device(args.device), tuple(dict.fromkeys(args.precision))
    model, batch_size = SIZES.get(device.type, SIZES["cpu"])
    model, batch_size = args.model or model, args.batch_size or batch_size
    with as_user_error():
        config = TokenBridgeConfig(**preset(model), img_size=args.img_size)
    settings = Settings(config, batch_size, args.num_iter, device, args.compile)
    path = args.json or (None if args.only else RESULTS / f"{device.type}.json")
    if path is not None:
        check_writable(path.parent, "--json")
        path.parent.mkdir(parents=True, exist_ok=True)
    about = environment(device, " ".join(precisions), 1) | {"model": model}
    print(*(f"{key}: {value}" for key, value in about.items()), "", sep="\n")
    print(line(HEAD), line(["---"] * len(HEAD)), sep="\n", flush=True)
    machine, rows = Machine(device), []
    for name in args.only or WORKS:
        measured = measure(WORKS[name](settings), machine, precisions, args.repeats)
        print(*(line(cells(row)) for row in measured), sep="\n", flush=True)
        rows += [{"work": name} | row for row in measured]
    if path is not None:
        path.write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")
        print(f"\nwritten: {path}")


if __name__ == "__main__":
    dist.run(main)
