"""npy and npz files that nobody vouches for: no pickle, no size believed, every checksum read.

numpy's own readers allocate what a header claims before they find the file short, and where it
claims less than there is, they stop before the checksum of a zip entry. Here a header must account
for every byte. What is wrong with a file is told by an exception of any kind, as zipfile and numpy
do too: callers catch them all and name the file.
"""

import io
import math
import mmap
import os
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from util.files import listed, what_else

try:
    import resource
except ImportError:  # not a Unix, which has no such limit
    resource = None

MAX_IMAGE_BYTES = 1 << 26  # of one image in an array: 4,096 px
SPARE_FILES = 512  # for data loaders, sockets, logs and libraries
_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


def open_regular(path: str | Path) -> BinaryIO:
    """Open a file for reading, unbuffered. Opening a pipe would wait for its other end."""
    if not os.path.isfile(path):
        raise FileNotFoundError("there is no regular file of that name")
    return open(path, "rb", buffering=0)


def map_npy(path: str | Path) -> np.ndarray:
    """The array of an npy file, mapped into memory: read where it is touched, never written.

    As long as it lives it takes one of the process's open files.
    """
    with open_regular(path) as file:
        shape, dtype, order = _read_header(file, os.fstat(file.fileno()).st_size)
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return np.ndarray(shape, dtype, mapped, offset=file.tell(), order=order)


def allow_open_files(count: int) -> None:
    """Let this process map that many files, beside those it has open and may need.

    Raises ValueError if the system does not allow as many.
    """
    if resource is None:
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed, unlimited = count + SPARE_FILES, resource.RLIM_INFINITY
    if soft == unlimited or soft >= needed:
        return
    if hard != unlimited and hard < needed:
        raise ValueError(f"{count} files must be open at once, ulimit -n allows {hard}; raise it")
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def read_npz(path: str | Path, names: Iterable[str], max_bytes: int) -> dict[str, np.ndarray]:
    """Those arrays of these names that are there, each of at most max_bytes; no others are read."""
    with open_regular(path) as file, _zip_archive(file, path) as archive:
        there = set(archive.namelist())
        wanted = [name for name in names if f"{name}.npy" in there]
        return {name: _read_entry(archive, f"{name}.npy", max_bytes) for name in wanted}


def _zip_archive(file: BinaryIO, path: str | Path) -> zipfile.ZipFile:
    """Raises ValueError, saying what the file is, where it is no zip archive."""
    try:
        return zipfile.ZipFile(file)
    except zipfile.BadZipFile as error:
        raise ValueError(f"this is {what_else(Path(path)) or f'damaged ({error})'}") from error


def _read_entry(archive: zipfile.ZipFile, name: str, max_bytes: int) -> np.ndarray:
    entry = _checked_entry(archive, name)
    if entry.file_size > max_bytes:
        raise ValueError(f"{name} unpacks to more than {max_bytes} bytes")
    with archive.open(entry) as file:
        content = file.read(entry.file_size)  # to its end, where zipfile compares the checksum
    if len(content) != entry.file_size:
        raise ValueError(f"{name} ends after {len(content)} bytes of {entry.file_size}")
    file = io.BytesIO(content)
    shape, dtype, order = _read_header(file, len(content))
    return np.ndarray(shape, dtype, content, offset=file.tell(), order=order)


def _checked_entry(archive: zipfile.ZipFile, name: str) -> zipfile.ZipInfo:
    """As numpy writes it; other methods unpack a whole block before its size can be seen."""
    entry = archive.getinfo(name)
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"{name} is compressed by method {entry.compress_type}")
    return entry


@dataclass(frozen=True)
class ImageArray:
    """The images of an npz file as ADM's evaluator takes them: arr_0, uint8 [N, H, W, 3].

    [N, 3, H, W] is read as well. Such files may be larger than memory, so they are read once
    through, a batch at a time.
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
        """The shorter one, in pixels."""
        return min(self.shape[1:3] if self.shape[3] == 3 else self.shape[2:])

    def batches(self, batches: list[range], wanted: Iterable[int]) -> Iterator[np.ndarray]:
        """uint8 [n, H, W, 3] of those numbers of batches, which cover the array, in their order."""
        wanted, size = set(wanted), math.prod(self.shape[1:])
        with _opened_images(self.path) as (file, _):
            for number, ids in enumerate(batches):
                content = file.read(len(ids) * size)  # at its end zipfile compares the checksum
                if len(content) != len(ids) * size:
                    raise ValueError(f"arr_0 ends within batch {number}")
                if number in wanted:
                    images = np.frombuffer(content, np.uint8).reshape(len(ids), *self.shape[1:])
                    yield images if self.shape[3] == 3 else images.transpose(0, 2, 3, 1)


@contextmanager
def _opened_images(path: str | Path) -> Iterator[tuple[BinaryIO, tuple[int, ...]]]:
    """The file at the first pixel of arr_0, and the array's shape."""
    with open_regular(path) as raw, _zip_archive(raw, path) as archive:
        if "arr_0.npy" not in archive.namelist():
            raise ValueError(f"it has no arr_0, but {listed(archive.namelist())}")
        entry = _checked_entry(archive, "arr_0.npy")
        with archive.open(entry) as file:
            shape, dtype, order = _read_header(file, entry.file_size)
            colours = len(shape) == 4 and 3 in (shape[3], shape[1])
            if dtype != np.uint8 or order == "F" or not colours or not shape[0]:
                raise ValueError(f"arr_0 is {dtype} {shape}, not uint8 [N, H, W, 3]")
            if math.prod(shape[1:]) > MAX_IMAGE_BYTES:
                raise ValueError(f"one image of arr_0 takes more than {MAX_IMAGE_BYTES} bytes")
            yield file, shape


def _read_header(file: BinaryIO, size: int) -> tuple[tuple[int, ...], np.dtype, str]:
    """Shape, dtype and order of the array that fills the rest of a file of that size."""
    version = np.lib.format.read_magic(file)
    if version not in _HEADERS:
        raise ValueError(f"npy version {version} is unknown")
    shape, fortran_order, dtype = _HEADERS[version](file)
    if dtype.hasobject:
        raise ValueError("it holds Python objects, which are never unpickled")
    claimed, there = math.prod(shape) * dtype.itemsize, size - file.tell()
    if claimed != there or min(shape, default=0) < 0:
        raise ValueError(f"{dtype} {shape} takes {claimed} bytes, but {there} are there")
    return shape, dtype, "F" if fortran_order else "C"
