"""Images as the models see them: which files there are, how one is read, in which order they come.

    list_images -> read_image -> center_crop -> ImageDataset[(index, flip)] -> uint8 [3, S, S]

Datasets are pure functions of the key (index, flip); `MicroBatchSampler` alone decides the keys.
Its unit is the micro-batch: G of them make the global batch of one training step, and what one of
them holds depends on (seed, step, its number j in the global batch), never on the number of
processes that share the work. Pixels stay bytes until they are on the device: a quarter of the
memory between processes; `models.tokenizer.from_uint8` makes numbers of them.
"""

import io
import os
import re
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset, Sampler
from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes, make_dataset

from util.errors import UserError, as_user_error

Key = tuple[int, bool]  # (index of the sample, whether it is flipped left to right)

# What the extensions in IMG_EXTENSIONS stand for, and what such files are in truth now and then.
# Pillow tries no other format: some of them start programs (EPS runs Ghostscript).
FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF")
# A progressive JPEG may come in any number of scans of a few bytes, each a pass over the whole
# image. Encoders make some ten; 100 is libtiff's limit, too.
MAX_SCANS = 100
JPEG_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")  # not a byte or restart of a scan
JPEG_START, JPEG_END, JPEG_SCAN = 0xD8, 0xD9, 0xDA
JPEG_SEQUENTIAL = (0xC0, 0xC1, 0xC9)  # of which every scan names every block


@dataclass(frozen=True)
class ImageList:
    """The images of one folder in the form root/CLASS/IMAGE, classes and files in sorted order."""

    root: Path
    classes: list[str]
    samples: list[tuple[str, int]]  # (path, label)


def list_images(
    data_path: str | Path, split: str = "train", flag: str = "--data_path"
) -> ImageList:
    """The images under data_path/split/CLASS/.

    Raises UserError, naming the flag, if a folder is missing, holds no class or a class is empty.
    """
    root = Path(data_path) / split
    if not Path(data_path).is_dir():
        raise UserError(
            f"{flag} {data_path} is not a folder; name the one that holds {split}/CLASS/"
        )
    if not root.is_dir():
        raise UserError(f"{flag} {data_path} has no folder {split!r}; put images in {split}/CLASS/")
    remedy = f"put images in {root}/CLASS/ or remove folders without any"
    with as_user_error(f"{flag} {data_path} ({remedy})", (OSError,)):
        classes, label_of = find_classes(root)
        return ImageList(root, classes, make_dataset(root, label_of, IMG_EXTENSIONS))


def read_image(path: str | Path) -> Image.Image:
    """The image in a file as 8-bit RGB, upright as its EXIF orientation says.

    16-bit grey is scaled to 8 bits, transparent parts are laid on white, other modes are converted.
    Raises UserError, naming the file, if it is damaged, too large (Pillow's MAX_IMAGE_PIXELS), of
    too many scans, no image, or holds numbers without a fixed range (32-bit pixels).
    """
    remedy = "mend or remove it, or pass --skip_bad_images"
    # Pillow's readers meet a damaged file with nearly any exception, so all of them count.
    with as_user_error(f"cannot read image {path} ({remedy})", (Exception,)):
        if not os.path.isfile(path):
            # Opening a pipe would wait for its other end.
            raise FileNotFoundError("there is no regular file of that name")
        with open(path, "rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # at metadata that nobody needs
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(_checked(file), formats=FORMATS) as image:
                ImageOps.exif_transpose(image, in_place=True)
                return _to_rgb(image)


def _checked(file: BinaryIO) -> BinaryIO:
    """The file, from its start; of a JPEG its bytes, read once. Raises ValueError at MAX_SCANS."""
    is_jpeg = file.read(2) == bytes((0xFF, JPEG_START))
    file.seek(0)
    if not is_jpeg:
        return file
    content = file.read()
    _check_scans(content)
    return io.BytesIO(content)


def _check_scans(content: bytes) -> None:
    """Raise ValueError if a JPEG is of more scans than MAX_SCANS."""
    position, scans = 2, 0
    while found := JPEG_MARKER.search(content, position):
        marker, position = content[found.end() - 1], found.end()
        if marker == JPEG_END or marker in JPEG_SEQUENTIAL:
            return
        scans += marker == JPEG_SCAN
        if scans > MAX_SCANS:
            raise ValueError(f"a JPEG of more than {MAX_SCANS} scans would take minutes")
        if marker != JPEG_START:
            position += int.from_bytes(content[position : position + 2], "big")


def _to_rgb(image: Image.Image) -> Image.Image:
    # Pillow reads 16-bit PPM as 32-bit numbers, already scaled to 16 bits.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
        # Pillow's own conversion clips at 255 where it should divide by 257.
        image = Image.fromarray(np.rint(np.asarray(image) / 257).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(
            f"pixels of mode {image.mode} have no fixed range, save it with 8 or 16 bits"
        )
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image if image.mode == "RGB" else image.convert("RGB")


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """The centre square at size x size pixels.

    Halves with a box filter while the shorter side is at least twice the size, then bicubic.
    Raises ValueError if the image is so elongated that it would exceed Pillow's MAX_IMAGE_PIXELS.
    Source: the centre crop of ADM (arXiv 2105.05233).
    """
    while min(image.size) >= 2 * size:
        image = _halve(image)
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    if width * height > Image.MAX_IMAGE_PIXELS:
        raise ValueError(
            f"{image.width} x {image.height} is too elongated to be cropped to a square"
        )
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))


def _halve(image: Image.Image) -> Image.Image:
    """resize() to half of both sides, rounded down, with a box filter, to the bit.

    It works on one axis after the other and rounds after each. Where a side is even, the mean of
    two neighbours is all there is to it, for which Pillow has a faster function.
    """
    width, height, box = image.width // 2, image.height // 2, Image.Resampling.BOX
    odd = image.width % 2
    image = image.resize((width, image.height), box) if odd else image.reduce((2, 1))
    return image.resize((width, height), box) if image.height % 2 else image.reduce((1, 2))


def parse_key(key: Key | int, length: int) -> Key:
    """(index, flip) of a dataset's key, where a plain index is not flipped.

    Raises IndexError if the index is outside a dataset of that length.
    """
    index, flip = key if isinstance(key, tuple) else (key, False)
    return range(length)[index], bool(flip)


class ImageDataset(Dataset):
    """dataset[(index, flip)] -> (image uint8 [3, S, S], label).

    A plain index is the key (index, False). on_bad says what an unreadable image does:
      "raise": a UserError naming the file.
      "next": the next readable image takes its place, its label with it, so that a micro-batch of
        training keeps its size whoever reads it.
      "drop": the item is None, which `collate_skipping` leaves out, so that nothing is cached or
        reconstructed twice.
    Each file passed over is named on stderr once and marked in `bad` [N], which all DataLoader
    workers share with the main process; `bad.sum()` counts them.
    """

    def __init__(
        self,
        samples: list[tuple[str, int]],
        size: int,
        on_bad: Literal["raise", "next", "drop"] = "raise",
    ):
        self.samples = samples
        self.size = size
        self.on_bad = on_bad
        self.bad = torch.zeros(len(samples), dtype=torch.bool).share_memory_()

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: Key | int) -> tuple[Tensor, int] | None:
        index, flip = parse_key(key, len(self))
        if self.on_bad == "raise":
            return self._load(index, flip)
        item = self._try_load(index, flip)
        if item is not None or self.on_bad == "drop":
            return item
        for other in range(index + 1, index + len(self)):
            item = self._try_load(other % len(self), flip)
            if item is not None:
                return item
        raise UserError(f"none of the {len(self)} images can be read; see --data_path")

    def _load(self, index: int, flip: bool) -> tuple[Tensor, int]:
        path, label = self.samples[index]
        image = read_image(path)
        with as_user_error(f"cannot use image {path} (remove it, or pass --skip_bad_images)"):
            pixels = np.asarray(center_crop(image, self.size))  # [S, S, 3]
        own = np.array(pixels[:, ::-1] if flip else pixels)
        return torch.from_numpy(own).permute(2, 0, 1), label

    def _try_load(self, index: int, flip: bool) -> tuple[Tensor, int] | None:
        if self.bad[index]:
            return None
        try:
            return self._load(index, flip)
        except UserError as error:
            self.bad[index] = True
            print(f"skipped: {error}", file=sys.stderr, flush=True)
            return None


def collate_skipping(items: list[tuple[Tensor, int] | None]) -> list[Tensor] | None:
    """[images uint8 [B, 3, S, S], labels] of the items that are not None; None if all are.

    In channels-last memory, as they were decoded: one plain copy, and what the VAE wants.
    """
    readable = [item for item in items if item is not None]
    if not readable:
        return None
    images, labels = zip(*readable, strict=True)
    stacked = torch.stack([image.permute(1, 2, 0) for image in images])
    return [stacked.permute(0, 3, 1, 2), torch.tensor(labels)]


def steps_per_epoch(num_samples: int, batch_size: int, global_micro_batches: int) -> int:
    """Whole global batches in an epoch; what is left over waits for another epoch's order.

    Raises UserError if there are too few samples for a single one.
    """
    global_batch = batch_size * global_micro_batches
    if num_samples < global_batch:
        raise UserError(
            f"{num_samples} samples do not fill one global batch of {global_batch} (--batch_size "
            f"{batch_size} x {global_micro_batches} micro-batches); lower --batch_size"
        )
    return num_samples // global_batch


def epoch_keys(num_samples: int, seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """The order of an epoch's samples and the flip at each position, from (seed, epoch) alone.

    Returns order int64 [N], a permutation, and flips bool [N].
    Made of raw Philox words: numpy promises that these stay as they are in later releases.
    """
    words = np.random.Philox(key=np.array([seed % 2**64, epoch], dtype=np.uint64))
    order = np.argsort(words.random_raw(num_samples), kind="stable")
    flips = (words.random_raw(num_samples) & np.uint64(1)).astype(bool)
    return order, flips


class MicroBatchSampler(Sampler[list[Key]]):
    """This process's micro-batches of num_steps steps from first_step on, as lists of keys.

    With S steps an epoch, B samples a micro-batch and G = global_micro_batches, micro-batch j of
    step s is the B positions from ((s % S) * G + j) * B on in the order of epoch s // S. Process r
    of W has j = r, r + W, ... < G, in this order. flip: whether half of the samples are mirrored.
    Raises UserError if one global batch exceeds the samples; ValueError if W exceeds G.
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        global_micro_batches: int,
        rank: int,
        world_size: int,
        seed: int,
        first_step: int,
        num_steps: int,
        flip: bool = True,
    ):
        if world_size > global_micro_batches:
            raise ValueError(
                f"{world_size} processes cannot share {global_micro_batches} micro-batches"
            )
        self.steps_per_epoch = steps_per_epoch(num_samples, batch_size, global_micro_batches)
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.global_micro_batches = global_micro_batches
        self.mine = range(rank, global_micro_batches, world_size)
        self.seed = seed
        self.flip = flip
        self.steps = range(first_step, first_step + num_steps)
        self._epoch = None  # whose order is at hand

    def __len__(self) -> int:
        return len(self.steps) * len(self.mine)

    def __iter__(self) -> Iterator[list[Key]]:
        return (self.keys(step, j) for step in self.steps for j in self.mine)

    def keys(self, step: int, j: int) -> list[Key]:
        """What micro-batch j of a step holds."""
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch = epoch
            self._order, self._flips = epoch_keys(self.num_samples, self.seed, epoch)
            self._flips &= self.flip
        start = (step_in_epoch * self.global_micro_batches + j) * self.batch_size
        chosen = slice(start, start + self.batch_size)
        return list(zip(self._order[chosen].tolist(), self._flips[chosen].tolist(), strict=True))
