"""Files that are whole or absent, and reading tensors without running what a file holds."""

import argparse
import hashlib
import io
import os
import secrets
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import torch

from util.errors import UserError
from util.stop import Stopped

DIRECTORY = 0x10  # among a zip record's attributes


@contextmanager
def atomic_write(path: str | Path, durable: bool = True) -> Iterator[BinaryIO]:
    """A file to write to that takes its name only when it is complete and on the disk.

    Whatever interrupts the writing, `path` holds the old content or the new, never a part.
    durable: wait for the disk; without it a power cut may lose the file, but a kill does not.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            if durable:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    if durable:
        flush_folder(path.parent)


def flush_file(path: Path) -> None:
    """Put a file that something else has written on the disk."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def flush_folder(folder: Path) -> None:
    """Put the new name itself on the disk; where folders cannot be opened, the system does it."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def check_writable(folder: str | Path, flag: str) -> None:
    """Raise UserError, naming the flag, unless files can be put into a folder, made if need be."""
    path = Path(folder).absolute()
    existing = next(place for place in (path, *path.parents) if place.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise UserError(f"{flag} {folder}: cannot write into {existing}")


def sha256(path: str | Path) -> str:
    """Hexadecimal digest of a file's content."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def checked_archive(path: Path) -> Path | BinaryIO:
    """The file for torch.load, once the checksum (CRC-32) of each record, which torch does not
    compare, is right.

    Files of torch before 1.6 are no zip archives and have none. They come as their bytes, beyond
    which a damaged length in them cannot make the reader reserve memory.
    """
    if not zipfile.is_zipfile(path):
        return io.BytesIO(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        for record in archive.infolist():
            stored = record.compress_type == zipfile.ZIP_STORED
            if not stored or record.file_size != record.compress_size:
                raise ValueError(f"{record.filename} is compressed, which torch.save never does")
            if record.external_attr & DIRECTORY:  # torch would leave its memory as it finds it
                raise ValueError(f"{record.filename} is marked as a folder")
        damaged = archive.testzip()
    if damaged is not None:
        raise ValueError(f"wrong checksum of {damaged}")
    return path


def load_tensors(path: str | Path, flag: str) -> dict:
    """Read a dict of tensors and plain values; nothing in the file is ever executed.

    MAR's checkpoints hold an argparse.Namespace, which is plain data and allowed.
    Raises UserError, naming the flag, on a file that is missing, damaged, or not such a dict.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{flag} {path}: no such file")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what torch wonders about in a damaged file
            saved = torch.load(checked_archive(path), map_location="cpu", weights_only=True)
    except Stopped:
        raise
    except Exception as error:  # a damaged file can make the reader fail in any way
        reason = str(error).strip().splitlines()[0][:120] if str(error).strip() else ""
        raise UserError(
            f"{flag} {path}: damaged, or not a plain file of tensors "
            f"({type(error).__name__}: {reason}); fetch or save it again"
        ) from error
    if not isinstance(saved, dict):
        raise UserError(f"{flag} {path}: holds a {type(saved).__name__}, not a dict of tensors")
    return saved
