"""How fast everything is: each work in all its variants, timed in turn, as JSON and as a table.

python -m benchmarks.run [--model tokenbridge_base --batch_size 2 --precision fp32 bf16]
python -m benchmarks.run --only train head --repeats 5 [--json FILE]
python -m benchmarks.render      writes the tables and the figure of docs/performance.md
"""

import argparse
import json
import platform
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from pathlib import Path

import torch

from benchmarks import loaders, pipelines, works
from benchmarks.machine import PRODUCTS, Machine
from benchmarks.tables import row_line
from benchmarks.work import Settings, Work, measure
from models.config import PRESETS
from util.args import fraction, positive_float, positive_int
from util.device import resolve_device
from util.dist import run
from util.errors import UserError, as_user_error
from util.files import atomic_write, check_writable
from util.parser import Parser
from util.provenance import ROOT, cores, git_revision, processor, versions

FORMAT = 1
RESULTS = ROOT / "benchmarks" / "results"
# A GPU's sizes are those of a training on it; a CPU's end within half an hour on 2 cores.
SIZES = {
    "cpu": dict(model="tokenbridge_base", long_model="tokenbridge_tiny", batch_size=2),
    "cuda": dict(model="tokenbridge_large", long_model="tokenbridge_large", batch_size=64),
}
SIZES["mps"] = SIZES["cpu"]
PRECISIONS = {"cpu": ["fp32", "bf16"], "mps": ["fp32", "bf16"], "cuda": ["bf16"]}
MASK_RATIOS = {"cpu": 0.85, "mps": 0.85, "cuda": 0.867}  # the published run's; training's mean
MORE = dict(sampled=64, head_tokens=4096, cached=2048, evaluated=64, read=65536, photos=4096)

Builder = Callable[[Settings, Path], Work]
WORKS: dict[str, Builder] = {
    "train": lambda settings, _: works.training_step(settings),
    "forward": lambda settings, _: works.forward(settings),
    "head": lambda settings, _: works.head_sampling(settings),
    "sample8": lambda settings, _: works.sampling(settings, settings.iterations[0]),
    "sample64": lambda settings, _: works.sampling(settings, settings.iterations[1]),
    "sample256": lambda settings, _: works.sampling(settings, settings.iterations[2]),
    "quantizer": lambda settings, _: works.quantizer(settings),
    "ema": lambda settings, _: works.ema(settings),
    "optimizer": lambda settings, _: works.optimizer(settings),
    "vae_encode": lambda settings, _: works.vae(settings, "encode"),
    "vae_decode": lambda settings, _: works.vae(settings, "decode"),
    "caching": pipelines.caching,
    "loaders": loaders.latent_loaders,
    "images": loaders.image_loader,
    "evaluation": pipelines.evaluation,
}
KEPT = "kept"  # bytes, not seconds


def make_parser() -> Parser:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--device", default="cuda", help="cuda, mps or cpu; what is there if absent")
    add("--model", choices=PRESETS, help="[tokenbridge_base; on CUDA tokenbridge_large]")
    add(
        "--long_model",
        choices=PRESETS,
        help="of samplings of 64 and 256 iterations and of the evaluation "
        "[tokenbridge_tiny, which takes seconds on a CPU; on CUDA tokenbridge_large]",
    )
    add("--batch_size", type=positive_int, help="of training, forward and VAE [2; on CUDA 64]")
    add("--img_size", type=positive_int, default=256, help="pixels")
    add("--mask_ratio", type=fraction, help="of training and forward [0.85; on CUDA 0.867]")
    add("--precision", nargs="+", choices=tuple(PRODUCTS), help="[fp32 bf16; on CUDA bf16]")
    add("--only", nargs="+", choices=(*WORKS, KEPT), help="these works [all]")
    add("--repeats", type=positive_int, default=3, help="timed runs of each variant")
    add("--limit", type=positive_float, default=30.0, help="seconds, then two runs are enough")
    add("--no_switches", action="store_true", help="no plain variants")
    add("--compile", action="store_true", help="compiled variants as well, which takes minutes")
    add(
        "--json",
        type=Path,
        help="file to write [benchmarks/results/MACHINE.json; with --only in output/bench/]",
    )
    return parser


def make_settings(args: argparse.Namespace, device: torch.device) -> Settings:
    sizes = SIZES[device.type] | (MORE if device.type == "cuda" else {})
    given = {name: getattr(args, name) for name in ("model", "long_model", "batch_size")}
    return Settings(
        **sizes | {name: value for name, value in given.items() if value is not None},
        img_size=args.img_size,
        device=device,
        precisions=tuple(dict.fromkeys(args.precision or PRECISIONS[device.type])),
        mask_ratio=MASK_RATIOS[device.type] if args.mask_ratio is None else args.mask_ratio,
        compile=args.compile,
        switches=not args.no_switches,
    )


def main() -> None:
    args = make_parser().parse()
    device = resolve_device(args.device)
    settings = make_settings(args, device)
    with as_user_error(f"--img_size {args.img_size}"):
        for model in (settings.model, settings.long_model):
            settings.config(model)
    path = args.json or default_path(device, bool(args.only))
    check_writable(path.parent, "--json")
    if path.is_dir():
        raise UserError(f"--json {path} is a folder; name a file")
    result = benchmark(settings, args.only or [*WORKS, KEPT], args.repeats, args.limit)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        file.write((json.dumps(result, indent=1) + "\n").encode())
    print(f"{result['seconds']:.0f} s in all; written: {path}", flush=True)


def default_path(device: torch.device, partial_run: bool) -> Path:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    name = re.sub(r"[^a-z0-9]+", "-", f"{device.type} {name}".lower()).strip("-")
    folder = ROOT / "output" / "bench" if partial_run else RESULTS
    return folder / f"{name}.json"


def benchmark(settings: Settings, names: list[str], repeats: int, limit: float) -> dict:
    """The content of the JSON file."""
    started, machine = time.monotonic(), Machine(settings.device)
    facts = describe(settings, machine)
    print("  ".join(f"{key} {value}" for key, value in facts["machine"].items()), flush=True)
    rows, copies = [], [machine.copy_rate()]
    for name in WORKS:
        if name in names:
            for row in timed(name, settings, machine, repeats, limit):
                rows.append(row)
                print(row_line(row), flush=True)
            copies.append(machine.copy_rate())
    kept = works.kept(settings) if KEPT in names else []
    return {
        **facts,
        "settings": plain_settings(settings) | {"repeats": repeats, "limit": limit},
        "copy_rates": copies,
        "rows": rows,
        "kept": kept,
        "seconds": time.monotonic() - started,
    }


def timed(
    name: str, settings: Settings, machine: Machine, repeats: int, limit: float
) -> Iterator[dict]:
    with tempfile.TemporaryDirectory() as folder:
        yield from measure(WORKS[name](settings, Path(folder)), machine, repeats, limit)


def describe(settings: Settings, machine: Machine) -> dict:
    """Hardware, versions and time: what a figure must be read with."""
    facts = {"processor": processor(), "cores": cores(), "threads": torch.get_num_threads()}
    if settings.device.type == "cuda":
        properties = torch.cuda.get_device_properties(settings.device)
        facts |= {"gpu": properties.name, "gpu_bytes": properties.total_memory}
    facts |= {"system": platform.system(), "python": platform.python_version()}
    return {
        "format": FORMAT,
        "machine": facts,
        "versions": versions(),
        "git_revision": git_revision(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "matrix": machine.side,
    }


def plain_settings(settings: Settings) -> dict:
    return vars(settings) | {
        "device": settings.device.type,
        "published_conditions": settings.published_conditions,
    }


if __name__ == "__main__":
    run(main)
