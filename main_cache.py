"""Encode a folder of images with the VAE once, so that training need not: the latent cache.

torchrun --nproc_per_node=8 main_cache.py --data_path DATA --cached_path CACHE
python main_cache.py --cached_path CACHE --verify

Stopped or killed, the same command goes on where it was, on any number of processes.
"""

import argparse
import os
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from models.tokenizers.kl16 import VAE
from models.tokenizers.tokenizer import from_uint8
from util import config_file, dist, stop
from util.args import (
    add_device_flags,
    add_distributed_flags,
    add_loader_flags,
    add_vae_flags,
    positive_int,
)
from util.build import build_vae
from util.config_file import CONFIG
from util.data.background import in_background
from util.data.cache_files import DTYPES, FORMATS, MAX_SHARD_SIZE
from util.data.cache_writer import CacheSettings, CacheWriter, list_digest
from util.data.images import ImageDataset, ImageList, collate_skipping, list_images, tell_names
from util.data.latent_cache import verify
from util.dist import run
from util.dry_cache import rehearse
from util.errors import UserError
from util.files import only_job_in
from util.json_output import figures_on_stdout
from util.parser import Parser
from util.vae_files import vae_digest

# Batches that may wait for the disk. At 128 images of 256 px, 8 MB each, a second or two of a GPU.
QUEUED = 4


def make_parser() -> Parser:
    parser = Parser(__doc__)
    add = parser.add_argument_group("cache").add_argument
    add("--data_path", default="./data/imagenet", metavar="FOLDER", help="images in SPLIT/CLASS/")
    add("--split", default="train", metavar="SPLIT", help="subfolder of --data_path to encode")
    add("--cached_path", default="", metavar="FOLDER", help="to write, or to go on with")
    add("--batch_size", type=positive_int, default=128, help="images a batch")
    add("--format", choices=FORMATS, default="npy", help="shards, or the published CLASS/IMAGE.npz")
    add(
        "--dtype",
        choices=DTYPES,
        help="of the moments; default: float16, and float32 with --format npz",
    )
    add("--shard_size", type=shard_size, default=4096, help="images a shard")
    add("--verify", action="store_true", help="only check an existing cache")
    add(
        "--dry_run",
        action="store_true",
        help="check everything, encode one batch, say what the cache would take, and stop",
    )
    add("--json", action="store_true", help="the figures as JSON on stdout, all else on stderr")
    add_vae_flags(parser)
    add_loader_flags(parser)
    add_device_flags(parser)
    add_distributed_flags(parser)
    parser.set_defaults(seed=0)
    return parser


def shard_size(text: str) -> int:
    value = positive_int(text)
    if value > MAX_SHARD_SIZE:
        raise argparse.ArgumentTypeError(f"{text} is more than {MAX_SHARD_SIZE}: it fills memory")
    return value


def main() -> None:
    parser = make_parser()
    args = parser.parse()
    if not args.cached_path:
        raise UserError("--cached_path is missing: name the folder of the cache")
    if args.verify:
        verify_cache(args.cached_path)
        return
    with figures_on_stdout(args.json) as figures:
        device = dist.init(args.device, args.dist_url, args.dist_on_itp, args.dist_timeout)
        dist.print_main(config_file.changed(args, parser))
        figures.update(write_cache(args, device))
    dist.cleanup()


def verify_cache(path: str) -> None:
    cache = verify(path)
    known = "checksums agree" if cache.manifest else "readable; no manifest, so no checksums"
    print(f"{path}: {len(cache)} images in {len(cache.classes)} classes, {known}")


def write_cache(args, device: torch.device) -> dict:
    """Everything is read and checked before anything is written. The figures, for --json."""
    torch.manual_seed(args.seed)
    images = list_images(args.data_path, args.split)
    tell_names(images.classes)
    vae = build_vae(args).to(device).eval()
    names = [os.path.relpath(path, images.root) for path, _ in images.samples]
    labels = [label for _, label in images.samples]
    settings = cache_settings(args, vae, images.classes, list_digest(names, labels))
    writer = CacheWriter(args.cached_path, settings, names, labels)
    if args.dry_run:
        return rehearse(writer, vae, args.batch_size, encode, device)

    figures = {}
    with only_job_in(args.cached_path, "--cached_path") if dist.is_main() else nullcontext():
        # One process says what is to be done, so that all agree; each takes every W-th shard.
        pending = dist.gather_objects(writer.pending() if dist.is_main() else None)[0]
        dist.print_main(f"{len(pending)} of {writer.num_shards} shards to write")
        own = pending[dist.rank() :: dist.world_size()]
        # Of a whole cache, config.yaml keeps saying what it was made with.
        config = Path(args.cached_path) / CONFIG
        with config_file.saved(args, config) if pending else nullcontext():
            encode_shards(args, device, vae, images, writer, own)
            dist.barrier()
        if dist.is_main():
            manifest = writer.write_manifest(published_constants=vae.is_kl16)
            figures = report(manifest, args.cached_path)
        dist.barrier()
    return figures


def cache_settings(args, vae: VAE, classes: list[str], images_sha256: str):
    dtype = args.dtype or ("float16" if args.format == "npy" else "float32")
    if args.format == "npz" and dtype != "float32":
        raise UserError(f"--dtype {dtype}: the published form (--format npz) is float32")
    return CacheSettings(
        format=args.format,
        dtype=dtype,
        shard_size=args.shard_size,
        image_size=args.img_size,
        vae_sha256=vae_digest(args.vae_path),
        vae_config=vae.config,
        vae_stride=vae.stride,
        classes=classes,
        images_sha256=images_sha256,
    )


def encode_shards(
    args, device, vae: VAE, images: ImageList, writer: CacheWriter, shards: list[int]
) -> None:
    """Encode and write these shards: workers decode, the device encodes, a thread writes, at once.

    One loader for all shards, so that its workers never rest.
    """
    batches = {shard: unfinished(writer, shard, args.batch_size) for shard in shards}
    order = [batch for shard in shards for batch in batches[shard]]
    on_bad = "drop" if args.skip_bad_images else "raise"
    dataset = ImageDataset(images.samples, args.img_size, on_bad, args.max_image_pixels)
    loader = DataLoader(
        dataset,
        batch_sampler=order,
        collate_fn=collate_skipping,
        num_workers=args.num_workers,
        pin_memory=args.pin_mem and device.type == "cuda",
        worker_init_fn=stop.ignore_in_worker,
    )
    loaded = iter(loader)
    bar = tqdm(total=sum(map(len, order)), unit="img", disable=None if dist.is_main() else True)

    with bar, in_background(QUEUED) as hand_over:
        for shard in shards:
            filled = writer.begin(shard)
            for batch in batches[shard]:
                readable = next(loaded)
                if readable is not None:
                    kept = [i for i in batch if not dataset.bad[i]]
                    moments = encode(vae, readable[0].to(device, non_blocking=True))
                    hand_over(filled.take, kept, moments)
                bar.update(len(batch))
                dist.beat("caching")
            hand_over(filled.finish)


def unfinished(writer: CacheWriter, shard: int, size: int) -> list[list[int]]:
    """The batches of a shard in which images are missing, divided as if none were there.

    How a VAE rounds depends on the batch: whoever goes on must get the bits of who began.
    """
    images, missing = writer.images(shard), set(writer.missing(shard))
    batches = [list(images[i : i + size]) for i in range(0, len(images), size)]
    return [batch for batch in batches if not missing.isdisjoint(batch)]


@torch.inference_mode()
def encode(vae: VAE, images: Tensor) -> np.ndarray:
    """images: uint8 [B, 3, H, W] -> moments [B, 2, 2C, h, w] of them and of their mirror images."""
    images = from_uint8(images)
    views = [vae.encode(view).parameters for view in (images, images.flip(-1))]
    return torch.stack(views, dim=1).float().cpu().numpy()


def report(manifest: dict, path: str) -> dict:
    """Say what the cache holds; the same as figures."""
    used, measured = manifest["latent_scale"], manifest["measured_latent_scale"]
    if abs(measured / used - 1) > 0.1:
        print(
            f"warning: these latents ask for a scale of {measured:.4g}, the published one is "
            f"{used:.4g}: another VAE than kl16.ckpt, or unusual images; see --latent_scale",
            file=sys.stderr,
        )
    for name in manifest["skipped"]:
        print(f"skipped {name}", file=sys.stderr)
    print(
        f"{path}: {manifest['count']} images in {len(manifest['classes'])} classes, "
        f"{len(manifest['skipped'])} skipped, latent scale {manifest['latent_scale']:.4g}"
    )
    shown = ("count", "classes", "skipped", "latent_scale", "channel_order", "latent_shape")
    return {"cached_path": path} | {name: manifest[name] for name in shown}


cli = partial(run, main)

if __name__ == "__main__":
    cli()
