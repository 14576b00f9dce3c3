"""Features of images, batch by batch: files of them that a restart finds, and folders of images.

A batch is a fixed range of image numbers, whoever works on it. Its features are one file, whole
or absent; what is there already is not done again, on whatever number of processes.
Letters: N images, D features, S side in pixels.
"""

import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from util import dist
from util.data.arrays import ImageArray, read_npz
from util.data.images import (
    LOADING,
    ImageDataset,
    Loading,
    center_crop,
    collate_skipping,
    open_image,
)
from util.errors import UserError, as_user_error
from util.evaluation.extractor import Extractor
from util.files import atomic_write
from util.stop import Stopped

SHARED_WAIT = 60.0  # seconds until a file of another node is seen on a network file system
LOOKED_AT = 1000  # images of a folder whose size is looked at


def batch_ranges(count: int, batch_size: int) -> list[range]:
    """Image numbers 0..count-1 in batches of fixed composition."""
    starts = range(0, count, batch_size)
    return [range(start, min(start + batch_size, count)) for start in starts]


@dataclass(frozen=True)
class FeatureStore:
    """A folder with one npz file a batch: ids [n] and the features of each layer [n, D]."""

    folder: Path

    def path(self, number: int) -> Path:
        return self.folder / f"batch-{number:06d}.npz"

    def missing(self, batches: Iterable[int]) -> set[int]:
        """Those numbers of batches that have no file."""
        found = {path.name for path in self.folder.glob("batch-*.npz")}
        return {number for number in batches if self.path(number).name not in found}

    def write(self, number: int, ids: list[int], features: dict[str, Tensor]) -> None:
        """features: {layer: [n, D]} of the images of those numbers."""
        arrays = {layer: tensor.numpy() for layer, tensor in features.items()}
        with atomic_write(self.path(number)) as file:
            np.savez(file, ids=np.array(ids, dtype=np.int64), **arrays)

    def load(self, batches: list[range]) -> dict[str, Tensor]:
        """{layer: [N, D]} of all batches in the order of image numbers.

        Raises UserError if a file is missing or not that of its batch.
        """
        wait_for([self.path(number) for number in range(len(batches))])
        parts = [self._read(number, ids) for number, ids in enumerate(batches)]
        parts = [part for part in parts if part]  # a batch may hold unreadable images alone
        if not parts:
            raise UserError(f"{self.folder}: none of the images could be read")
        return {layer: torch.cat([part[layer] for part in parts]) for layer in parts[0]}

    def _read(self, number: int, ids: range) -> dict[str, Tensor]:
        path = self.path(number)
        with _told_if_damaged(path), np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
            stored = arrays.pop("ids").tolist()
        if not set(stored) <= set(ids):
            raise UserError(f"{path} is not of images {ids.start} to {ids.stop - 1}; remove it")
        return {layer: torch.from_numpy(array) for layer, array in arrays.items()}

    def ids(self, number: int) -> list[int]:
        """Numbers of the images in a batch's file: all that could be read."""
        path = self.path(number)
        with _told_if_damaged(path):
            return read_npz(path, ["ids"])["ids"].tolist()


def _told_if_damaged(path: Path) -> AbstractContextManager:
    """A damaged file can make its reader fail in any way."""
    return as_user_error(f"{path} is damaged, remove it and start again", (Exception,))


def wait_for(paths: list[Path], seconds: float = SHARED_WAIT) -> None:
    """Until this process sees files that others have written.

    Raises UserError if they do not appear: the processes do not share the folder.
    """
    deadline = time.monotonic() + seconds
    while missing := [path for path in paths if not path.exists()]:
        if time.monotonic() > deadline:
            raise UserError(
                f"{missing[0]}, which another process wrote, is not here (missing: {len(missing)} "
                "files); --output_dir must be one folder that all nodes share"
            )
        time.sleep(0.5)


def folder_batches(
    files: list[Path] | ImageArray,
    size: int,
    batches: list[range],
    wanted: Iterable[int],
    loading: Loading = LOADING,
) -> Iterator[tuple[int, list[int], Tensor]]:
    """(number, ids, images uint8 [n, 3, S, S]) of this process's share of the wanted batches.

    Images are cropped as the training's are.
    """
    mine = sorted(wanted)[dist.rank() :: dist.world_size()]
    if isinstance(files, ImageArray):
        yield from _array_batches(files, size, batches, mine)
        return
    on_bad = "drop" if loading.skip_bad else "raise"
    dataset = ImageDataset([(str(f), 0) for f in files], size, on_bad, loading.max_pixels)
    loader = DataLoader(
        dataset,
        batch_sampler=[list(batches[number]) for number in mine],
        num_workers=loading.num_workers,
        collate_fn=collate_skipping,
        generator=torch.Generator(),  # else it would draw from the global one, which is training's
    )
    progress = tqdm(loader, desc="real images", disable=not (mine and dist.is_main()))
    for number, batch in zip(mine, progress, strict=True):
        kept = [i for i in batches[number] if not dataset.bad[i]]
        yield number, kept, batch[0] if batch else torch.empty(0, 3, size, size, dtype=torch.uint8)


def _array_batches(
    array: ImageArray, size: int, batches: list[range], mine: list[int]
) -> Iterator[tuple[int, list[int], Tensor]]:
    """Those batches of an npz file, cropped as files are."""
    with as_user_error(f"{array.path} is damaged", (Exception,)):
        parts = array.batches(batches, mine)
        hidden = not (mine and dist.is_main())
        parts = tqdm(parts, desc="real images", total=len(mine), disable=hidden)
        for number, images in zip(mine, parts, strict=True):
            crops = [np.array(center_crop(Image.fromarray(image), size)) for image in images]
            yield number, list(batches[number]), torch.from_numpy(np.stack(crops)).movedim(3, 1)


def folder_features(
    extractor: Extractor,
    files: list[Path] | ImageArray,
    size: int,
    store: FeatureStore,
    batch_size: int,
    loading: Loading = LOADING,
) -> dict[str, Tensor] | None:
    """{layer: [N, D]} of a folder's images, made by all processes; on the main one, else None."""
    batches = batch_ranges(len(files), batch_size)
    store.folder.mkdir(parents=True, exist_ok=True)
    for unfinished in store.folder.glob(".*.tmp") if dist.is_main() else ():
        unfinished.unlink()  # of a process that was killed
    missing = dist.gather_objects(store.missing(range(len(batches))))[0]  # as the main one sees it
    shares = folder_batches(files, size, batches, missing, loading)
    for number, ids, images in shares:
        dist.beat(f"features of batch {number + 1} of {len(batches)} of real images")
        store.write(number, ids, extractor(images) if ids else {})
    dist.barrier()
    return store.load(batches) if dist.is_main() else None


def upsampled(files: list[Path] | ImageArray, size: int) -> str | None:
    """In words, how many images are smaller than S, of those looked at; or None."""
    if isinstance(files, ImageArray):
        sides = [files.side] * len(files)
    else:
        sides = [_shorter_side(path) for path in files[:: max(1, len(files) // LOOKED_AT)]]
    smaller = sum(side < size for side in sides)
    if not smaller:
        return None
    return f"{smaller} of {len(sides)} images looked at are smaller than {size} px"


def _shorter_side(path: Path) -> int:
    try:
        with open_image(path) as image:
            return min(image.size)
    except Stopped:
        raise
    except Exception:
        return 2**31  # reading it in full says what is wrong with it
