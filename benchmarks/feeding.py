"""Reading, encoding and caching images: how fast, and how many cores are at work.

python -m benchmarks.feeding [--repeats 3] [--page FILE]

The works `images`, `caching`, `vae_encode` and `vae_decode` of benchmarks.run with their switches,
and caching with a device that is only waited for, as one waits for a GPU: what it encodes takes
1 / RATE seconds an image, and the host is free meanwhile. Cores are user and system seconds of the
process and its workers over the seconds of the clock, their start included.
"""

import argparse
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import torch
from torch import Tensor

import main_cache
from benchmarks.loaders import image_loader, make_photos
from benchmarks.machine import Machine
from benchmarks.pipelines import caching, fill_cache, in_turn
from benchmarks.plain import swapped
from benchmarks.run import SIZES
from benchmarks.tables import row_of, speed, spread
from benchmarks.work import FAST, Settings, Variant, Work, measure
from benchmarks.works import vae
from models.tokenizers.kl16 import KL16, AutoencoderKL
from util.args import positive_int
from util.dist import run
from util.hardware import readable
from util.page import check_place, write_between
from util.parser import Parser
from util.provenance import cores, environment
from util.vae import save_vae

MARK = "benchmarks.feeding"  # of the place in a page
CPU = torch.device("cpu")
HEAD = ("work", "variant", "seconds, median (range)", "a second", "cores at work")
RATE = 200  # images/s of the device that is waited for
FILED = 768  # images that it encodes, in shards of 256 and batches of 32
SHARD, BATCH = 256, 32
IMG_SIZE = 256  # pixels
CACHED = 8  # images that the CPU encodes itself
PIXELS = 64  # a side: what the workers do is not what is to be seen


def make_parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("--repeats", type=positive_int, default=3, help="runs of each variant")
    parser.add_argument("--page", type=Path, help="Markdown file to write the table into")
    return parser


def waited_for(_vae, images: Tensor) -> np.ndarray:
    """In place of `encode`: moments of the size that KL-16 makes of 256 px."""
    time.sleep(len(images) / RATE)
    return np.random.default_rng(0).standard_normal((len(images), 2, 32, 16, 16), np.float32)


def waiting(settings: Settings, folder: Path) -> Work:
    """Caching where the host has nothing to do with the encoding."""
    torch.manual_seed(0)
    save_vae(folder / "narrow.ckpt", AutoencoderKL(**{**KL16, "ch": 32, "num_res_blocks": 1}))
    photos = make_photos(folder / "many", FILED)
    flags = {"vae_path": folder / "narrow.ckpt", "data_path": photos, "img_size": PIXELS}
    flags |= {"num_workers": max(1, cores() - 1), "device": "cpu"}
    flags |= {"shard_size": SHARD, "batch_size": BATCH}
    once = partial(fill_cache, folder, **flags)

    @contextmanager
    def turn() -> Iterator[None]:
        with in_turn(), swapped(main_cache, "encode", waited_for):
            yield

    around = partial(swapped, main_cache, "encode", waited_for)
    found = [Variant(FAST, "", once, around), Variant("encode and write in turn", "", once, turn)]
    return Work("waiting", f"caching, a device of {RATE} images/s", FILED, "images", found)


class Cores:
    """How many cores each variant keeps at work; the runs are the benchmark's own."""

    def __init__(self):
        self.found: dict[str, list[float]] = {}

    def watched(self, variant: Variant) -> Variant:
        def once() -> object:
            cpu, began = cpu_seconds(), time.perf_counter()
            result = variant.run()
            share = (cpu_seconds() - cpu) / (time.perf_counter() - began)
            self.found.setdefault(variant.name, []).append(share)
            return result

        return replace(variant, run=once)


def cpu_seconds() -> float:
    """User and system, of this process and of the children that have ended."""
    uses = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(use.ru_utime + use.ru_stime for use in uses)


def lines_of(work: Work, machine: Machine, repeats: int) -> Iterator[str]:
    watch = Cores()
    watched = replace(work, variants=[watch.watched(v) for v in work.variants])
    for row in measure(watched, machine, repeats, limit=30.0):
        at_work = f"{median(watch.found[row['variant']]):.2f}"
        yield row_of([row["title"], row["variant"], spread(row), speed(row), at_work])


def conditions(rates: list[float], repeats: int) -> str:
    where = environment(CPU, "fp32", 1)
    return (
        f"Medians of at most {repeats} runs in turn. {where['processor']}, {where['system']}, "
        f"Python {where['Python']}, torch {where['torch']}, {torch.get_num_threads()} threads, git "
        f"{where['git revision'][:12]}; a product of two fp32 matrices made "
        f"{readable(min(rates), 'FLOP/s')} to {readable(max(rates), 'FLOP/s')} between the works."
    )


def main() -> None:
    args: argparse.Namespace = make_parser().parse()
    if args.page:
        check_place(args.page, MARK)
    sizes = SIZES["cpu"] | {"cached": CACHED}
    settings = Settings(
        **sizes, img_size=IMG_SIZE, device=CPU, precisions=("fp32",), mask_ratio=0.85
    )
    works: list[Callable[[Path], Work]] = [
        partial(image_loader, settings),
        partial(waiting, settings),
        partial(caching, settings),
        lambda _: vae(settings, "encode"),
        lambda _: vae(settings, "decode"),
    ]
    machine = Machine(CPU)
    lines, rates = [row_of(HEAD), "|" + "---|" * len(HEAD)], [machine.matrix_rate("fp32")]
    for work in works:
        with tempfile.TemporaryDirectory() as folder:
            for line in lines_of(work(Path(folder)), machine, args.repeats):
                print(line, flush=True)
                lines.append(line)
        rates.append(machine.matrix_rate("fp32"))
    lines += ["", conditions(rates, args.repeats), ""]
    print(lines[-2])
    if args.page:
        write_between(args.page, MARK, lines)


if __name__ == "__main__":
    run(main)
