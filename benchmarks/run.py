"""Everything about a device: whether it computes right, how fast it is, and what bounds it.

python -m benchmarks.run [--minutes 25] [--only correctness "training step"] [--json FILE]
python -m benchmarks.run --models tokenbridge_base --batch_sizes 2 --precision fp32 bf16 --repeats 5

Every row is written as it is measured, the most important first. Started again, it goes on where it
was killed, or where its minutes were over; rows of other flags, another commit, device or torch are
measured anew. It needs no network, no data, and of the dependencies no more than training does
without TensorBoard. On a CPU, what is compiled is left out unless --only names it.
"""

import argparse
import gc
import hashlib
import json
import math
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.correctness import CHECKS
from benchmarks.works import WORKS, Settings, Work
from models.config import PRESETS, TokenBridgeConfig, preset
from models.flops import peak_memory, readable
from util import ROOT, dist, stop
from util.args import Parser, positive_float, positive_int
from util.device import environment, resolve_device, resolve_precision
from util.errors import UserError, as_user_error
from util.files import atomic_write, check_writable

RESULTS = Path(__file__).resolve().parent / "results"
# On CUDA, and elsewhere; the first of each is what most rows are measured with.
SIZES = {
    "models": (["tokenbridge_large", "tokenbridge_huge"], ["tokenbridge_base"]),
    "batch_sizes": ([64, 16, 32, 128], [2]),
    "sampling_batches": ([64, 1, 256], [2]),
    "num_iter": ([64, 16, 256], [8]),
    "precision": (["bf16"], ["fp32"]),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MATRIX = {"cpu": 2048, "mps": 2048, "cuda": 8192}  # side; a GPU is not filled by less
SHORTEST = 0.2  # seconds: what is over sooner is called several times
ALSO = ("img_size", "repeats")  # decide what is measured, too
OUT_OF_MEMORY = "OutOfMemory"  # a finding; another failure is tried again
KERNELS, PROFILED = 10, 3  # shown, and runs that they are taken from
SPEED = ("", "work", "precision", "seconds, median (range)", "a second", "of products", "memory")
HEADS = {
    "correctness": ("check", "figure", "at most", "holds"),
    "profile": ("work", "nothing runs", "costliest kernels: share of the time, calls"),
}


def make_parser() -> Parser:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--device", default="cuda", help="cuda, mps or cpu; what is there if absent")
    add("--minutes", type=positive_float, default=25.0, help="after which no further row begins")
    add("--only", nargs="+", help="these groups, or rows whose name holds this [all]")
    add("--models", nargs="+", choices=PRESETS, help="[tokenbridge_base; on CUDA large, huge]")
    for name, of in (("batch_sizes", "steps"), ("sampling_batches", "sampling")):
        add(f"--{name}", nargs="+", type=positive_int, help=f"of {of} [2; on CUDA several]")
    add("--num_iter", nargs="+", type=positive_int, help="of sampling [8; on CUDA 64, 16, 256]")
    add("--img_size", type=positive_int, default=256, help="pixels")
    add("--precision", nargs="+", choices=tuple(DTYPES), help="[fp32; on CUDA bf16]")
    add("--repeats", type=positive_int, default=3, help="timed runs of each")
    add("--json", type=Path, help="file to write [benchmarks/results/NAME_OF_THE_DEVICE.json]")
    return parser


class Machine:
    """What is timed on it, and the products that are timed beside."""

    def __init__(self, device: torch.device):
        self.device, side = device, MATRIX[device.type]
        self.operands = {
            name: [torch.randn(side, side, device=device, dtype=dtype) for _ in range(3)]
            for name, dtype in DTYPES.items()
        }
        self.held = sum(t.nbytes for same in self.operands.values() for t in same)

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


# --- the rows


def rows(args: argparse.Namespace, machine: Machine) -> Iterator[tuple[str, str, Callable]]:
    """Group, name and what measures it, returning what is to be known, of every row."""
    device, on_cuda = machine.device, machine.device.type == "cuda"
    for name, (figure, bound, cuda_alone) in CHECKS.items():
        if on_cuda or not cuda_alone:
            yield "correctness", name, partial(checked, figure, bound, device)
    configs = {n: TokenBridgeConfig(**preset(n), img_size=args.img_size) for n in args.models}
    first, *_ = args.models
    usual = Settings(configs[first], args.batch_sizes[0], args.num_iter[0], device)

    def work(kind: str, **changes) -> Callable[[], list[dict]]:
        settings = replace(usual, **changes)
        return lambda: measure(WORKS[kind](settings), machine, args.precision, args.repeats)

    def steps(model: str, batch: int) -> Iterator[tuple[str, str, Callable]]:
        ways = {
            "plain": {},
            "compile": dict(compile=True),
            "grad_checkpointing": dict(grad_checkpointing=True),
            "head_share 0.25": dict(config=replace(configs[model], head_share=0.25)),
        }
        for way, how in ways.items():
            changes = dict(config=configs[model], batch_size=batch) | how
            yield "training step", f"{model}, batch {batch}, {way}", work("train", **changes)

    yield from steps(first, usual.batch_size)
    for part in ("head", "backbone", "optimizer"):
        name = f"{first}, batch {usual.batch_size}, {part} replaced by nothing"
        yield "training step", name, work("train", without=part)
    for kind in ("train", "sample"):
        shorter = replace(usual, num_iter=min(args.num_iter))
        yield "profile", kind, partial(profiled, kind, shorter, machine, args.precision[0])
    drawn = {
        "plain": {},
        "cfg 1": dict(sampling=dict(cfg=1.0)),
        "cfg_interval 0.2 0.6": dict(sampling=dict(cfg_interval=(0.2, 0.6))),
        "token_cache 4": dict(sampling=dict(token_cache=4)),
        "compile": dict(compile=True),
    } | ({"cuda_graphs": dict(cuda_graphs=True)} if on_cuda else {})
    batch, num_iter = args.sampling_batches[0], usual.num_iter
    for way, how in drawn.items():
        changes = dict(batch_size=batch) | how
        yield "sampling", f"batch {batch}, {num_iter} iterations, {way}", work("sample", **changes)
    for kind in ("vae_encode", "vae_decode", "features", "head"):
        yield "parts", kind, work(kind)
    for num_iter, batch in product(sorted(args.num_iter), args.sampling_batches):
        if (num_iter, batch) != (usual.num_iter, args.sampling_batches[0]):
            changes = dict(num_iter=num_iter, batch_size=batch)
            yield "sampling", f"batch {batch}, {num_iter} iterations", work("sample", **changes)
    for model, batch in product(configs, args.batch_sizes):
        if (model, batch) != (first, usual.batch_size):
            yield from steps(model, batch)


def checked(figure: Callable, bound: float, device: torch.device) -> list[dict]:
    with torch.backends.cudnn.flags(allow_tf32=False):  # golden files know full precision alone
        found = figure(device)
    return [{"figure": found, "bound": bound, "holds": found <= bound}]


def measure(work: Work, machine: Machine, precisions: Sequence[str], repeats: int) -> list[dict]:
    """A row for each precision, run in turn, so that what else a shared machine does meets all.

    Product rates are the mean of one before and one after; memory is known on CUDA alone.
    """
    found, on_cuda = {}, machine.device.type == "cuda"
    for precision in work.precisions or precisions:
        first = machine.seconds(partial(work.run, precision), 1)  # which takes longer
        row = dict(title=work.title, precision=precision, times=math.ceil(SHORTEST / first) or 1)
        row |= dict(items=work.items, unit=work.unit, operations=work.operations)
        found[precision] = row | dict(seconds=[], product_rates=[], memory=None)
    for _, (precision, row) in product(range(repeats), found.items()):
        before = machine.product_rate(precision)
        if on_cuda:
            torch.cuda.reset_peak_memory_stats()
        row["seconds"].append(machine.seconds(partial(work.run, precision), row["times"]))
        row["memory"] = peak_memory(machine.device) - machine.held if on_cuda else None
        row["product_rates"].append((before + machine.product_rate(precision)) / 2)
    return [*found.values()]


def profiled(kind: str, settings: Settings, machine: Machine, precision: str) -> list[dict]:
    """The costliest kernels of a work, and the share of the time in which none runs."""
    work, on_cuda = WORKS[kind](settings), machine.device.type == "cuda"
    run = partial(work.run, precision)
    run()
    seconds = machine.seconds(run, PROFILED) * PROFILED  # a profiler takes time, too
    with profile(activities=[ProfilerActivity.CUDA if on_cuda else ProfilerActivity.CPU]) as found:
        machine.seconds(run, PROFILED)
    own, whole = "self_device_time_total" if on_cuda else "self_cpu_time_total", 1e6 * seconds
    shares = [[e.key[:80], getattr(e, own) / whole, e.count] for e in found.key_averages()]
    shares.sort(key=lambda kernel: -kernel[1])
    idle = max(0.0, 1 - sum(share for _, share, _ in shares))
    return [{"title": work.title, "idle": idle, "kernels": shares[:KERNELS]}]


def attempt(run: Callable[[], list[dict]]) -> list[dict]:
    """What one row finds; out of memory, or whatever else it dies of, is a finding, too."""
    try:
        return run()
    except Exception as error:
        stop.check()  # a compiler wraps what stops it
        why, *_ = [*str(error).splitlines(), ""]
        return [{"failed": f"{type(error).__name__}: {why[:120]}"}]
    finally:
        torch._dynamo.reset()
        gc.collect()  # compiled and captured models are parts of circles
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


# --- the table


def cells(row: dict) -> list[str]:
    """A line of the table: see SPEED and HEADS."""
    if "failed" in row:
        return [row["name"], row["failed"]]
    if row["group"] == "correctness":
        holds = "yes" if row["holds"] else "**no**"
        return [row["name"], f"{row['figure']:.3g}", f"{row['bound']:g}", holds]
    if row["group"] == "profile":
        kernels = (f"`{name}`: {share:.1%}, {calls}" for name, share, calls in row["kernels"])
        return [row["title"], f"{row['idle']:.0%}", "<br>".join(kernels)]
    seconds, share = median(row["seconds"]), ""
    if row["operations"] is not None:
        pairs = zip(row["seconds"], row["product_rates"], strict=True)
        share = f"{median(row['operations'] / s / rate for s, rate in pairs):.0%}"
    return [
        *(row["name"], row["title"], row["precision"]),
        f"{seconds:.3g} ({min(row['seconds']):.3g} to {max(row['seconds']):.3g})",
        f"{readable(row['items'] / seconds, '').strip()} {row['unit']}",
        *(share, "" if row["memory"] is None else readable(row["memory"], "B")),
    ]


def line(row: Sequence[str]) -> str:
    return f"| {' | '.join(row)} |"


def table(record: dict) -> str:
    """All rows in Markdown."""
    parts = [f"# {record['device']}", ""]
    parts += [f"- {name}: {value}" for name, value in record.items() if name != "rows"]
    for group in dict.fromkeys(row["group"] for row in record["rows"]):
        head = HEADS.get(group, SPEED)
        parts += ["", f"## {group}", "", line(head), line(["---"] * len(head))]
        parts += [line(cells(row)) for row in record["rows"] if row["group"] == group]
    return "\n".join(parts) + "\n"


def main() -> None:
    args, started = make_parser().parse(), time.monotonic()
    device = resolve_device(args.device)
    for name, (on_cuda, elsewhere) in SIZES.items():
        usual = on_cuda if device.type == "cuda" else elsewhere
        setattr(args, name, getattr(args, name) or usual)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    with as_user_error():
        machine = Machine(device)
        planned = list(rows(args, machine))
    if args.only:
        planned = [row for row in planned if any(w == row[0] or w in row[1] for w in args.only)]
    elif device.type != "cuda":
        planned = [row for row in planned if "compile" not in row[1]]
    if not planned:
        raise UserError(f"--only {' '.join(args.only)}: no group and no row is called so")
    resolve_precision("fp32", device)  # its settings of cuDNN, for all rows
    about = environment(device, " ".join(args.precision), 1)
    path = args.json or RESULTS / f"{re.sub('[^0-9A-Za-z]+', '-', about['device'])}.json"
    if path.suffix != ".json":
        raise UserError(f"--json {path} does not end with .json")
    check_writable(path.parent, "--json")
    path.parent.mkdir(parents=True, exist_ok=True)
    record = begun(path, about | {name: getattr(args, name) for name in (*SIZES, *ALSO)})
    done, left = {(row["group"], row["name"]) for row in record["rows"]}, 0
    for group, name, run in planned:
        if (group, name) in done:
            continue
        if time.monotonic() - started > 60 * args.minutes:
            left += 1
            continue
        found = [{"group": group, "name": name} | row for row in attempt(run)]
        record["rows"] += found
        for suffix, text in ((".json", json.dumps(record, indent=1)), (".md", table(record))):
            with atomic_write(path.with_suffix(suffix)) as file:
                file.write(text.encode())
        print(*(line([group, *cells(row)]) for row in found), sep="\n", flush=True)
        machine.synchronize()  # a device that is lost makes no further row
    print(f"{path}: {len(record['rows'])} rows, {left} left for another start")
    wrong = [r["name"] for r in record["rows"] if "failed" in r or not r.get("holds", True)]
    for name in wrong:
        print(f"does not hold: {name}")
    sys.exit(1 if wrong else 0)


def begun(path: Path, about: dict) -> dict:
    """What the file has of the same measurement, less the rows that failed; another one is kept."""
    about = about | {"sources": sources()}
    if path.is_file():
        record = json.loads(path.read_text())
        if all(record.get(name) == about[name] for name in about if name != "git revision"):
            rows = [r for r in record["rows"] if OUT_OF_MEMORY in r.get("failed", OUT_OF_MEMORY)]
            return record | {"rows": rows}
        kept = path.with_suffix(".before.json")
        path.replace(kept)
        print(f"{path} is of other flags, code or versions: it is {kept} now")
    return about | {"rows": []}


def sources() -> str:
    """Of the code that is measured, which results beside it do not change, as they do a clone."""
    folders = (ROOT / name for name in ("benchmarks", "models", "util"))
    files = sorted(file for folder in folders for file in folder.rglob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


if __name__ == "__main__":
    dist.run(main)
