"""How fast both forms of a latent cache are read: samples a second through one DataLoader.

python -m benchmarks.loaders [--images 4096 --batch_size 64 --workers 1 --repeats 5] [--json FILE]

Both caches hold the same synthetic posteriors of the published size, are written by the project's
own writer, and are read by the loader that training uses, in training's order. The files are in
the page cache, as those of a training after its first epoch are where memory allows. Turn by turn,
so that what else the machine does meets both forms; the median of the repeats counts.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from util.args import positive_int
from util.cache_files import FORMATS
from util.cache_writer import CacheSettings, CacheWriter, list_digest
from util.data import MicroBatchSampler
from util.errors import run
from util.latent_cache import CachedLatents, as_one_batch, open_cache
from util.parser import Parser

CHANNELS, SIDE = 16, 16  # of the latents of a 256 px image
IMAGES_A_CLASS = 512
WARM_UP = 4  # batches, until the worker is there and its queue is full


def make_parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("--images", type=positive_int, default=4096, help="in each cache")
    parser.add_argument("--batch_size", type=positive_int, default=64, help="samples a batch")
    parser.add_argument("--batches", type=positive_int, default=64, help="timed in one repeat")
    parser.add_argument("--workers", type=positive_int, default=1, help="loader processes")
    parser.add_argument("--repeats", type=positive_int, default=5, help="of each form")
    parser.add_argument("--json", help="file to write the figures to")
    return parser


def main() -> None:
    args = make_parser().parse()
    with tempfile.TemporaryDirectory() as folder:
        caches = {form: make_cache(Path(folder) / form, form, args.images) for form in FORMATS}
        speeds = {form: [] for form in FORMATS}
        for repeat in tqdm(range(args.repeats), "timing", disable=None):
            for form, cache in caches.items():
                speeds[form].append(samples_per_second(cache, args, seed=repeat))
    result = summary(args, speeds)
    print_summary(result)
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n")


def make_cache(folder: Path, form: str, count: int) -> CachedLatents:
    """A cache of `count` images with the default dtype of its form."""
    labels = [i // IMAGES_A_CLASS for i in range(count)]
    names = [f"class{label:04d}/{i:06d}.png" for i, label in enumerate(labels)]
    settings = CacheSettings(
        format=form,
        dtype="float16" if form == "npy" else "float32",
        shard_size=1024,
        image_size=256,
        vae_sha256="0" * 64,
        vae_config={},
        vae_stride=256 // SIDE,
        classes=sorted({os.path.dirname(name) for name in names}),
        images_sha256=list_digest(names, labels),
    )
    writer = CacheWriter(str(folder), settings, names, labels)
    rng = np.random.default_rng(0)
    for shard in tqdm(range(writer.num_shards), f"writing {form}", disable=None):
        images = writer.missing(shard)
        shape = (len(images), 2, 2 * CHANNELS, SIDE, SIDE)
        writer.write_shard(shard, [(images, rng.standard_normal(shape, np.float32))])
    writer.write_manifest(published_constants=False)
    return open_cache(folder)


def samples_per_second(cache: CachedLatents, args: argparse.Namespace, seed: int) -> float:
    batches = WARM_UP + args.batches
    sampler = MicroBatchSampler(len(cache), args.batch_size, 1, 0, 1, seed, 0, batches)
    loader = iter(
        DataLoader(cache, batch_sampler=sampler, collate_fn=as_one_batch, num_workers=args.workers)
    )
    for _ in range(WARM_UP):
        next(loader)
    started = time.perf_counter()
    read = sum(len(labels) for _, labels in loader)
    return read / (time.perf_counter() - started)


def summary(args: argparse.Namespace, speeds: dict[str, list[float]]) -> dict:
    medians = {form: statistics.median(values) for form, values in speeds.items()}
    return {
        "samples_per_second": speeds,
        "median": medians,
        "ratio": medians["npy"] / medians["npz"],
        "settings": {name: getattr(args, name) for name in ("images", "batch_size", "batches")}
        | {"workers": args.workers, "latents": [CHANNELS, SIDE, SIDE]},
        "machine": machine(),
    }


def machine() -> dict:
    return {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }


def print_summary(result: dict) -> None:
    print(" ".join(f"{key} {value}" for key, value in result["machine"].items()))
    print(" ".join(f"{key} {value}" for key, value in result["settings"].items()))
    for form, values in result["samples_per_second"].items():
        spread = f"{min(values):,.0f} to {max(values):,.0f}"
        print(f"{form}: {result['median'][form]:,.0f} samples/s (median; {spread})")
    print(f"npy / npz: {result['ratio']:.2f}")
    sys.stdout.flush()


if __name__ == "__main__":
    run(main)
