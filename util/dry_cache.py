"""--dry_run of main_cache.py: one batch is encoded, what the cache will take is told, nothing is
written."""

import shutil
import time
from pathlib import Path

import numpy as np
import torch

from models.tokenizers.kl16 import VAE
from util import dist
from util.data.cache_writer import CacheWriter
from util.flops import GIB, peak_memory

VIEWS = 2  # an image and its mirror image


def rehearse(
    writer: CacheWriter, vae: VAE, batch_size: int, encode, device: torch.device
) -> dict[str, float]:
    """encode: images [B, 3, H, W] -> moments of both views, as for the cache."""
    settings = writer.settings
    missing = [len(writer.missing(shard)) for shard in writer.unfinished()]
    images = torch.zeros(batch_size, 3, settings.image_size, settings.image_size, device=device)
    for _ in range(1 if device.type == "cpu" else 2):  # a GPU chooses its kernels at first
        started = time.perf_counter()
        encode(vae, images)
        seconds = time.perf_counter() - started
    slowest = torch.tensor([seconds, float(peak_memory(device))], device=device)
    seconds, peak = dist.all_reduce_max(slowest).tolist()
    side = settings.image_size // settings.vae_stride
    per_image = VIEWS * 2 * vae.channels * side**2 * np.dtype(settings.dtype).itemsize
    device_hours = sum(missing) / batch_size * seconds / 3600
    figures = {
        "device": device.type,
        "processes": dist.world_size(),
        "images": len(writer.names),
        "images_to_encode": sum(missing),
        "images_per_second": batch_size * dist.world_size() / seconds,
        "hours": device_hours / dist.world_size(),
        "device_hours": device_hours,
        "bytes_of_cache": per_image * len(writer.names),
        "bytes_to_write": per_image * sum(missing),
        "bytes_free": free_bytes(writer.folder),
        "bytes_peak": int(peak),
    }
    dist.print_main(told(figures))
    return figures


def free_bytes(folder: Path) -> int:
    """Of the disk on which a folder is, or would be."""
    places = (folder.absolute(), *folder.absolute().parents)
    return shutil.disk_usage(next(place for place in places if place.exists())).free


def told(found: dict) -> str:
    write, free, peak = (found[f"bytes_{n}"] / GIB for n in ("to_write", "free", "peak"))
    short = "" if free > write else ": NOT ENOUGH, see --dtype float16 or another --cached_path"
    return "\n".join(
        [
            f"dry run: {found['images_to_encode']:,} of {found['images']:,} images to encode",
            f"speed       {found['images_per_second']:.3g} images/s without reading them; "
            f"{found['hours']:.3g} hours, {found['device_hours']:.3g} device-hours",
            f"memory      {peak:.2f} GiB at most in this batch",
            f"disk        {write:.3g} GiB to write, {free:.3g} GiB free{short}",
            "nothing was written",
        ]
    )
