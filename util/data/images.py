"""Images as the models see them: how a file is read, cropped and handed on, and how one is saved.

    read_image -> center_crop -> ImageDataset[(index, flip)] -> uint8 [3, S, S]

Datasets are pure functions of the key (index, flip), which `util.data.batches` decides. Pixels stay
bytes until they are on the device, where `models.tokenizers.tokenizer.from_uint8` takes them.
"""

import argparse
import os
import re
import sys
import warnings
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageOps, features
from torch import Tensor
from torch.utils.data import Dataset

from util.errors import UserError, as_user_error
from util.files import atomic_write, shown

Key = tuple[int, bool]  # (index of the sample, whether it is flipped left to right)

# Pillow tries no other format: some of them start programs (EPS runs Ghostscript).
FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF")
FORMATS += ("JPEG2000",) if features.check("jpg_2000") else ()
FORMATS += ("AVIF",) if "avif" in features.modules and features.check("avif") else ()
MAX_PIXELS = 250_000_000  # of one image: 0.75 GB as RGB; cameras have up to 200 million
Image.MAX_IMAGE_PIXELS = None  # ours, which a flag raises, takes the place of Pillow's


def read_image(path: str | Path, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The image in a file as 8-bit RGB, upright as its EXIF orientation says; the first of several.

    path: of a file, or FILE.parquet/GROUP/ROW/NAME.
    16-bit grey is scaled to 8 bits, transparent parts are laid on white, other modes are converted.
    Raises UserError, naming the file, if it is damaged, too large, or of another kind.
    """
    context = f"cannot read image {shown(path)} (mend or remove it, or pass --skip_bad_images)"
    # Pillow's readers meet a damaged file with nearly any exception, so all of them count.
    with as_user_error(context, (Exception,)), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # at metadata that nobody needs
        inside = re.fullmatch(r"(.*\.parquet)/(\d+)/(\d+)/[^/]*", str(path))
        if inside and os.path.isfile(inside[1]):
            path = BytesIO(read_row_group(inside[1], int(inside[2]))[int(inside[3])].as_py())
        elif not os.path.isfile(path):  # opening a pipe would wait for its other end
            raise FileNotFoundError("there is no regular file of that name")
        with Image.open(path, formats=FORMATS) as image:
            pixels = image.width * image.height
            if pixels > max_pixels:
                raise ValueError(f"{pixels} pixels, more than --max_image_pixels {max_pixels}")
            ImageOps.exif_transpose(image, in_place=True)
            return _to_rgb(image)


@lru_cache(maxsize=2)
def read_row_group(path: str, group: int):
    """The bytes of its images: who reads in order reads each group once."""
    from pyarrow.parquet import ParquetFile  # an extra

    table = ParquetFile(path).read_row_group(group, columns=["image.bytes"], use_threads=False)
    return table["image"].combine_chunks().field("bytes")


def _to_rgb(image: Image.Image) -> Image.Image:
    """As 8-bit RGB. Raises ValueError if its numbers have no fixed range."""
    # Pillow reads 16-bit PPM as 32-bit numbers; its own conversion clips at 255.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
        image = Image.fromarray(np.rint(np.asarray(image) / 257).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"pixels of mode {image.mode} have no fixed range; save 8 or 16 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """The centre square at size x size pixels.

    Halves with a box filter while the shorter side is at least twice the size, then bicubic.
    Raises ValueError if it would exceed MAX_PIXELS. Source: ADM (arXiv 2105.05233).
    """
    while min(image.size) >= 2 * size:
        half = image.width // 2, image.height // 2
        image = image.resize(half, Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    if width * height > MAX_PIXELS:
        raise ValueError(f"{image.width} x {image.height} is too elongated to be cropped")
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))


def parse_key(key: Key | int, length: int) -> Key:
    """(index, flip) of a dataset's key. Raises IndexError outside a dataset of that length."""
    index, flip = key if isinstance(key, tuple) else (key, False)
    return range(length)[index], bool(flip)


class ImageDataset(Dataset):
    """dataset[(index, flip)] -> (image uint8 [3, S, S], label).

    A plain index is the key (index, False). on_bad says what an unreadable image does:
      "raise": a UserError naming the file.
      "next": the next readable image takes its place, so that a micro-batch keeps its size.
      "drop": the item is None, which `collate_skipping` leaves out.
    Each file passed over is named on stderr once and marked in `bad` [N], which all DataLoader
    workers share with the main process.
    """

    def __init__(
        self,
        samples: list[tuple[str, int]],
        size: int,
        on_bad: Literal["raise", "next", "drop"] = "raise",
        max_pixels: int = MAX_PIXELS,
    ):
        self.samples, self.size, self.on_bad, self.max_pixels = samples, size, on_bad, max_pixels
        self.bad = torch.zeros(len(samples), dtype=torch.bool).share_memory_()

    def __len__(self) -> int:
        return len(self.samples)

    def subset(self, chosen: list[int]) -> "ImageDataset":
        """The images of those numbers, numbered anew."""
        samples = [self.samples[i] for i in chosen]
        return ImageDataset(samples, self.size, self.on_bad, self.max_pixels)

    def __getitem__(self, key: Key | int) -> tuple[Tensor, int] | None:
        index, flip = parse_key(key, len(self))
        tries = len(self) if self.on_bad == "next" else 1
        for other in (number % len(self) for number in range(index, index + tries)):
            try:
                if not self.bad[other]:
                    return self._load(other, flip)
            except UserError as error:
                if self.on_bad == "raise":
                    raise
                self.bad[other] = True
                print(f"skipped: {error}", file=sys.stderr, flush=True)
        if self.on_bad == "next":
            raise UserError(f"none of the {len(self)} images can be read; see --data_path")
        return None

    def _load(self, index: int, flip: bool) -> tuple[Tensor, int]:
        path, label = self.samples[index]
        image = read_image(path, self.max_pixels)
        with as_user_error(f"cannot use image {shown(path)} (or pass --skip_bad_images)"):
            pixels = np.asarray(center_crop(image, self.size))  # [S, S, 3]
        own = np.array(pixels[:, ::-1] if flip else pixels)
        return torch.from_numpy(own).permute(2, 0, 1), label


def reading_flags(args: argparse.Namespace) -> dict:
    """What the flags say of an `ImageDataset` that leaves out what it cannot read."""
    on_bad = "drop" if args.skip_bad_images else "raise"
    return {"on_bad": on_bad, "max_pixels": args.max_image_pixels}


def collate_skipping(items: list[tuple[Tensor, int] | None]) -> list[Tensor] | None:
    """[images uint8 [B, 3, S, S], labels] of the items that are not None; None if all are.

    In channels-last memory, as they were decoded.
    """
    readable = [item for item in items if item is not None]
    if not readable:
        return None
    images, labels = zip(*readable, strict=True)
    stacked = torch.stack([image.permute(1, 2, 0) for image in images])
    return [stacked.permute(0, 3, 1, 2), torch.tensor(labels)]


def save_png(image: Tensor | np.ndarray, path: str | Path) -> None:
    """image: uint8 [3, H, W]. The file is whole or absent."""
    with atomic_write(path, durable=False) as file:
        Image.fromarray(np.moveaxis(np.asarray(image), 0, -1)).save(file, format="PNG")


def grid(images: Tensor, columns: int) -> Tensor:
    """images: uint8 [N, 3, H, W] -> one uint8 [3, H', W'], row by row."""
    from torchvision.utils import make_grid  # slow to import

    return make_grid(images, nrow=columns, padding=2, pad_value=255)


def psnr(images: Tensor, reference: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of uint8 images [N, 3, H, W] in dB: [N]; 100 where identical."""
    error = (images.double() - reference.double()).square().mean(dim=(1, 2, 3)) / 255**2
    return -10 * error.clamp_min(1e-10).log10()
