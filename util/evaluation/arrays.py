"""npz files of others: statistics, features and images. Nothing in them is unpickled.

What is wrong with a file is told by an exception of any kind: callers catch all and name the file.
"""

import io
import math
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from util.files import listed, what_else


@contextmanager
def open_npz(path: str | Path) -> Iterator[zipfile.ZipFile]:
    try:
        archive = zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise ValueError(f"this is {what_else(Path(path)) or f'damaged ({error})'}") from error
    with archive:
        yield archive


def read_npz(path: str | Path, names: Iterable[str]) -> dict[str, np.ndarray]:
    """Those arrays of these names that are there; no others are read."""
    # Each entry is read to its end, where zipfile compares the checksum.
    with open_npz(path) as archive:
        there = [name for name in names if f"{name}.npy" in archive.namelist()]
        entries = {name: io.BytesIO(archive.read(f"{name}.npy")) for name in there}
    return {name: np.load(entry, allow_pickle=False) for name, entry in entries.items()}


@dataclass(frozen=True)
class ImageArray:
    """The images of an npz file as ADM's evaluator takes them: arr_0, uint8 [N, H, W, 3].

    [N, 3, H, W], too. Such files may be larger than memory, so a batch is read at a time.
    """

    path: Path
    shape: tuple[int, ...]

    @classmethod
    def of(cls, path: str | Path) -> "ImageArray":
        with _opened_images(path) as (_, shape):
            return cls(Path(path), shape)

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def side(self) -> int:
        """The shorter one."""
        return min(self.shape[1:3] if self.shape[3] == 3 else self.shape[2:])

    def batches(self, batches: list[range], chosen: Iterable[int]) -> Iterator[np.ndarray]:
        """uint8 [n, H, W, 3] of those numbers of batches, which cover the array, in their order."""
        numbers, size = set(chosen), math.prod(self.shape[1:])
        with _opened_images(self.path) as (file, _):
            for number, ids in enumerate(batches):
                content = file.read(len(ids) * size)  # at its end zipfile compares the checksum
                if number in numbers:
                    images = np.frombuffer(content, np.uint8).reshape(len(ids), *self.shape[1:])
                    yield images if self.shape[3] == 3 else images.transpose(0, 2, 3, 1)


@contextmanager
def _opened_images(path: str | Path) -> Iterator[tuple[BinaryIO, tuple[int, ...]]]:
    """The file at the first pixel of arr_0, and the array's shape."""
    with open_npz(path) as archive:
        if "arr_0.npy" not in archive.namelist():
            raise ValueError(f"it has no arr_0, but {listed(archive.namelist())}")
        with archive.open("arr_0.npy") as file:
            version = np.lib.format.read_magic(file)
            read_header = getattr(np.lib.format, "read_array_header_{}_{}".format(*version))
            shape, is_fortran, dtype = read_header(file)
            if dtype.hasobject:
                raise ValueError("it holds Python objects, which are never unpickled")
            if len(shape) != 4 or dtype != np.uint8 or is_fortran or 3 not in (shape[1], shape[3]):
                raise ValueError(f"arr_0 is {dtype} {shape}, not uint8 [N, H, W, 3]")
            yield file, shape
