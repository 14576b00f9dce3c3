"""--dry_run of reconstruction.py: the first batch goes through the VAE and all quantizers, what the
run will take is told, nothing is written."""

import io
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from util import dist
from util.data.images import ImageDataset, collate_skipping
from util.errors import UserError
from util.evaluation.reconstruction_folder import ReconstructionFolder
from util.flops import GIB, peak_memory

# images uint8 [N, 3, H, W] and their numbers -> pixels of every variant and of the crops, measured
Decode = Callable[[Tensor, list[int]], list[Tensor]]


def rehearse(
    folder: ReconstructionFolder,
    dataset: ImageDataset,
    names: list[str],
    decode: Decode,
    device: torch.device,
) -> dict[str, float]:
    """names: of what will be in the folder, the crops included; decode makes all of them."""
    missing = len(set().union(*(folder.missing(name) for name in names)))
    batch = collate_skipping([dataset[i] for i in folder.batches[0]])
    if batch is None:
        raise UserError("none of the first batch of images can be read; see --image_dir")
    ids = [i for i in folder.batches[0] if not dataset.bad[i]]
    for _ in range(1 if device.type == "cpu" else 2):  # a GPU chooses its kernels at first
        started = time.perf_counter()
        decoded = decode(batch[0], ids)
        seconds = time.perf_counter() - started
    slowest = torch.tensor([seconds, float(peak_memory(device))], device=device)
    seconds, peak = dist.all_reduce_max(slowest).tolist()
    device_hours = missing * seconds / 3600
    per_batch = sum(png_bytes(pixels) for pixels in decoded)
    figures = {
        "device": device.type,
        "processes": dist.world_size(),
        "images": folder.count,
        "batches": len(folder.batches),
        "batches_to_do": missing,
        "variants": names,
        "images_per_second": len(ids) * dist.world_size() / seconds,
        "hours": device_hours / dist.world_size(),
        "device_hours": device_hours,
        "bytes_to_write": missing * per_batch,
        "bytes_free": free_bytes(folder.path.absolute()),
        "bytes_peak": int(peak),
    }
    dist.print_main(told(figures))
    return figures


def png_bytes(images: Tensor) -> int:
    """Of uint8 [N, 3, H, W] as PNG files."""
    total = 0
    for image in images:
        file = io.BytesIO()
        Image.fromarray(np.moveaxis(image.numpy(), 0, -1)).save(file, format="PNG")
        total += file.tell()
    return total


def told(found: dict) -> str:
    write, free, peak = (found[f"bytes_{n}"] / GIB for n in ("to_write", "free", "peak"))
    short = "" if free > write else ": NOT ENOUGH, see --output_dir"
    return "\n".join(
        [
            f"dry run: {found['batches_to_do']:,} of {found['batches']:,} batches to do, "
            f"{found['images']:,} images as {', '.join(found['variants'])}",
            f"speed       {found['images_per_second']:.3g} images/s without reading them; "
            f"{found['hours']:.3g} hours, {found['device_hours']:.3g} device-hours",
            f"memory      {peak:.2f} GiB at most in this batch",
            f"disk        about {write:.3g} GiB to write, {free:.3g} GiB free{short}",
            "nothing was written",
        ]
    )


def free_bytes(folder: Path) -> int:
    """Of the disk on which a folder is, or would be."""
    return shutil.disk_usage(next(p for p in (folder, *folder.parents) if p.exists())).free
