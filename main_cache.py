"""Encode a folder of images with the VAE once, so that training need not: the latent cache.

torchrun --nproc_per_node=8 main_cache.py --data_path DATA --cached_path CACHE
python main_cache.py --cached_path CACHE --verify

Stopped or killed, the same command goes on where it was, on any number of processes.
"""

import shutil
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import BatchSampler
from tqdm import tqdm

from models.flops import peak_memory
from models.tokenizers import kl16
from models.tokenizers.tokenizer import from_uint8
from util import args as flags
from util import dist
from util.args import Flag, Parser, positive_int, value
from util.data.cache_writer import CacheWriter, list_digest
from util.data.images import ImageDataset, reading_flags
from util.data.latent_cache import FORMAT_VERSION, verify
from util.data.listing import ImageList, list_images
from util.errors import UserError
from util.evaluation.reference import read_batches
from util.files import only_job_in
from util.logging import changed, figures_on_stdout, settings_saved
from util.setup import build_vae
from util.vae import vae_digest

CHECKS = ("device", "processes", "VAE")  # before the batch of --dry_run
SHOWN = ("count", "classes", "skipped", "latent_scale", "channel_order", "latent_shape")


def make_parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_flags(
        "cache",
        flags.DATA_PATH,
        Flag("split", str, "train", "subfolder of --data_path to encode"),
        flags.CACHED_PATH,
        Flag("batch_size", positive_int, 128, "images a batch"),
        Flag("format", str, "npy", "shards, or the published CLASS/IMAGE.npz", ("npy", "npz")),
        Flag("dtype", str, None, "default: float16, float32 in npz files", ("float16", "float32")),
        Flag("shard_size", positive_int, 4096, "images a shard, held in memory"),
        Flag("verify", bool, False, "only check an existing cache"),
        Flag("dry_run", bool, False, "check all, encode one batch, say what all takes"),
        flags.JSON,
    )
    parser.add_flags("tokenizer", *flags.VAE)
    parser.add_loader_flags()
    parser.add_device_flags(seed=Flag("seed", flags.random_seed, 0, "of everything random"))
    return parser


def main() -> None:
    parser = make_parser()
    args = parser.parse()
    if not args.cached_path:
        raise UserError("--cached_path is missing: name the folder of the cache")
    if args.verify:
        cache = verify(args.cached_path)
        sums = "checksums agree" if cache.manifest else "readable; no manifest, so no checksums"
        print(f"{args.cached_path}: {len(cache)} images in {len(cache.classes)} classes, {sums}")
        return
    with figures_on_stdout(args.json) as figures:
        device = dist.init(args.device, args.dist_url, args.dist_on_itp, args.dist_timeout)
        dist.print_main(changed(args, parser))
        figures.update(write_cache(args, device))
    dist.cleanup()


def write_cache(args, device: torch.device) -> dict:
    """Everything is read and checked before anything is written. The figures, for --json."""
    torch.manual_seed(args.seed)
    images = list_images(value(args, "data_path"), args.split)
    vae = build_vae(args).to(device).eval()
    writer = open_writer(args, images, vae)
    if args.dry_run:
        from util import doctor  # which is slow to import

        step = partial(try_batch, writer, vae, args.batch_size, device)
        return doctor.dry_run(args, device, CHECKS, step)
    dataset = ImageDataset(images.samples, writer.settings["image_size"], **reading_flags(args))
    with only_job_in(args.cached_path, "--cached_path") if dist.is_main() else nullcontext():
        # One process says what is to be done; each takes every W-th shard.
        pending = dist.gather_objects(writer.pending() if dist.is_main() else None)[0]
        dist.print_main(f"{len(pending)} of {writer.num_shards} shards to write")
        own = pending[dist.rank() :: dist.world_size()]
        batches = {k: list(BatchSampler(writer.images(k), args.batch_size, False)) for k in own}
        pin = args.pin_mem and device.type == "cuda"
        loaded = read_batches(dataset, sum(batches.values(), []), args.num_workers, pin)
        # Of a whole cache, config.yaml keeps saying what it was made with.
        with settings_saved(args, writer.folder / flags.CONFIG) if pending else nullcontext():
            encode_shards(vae, loaded, writer, batches, device)
            dist.barrier()
        manifest = writer.write_manifest(vae.is_kl16, vae.normalised) if dist.is_main() else None
        dist.barrier()
    return report(manifest, args.cached_path) if manifest else {}


def open_writer(args, images: ImageList, vae: kl16.VAE) -> CacheWriter:
    if args.format == "npz" and args.dtype == "float16":
        raise UserError("--dtype float16: the published form (--format npz) is float32")
    names, labels = images.names, [label for _, label in images.samples]
    settings = {
        "format": args.format,
        "dtype": args.dtype or ("float16" if args.format == "npy" else "float32"),
        "shard_size": args.shard_size,
        "image_size": value(args, "img_size"),
        "vae_sha256": vae_digest(value(args, "vae_path")),
        "vae_config": vae.config,
        "vae_stride": vae.stride,
        "classes": images.classes,
        "images_sha256": list_digest(names, labels),
        "crop": "adm_center_crop",
        "format_version": FORMAT_VERSION,
    }
    return CacheWriter(args.cached_path, settings, names, labels)


def encode_shards(
    vae: kl16.VAE,
    loaded: Iterator[tuple[list[int], Tensor]],
    writer: CacheWriter,
    shards: dict[int, list[list[int]]],
    device: torch.device,
) -> None:
    """Encode and write shards: workers decode, the device encodes, a thread writes, all at once.

    shards: batches of the numbers of each one's images. loaded: of each, what could be read.
    """
    written = Future()
    written.set_result(None)
    total = sum(len(writer.images(shard)) for shard in shards)
    bar = tqdm(total=total, unit="img", disable=None if dist.is_main() else True)
    with bar, ThreadPoolExecutor(max_workers=1) as thread:
        for shard, batches in shards.items():
            kept, moments = [], []
            for batch in batches:
                ids, images = next(loaded)
                if ids:
                    kept += ids
                    encoded = encode(vae, images.to(device, non_blocking=True))
                    moments.append(writer.stored(encoded))
                bar.update(len(batch))
                dist.beat("caching")
                if written.done():
                    written.result()  # raises what failed in the thread
            written.result()
            written = thread.submit(writer.write_shard, shard, kept, moments)
        written.result()


@torch.inference_mode()
def encode(vae: kl16.VAE, images: Tensor) -> np.ndarray:
    """images: uint8 [B, 3, H, W] -> moments [B, 2, 2C, h, w] of them and of their mirror images."""
    images = from_uint8(images)
    views = [vae.encode(view).parameters for view in (images, images.flip(-1))]
    return torch.stack(views, dim=1).float().cpu().numpy()


def try_batch(writer: CacheWriter, vae: kl16.VAE, batch_size: int, device: torch.device) -> dict:
    """The step of --dry_run: encode one batch of black images; what the whole cache would take."""
    missing = sum(len(writer.images(shard)) for shard in writer.pending())
    size, folder = writer.settings["image_size"], writer.folder.absolute()
    images = torch.zeros(batch_size, 3, size, size, dtype=torch.uint8, device=device)
    for _ in range(1 if device.type == "cpu" else 2):  # a GPU chooses its kernels at first
        started = time.perf_counter()
        moments = encode(vae, images)
        seconds = time.perf_counter() - started
    slowest = torch.tensor([seconds, float(peak_memory(device))], device=device)
    seconds, peak = dist.all_reduce_max(slowest).tolist()
    hours = missing / batch_size / dist.world_size() * seconds / 3600
    to_write = missing * moments[0].astype(writer.settings["dtype"]).nbytes
    free = shutil.disk_usage(next(p for p in (folder, *folder.parents) if p.exists())).free
    if free < to_write:
        dist.print_main(f"warning: {folder}: the disk is too small for the cache")
    return {
        "images": len(writer.names),
        "images_to_encode": missing,
        "images_per_second": batch_size * dist.world_size() / seconds,
        "hours": hours,
        "device_hours": hours * dist.world_size(),
        "bytes_to_write": to_write,
        "bytes_free": free,
        "bytes_peak": int(peak),
    }


def report(manifest: dict, path: str) -> dict:
    """Say what the cache holds; the same as figures."""
    used, measured = manifest["latent_scale"], manifest["measured_latent_scale"]
    summary = f"{manifest['count']} images in {len(manifest['classes'])} classes"
    print(f"{path}: {summary}, {len(manifest['skipped'])} skipped, latent scale {used:.4g}")
    if abs(measured / used - 1) > 0.1:
        scales = f"these latents ask for a scale of {measured:.4g}, the published one is {used:.4g}"
        print(f"warning: {scales}: another VAE than kl16.ckpt, or unusual images", file=sys.stderr)
    return {"cached_path": path} | {name: manifest[name] for name in SHOWN}


cli = partial(dist.run, main)

if __name__ == "__main__":
    cli()
