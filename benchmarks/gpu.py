"""Everything about one GPU: whether it computes right, how fast it is, and what bounds it.

python -m benchmarks.gpu [--minutes 25] [--only correctness "training step"] [--json FILE]

Every row is written as it is measured. Started again, it goes on where it was killed, or where its
minutes were over; rows of another commit, device or torch are measured anew. It needs no network,
no data, and of the dependencies no more than training does without TensorBoard.
--small takes seconds a row: whether all of it works, on a CPU too.
"""

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import correctness
from benchmarks.run import HEAD, RESULTS, Machine, cells, line, measure
from benchmarks.works import WORKS, Settings
from models.config import TokenBridgeConfig, preset
from util import dist, stop
from util.args import Parser, positive_float
from util.device import resolve_device
from util.files import atomic_write, check_writable
from util.logging import environment

PRECISION = "bf16"
KERNELS, PROFILED = 10, 3  # shown, and runs that they are taken from


@dataclass(frozen=True)
class Sizes:
    """The first of each is what most rows are measured with."""

    models: tuple[str, ...] = ("tokenbridge_large", "tokenbridge_huge")
    batches: tuple[int, ...] = (64, 16, 32, 128)
    sampling_batches: tuple[int, ...] = (64, 1, 256)
    iterations: tuple[int, ...] = (64, 16, 256)
    img_size: int = 256


SMALL = Sizes(("tokenbridge_tiny",), (2,), (2, 1), (2,), 32)
Row = tuple[str, str, Callable[[], list[dict]]]  # group, name, what measures it


def rows(of: Sizes, machine: Machine, repeats: int) -> Iterator[Row]:
    """In the order of their importance, for when the minutes are over."""
    device = machine.device
    checks = correctness.CHECKS | (correctness.ON_CUDA if device.type == "cuda" else {})
    for name, (figure, bound) in checks.items():
        yield "correctness", name, partial(checked, figure, bound, device)

    def work(kind: str, settings: Settings) -> Callable[[], list[dict]]:
        return lambda: measure(WORKS[kind](settings), machine, (PRECISION,), repeats)

    configs = {n: TokenBridgeConfig(**preset(n), img_size=of.img_size) for n in of.models}
    usual = Settings(configs[of.models[0]], of.batches[0], of.iterations[0], device)
    ways = {
        "plain": {},
        "compile": dict(compile=True),
        "compile, sizes fixed": dict(compile=True, dynamic=False),
        "grad_checkpointing": dict(grad_checkpointing=True),
        "head_share 0.25": {},
    }
    for model, batch, way in product(configs, of.batches, ways):
        share = 0.25 if way.startswith("head_share") else 1.0
        changed = dict(config=replace(configs[model], head_share=share), batch_size=batch)
        settings = replace(usual, **changed, **ways[way])
        yield "training step", f"{model}, batch {batch}, {way}", work("train", settings)
    for part in ("head", "backbone", "optimizer"):
        name = f"{of.models[0]}, batch {usual.batch_size}, {part} replaced by nothing"
        yield "training step", name, work("train", replace(usual, without=part))
    for kind in ("train", "sample"):
        settings = replace(usual, num_iter=min(of.iterations))
        yield "profile", kind, partial(profiled, kind, settings)
    ways = {
        "plain": {},
        "cfg 1": dict(sampling=dict(cfg=1.0)),
        "cfg_interval 0.2 0.6": dict(sampling=dict(cfg_interval=(0.2, 0.6))),
        "token_cache 4": dict(sampling=dict(token_cache=4)),
        "compile": dict(compile=True),
    }
    ways |= {"cuda_graphs": dict(cuda_graphs=True)} if device.type == "cuda" else {}
    for way, how in ways.items():
        name = f"batch {usual.batch_size}, {usual.num_iter} iterations, {way}"
        yield "sampling", name, work("sample", replace(usual, **how))
    for kind in ("vae_encode", "vae_decode", "features", "head"):
        yield "parts", kind, work(kind, usual)
    for num_iter, batch in product(sorted(of.iterations), of.sampling_batches):
        if (num_iter, batch) != (usual.num_iter, usual.batch_size):
            settings = replace(usual, num_iter=num_iter, batch_size=batch)
            yield "sampling", f"batch {batch}, {num_iter} iterations", work("sample", settings)


def checked(figure: Callable, bound: float, device: torch.device) -> list[dict]:
    found = figure(device)
    return [{"figure": found, "bound": bound, "holds": found <= bound}]


def profiled(kind: str, settings: Settings) -> list[dict]:
    """The costliest kernels of a work, and the share of the time in which none runs."""
    work, cuda = WORKS[kind](settings), settings.device.type == "cuda"
    work.run(PRECISION)
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if cuda else [])
    timed = partial(Machine(settings.device, 1).seconds, partial(work.run, PRECISION), PROFILED)
    with profile(activities=activities) as found:
        seconds = timed() * PROFILED
    field = "self_device_time_total" if cuda else "self_cpu_time_total"
    events = [event for event in found.key_averages() if getattr(event, field) > 0]
    events.sort(key=lambda event: -getattr(event, field))
    busy = sum(getattr(event, field) for event in events) / 1e6 / seconds
    kernels = [[e.key[:80], getattr(e, field) / 1e6 / seconds, e.count] for e in events[:KERNELS]]
    return [{"title": work.title, "idle": max(0.0, 1 - busy), "kernels": kernels}]


def table(record: dict) -> str:
    """All rows in Markdown."""
    parts = [f"# {record['device']}", ""]
    parts += [f"{name}: {value}  " for name, value in record.items() if name != "rows"]
    by_group = {}
    for row in record["rows"]:
        by_group.setdefault(row["group"], []).append(row)
    for group, found in by_group.items():
        parts += ["", f"## {group}", ""]
        heads = {
            "correctness": ("check", "figure", "at most", "holds"),
            "profile": ("work", "idle", "kernel: share of the time, calls"),
        }.get(group, ("", *HEAD))
        parts += [line(heads), line(["---"] * len(heads))]
        parts += [line(shown(row)) for row in found]
    return "\n".join(parts) + "\n"


def shown(row: dict) -> list[str]:
    if "failed" in row:
        return [row["name"], row["failed"]]
    if row["group"] == "correctness":
        holds = "yes" if row["holds"] else "**no**"
        return [row["name"], f"{row['figure']:.3g}", f"{row['bound']:g}", holds]
    if row["group"] == "profile":
        kernels = (f"`{key}`: {share:.1%}, {calls}" for key, share, calls in row["kernels"])
        return [row["title"], f"{row['idle']:.0%}", "<br>".join(kernels)]
    return [row["name"], *cells(row)]


def attempt(run: Callable[[], list[dict]]) -> list[dict]:
    """What one row finds; out of memory, or whatever else it dies of, is a finding, too."""
    try:
        return run()
    except Exception as error:
        stop.check()  # a compiler wraps what stops it
        return [{"failed": f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"}]
    finally:
        torch._dynamo.reset()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def main() -> None:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--device", default="cuda", help="cuda, mps or cpu; what is there if absent")
    add("--minutes", type=positive_float, default=25.0, help="after which no further row begins")
    add("--only", nargs="+", help="these groups, or rows whose name holds this [all]")
    add("--small", action="store_true", help="a tiny model, few rows")
    add("--json", type=Path, help="file to write [benchmarks/results/NAME_OF_THE_GPU.json]")
    args, started = parser.parse(), time.monotonic()
    device = resolve_device(args.device)
    torch.backends.cudnn.allow_tf32 = False  # the golden files know full precision alone
    about = environment(device, PRECISION, 1) | {"small": args.small}
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    path = args.json or RESULTS / f"{name.replace(' ', '-')}{'-small' if args.small else ''}.json"
    check_writable(path.parent, "--json")
    record = about | {"rows": []}
    if path.is_file():
        before = json.loads(path.read_text())
        same = {k: before.get(k) for k in about} == json.loads(json.dumps(about))
        record = before if same else record
    done = {(row["group"], row["name"]) for row in record["rows"]}
    machine, repeats = (Machine(device, 64), 1) if args.small else (Machine(device), 3)
    left = 0
    for group, name, run in rows(SMALL if args.small else Sizes(), machine, repeats):
        asked = not args.only or any(word == group or word in name for word in args.only)
        if not asked or (group, name) in done:
            continue
        if time.monotonic() - started > 60 * args.minutes:
            left += 1
            continue
        found = [{"group": group, "name": name} | row for row in attempt(run)]
        record["rows"] += found
        for suffix, text in ((".json", json.dumps(record, indent=1)), (".md", table(record))):
            with atomic_write(path.with_suffix(suffix)) as file:
                file.write(text.encode())
        print(*(line([group, *shown(row)]) for row in found), sep="\n", flush=True)
    wrong = [row["name"] for row in record["rows"] if "failed" in row or not row.get("holds", True)]
    print(f"{path}: {len(record['rows'])} rows, {left} left for another start")
    for name in wrong:
        print(f"does not hold: {name}")


if __name__ == "__main__":
    dist.run(main)
