"""Files that are whole or absent, folders that one job has, and reading tensors without running
what a file holds.

The lock of a folder is kept by hand: `filelock` uses flock, which a forked loader worker of a
killed run keeps. A POSIX record lock is its holder's alone, and ends with it.
"""

import argparse
import fcntl
import hashlib
import os
import re
import secrets
import socket
import sys
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import numpy as np
import safetensors.torch
import torch
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from util.errors import UserError, as_user_error

LOCK = ".lock"
ESCAPES = re.compile(r"\x1b\[[0-9;]*m")  # colours and bold of a terminal
MOST_NAMES = 5  # that a message lists
DIRECTORY = 0x10  # among a zip record's attributes
# How files begin that are something else, and what to do.
BEGINNINGS = {
    b"version https://git-lfs": "a git-LFS pointer; git lfs pull fetches the file",
    b"<": "a web page; its address may ask for a login, so fetch the file in a browser",
    b"\x1f\x8b": "a packed archive; unpack it and name the file inside",
}


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
        flush(path.parent)


def flush(path: Path) -> None:
    """Put a file's content, or the names in a folder, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
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


@contextmanager
def only_job_in(folder: str | Path, flag: str) -> Iterator[None]:
    """Hold the folder's lock; the folder is made if need be, and removed if it stays empty.

    Raises UserError, naming the flag, if another job holds it or the folder cannot be written to.
    """
    folder = Path(folder)
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    with as_user_error(f"{flag} {folder}: cannot write", (OSError,)):
        folder.mkdir(parents=True, exist_ok=True)
        lock = _locked(folder, f"{flag} {folder}")
    try:
        yield
    finally:
        with suppress(OSError):
            os.unlink(folder / LOCK)  # while it is held
        lock.close()
        with suppress(OSError):  # not empty
            for place in made:
                place.rmdir()


def _locked(folder: Path, where: str) -> BinaryIO:
    """The open file .lock, which says who holds it and is locked until it is closed."""
    file = open(folder / LOCK, "a+b", buffering=0)  # noqa: SIM115
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = shown(file.read(100).decode(errors="replace")) or "starting"
        file.close()
        raise UserError(f"{where} is in use by another job ({holder}); wait for it") from None
    except OSError as error:
        why = f"this file system has no locks ({error.strerror})"
        print(f"warning: {where}: {why}; start no second job there", file=sys.stderr)
    with suppress(FileNotFoundError):
        if os.path.samestat(os.fstat(file.fileno()), os.stat(folder / LOCK)):
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
            return file
    file.close()  # its last holder has removed it meanwhile
    return _locked(folder, where)


class PassedOver:
    """Stands for a type of another library: items stay, nothing of the type is ever run."""

    def __new__(cls, *args, **kwargs) -> OrderedDict:
        return OrderedDict()


NUMPY = ("numpy.core.multiarray", "numpy._core.multiarray")  # moved between releases
# What may stand beside tensors: types that are nothing but their value.
PLAIN_TYPES = [
    *(argparse.Namespace, dict, list, tuple, str, int, float, bool),
    *(np.ndarray, np.dtype, *{type(np.dtype(kind)) for kind in "?bhilqBHILQefdgFDSUMm"}),
    *((np.float64(0).__reduce__()[0], f"{home}.scalar") for home in NUMPY),
    *((np.zeros(1).__reduce__()[0], f"{home}._reconstruct") for home in NUMPY),
    *((PurePosixPath, f"pathlib.{local}PosixPath") for local in ("", "_local.")),
    (str, "torch.torch_version.TorchVersion"),
    (PassedOver, "collections.defaultdict"),
]
# Of training frameworks, whose files hold them beside the tensors.
PASSED_OVER = re.compile(r"(pytorch_lightning|lightning\w*|omegaconf|typing)\.")


def load_tensors(path: str | Path, flag: str, wide: bool = False) -> dict:
    """Read a dict of tensors and plain values; nothing in the file is ever executed.

    wide: also safetensors, and files of PyTorch Lightning and OmegaConf. False where another
    library unpickles the file after this check.
    Raises UserError, naming the flag, on a file that is missing, damaged, or not such a dict.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{flag} {path}: {'a folder, not a' if path.is_dir() else 'no such'} file")
    try:
        if other := what_else(path):
            raise UserError(f"this is {other}")
        saved = _read(path, wide)
        if not isinstance(saved, dict):
            raise UserError(f"holds a {type(saved).__name__}, not a dict of tensors")
        return saved
    except Exception as error:  # a damaged file can make the reader fail in any way
        reason = error if isinstance(error, UserError) else _what_failed(error)
        raise UserError(f"{flag} {path}: {reason}") from error


def _read(path: Path, wide: bool) -> object:
    if wide and path.suffix == ".safetensors":
        return safetensors.torch.load_file(path)
    passed_over = []
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for record in archive.infolist():
                stored = (record.compress_type, record.file_size) == (0, record.compress_size)
                if not stored or record.external_attr & DIRECTORY:  # torch would leave memory as is
                    raise ValueError(f"{record.filename} is compressed or marked as a folder")
            if wrong := archive.testzip():  # compares the checksums (CRC-32), which torch does not
                raise ValueError(f"wrong checksum of {wrong}")
        asked = get_unsafe_globals_in_checkpoint(path) if wide else ()
        passed_over = [(PassedOver, name) for name in asked if PASSED_OVER.match(name)]
    with safe_globals([*PLAIN_TYPES, *passed_over]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what torch wonders about in a damaged file
        return torch.load(path, map_location="cpu", weights_only=True)


def what_else(path: Path) -> str:
    """What a file is by its beginning that holds no tensors, and the remedy; "" if it may."""
    with open(path, "rb") as file:
        head = file.read(100).lstrip()
    return next((other for start, other in BEGINNINGS.items() if head.startswith(start)), "")


def _what_failed(error: Exception) -> str:
    """What a reader says, without its advice and a terminal's escape codes, and the remedy."""
    message = ESCAPES.sub("", str(error)).rpartition("WeightsUnpickler error: ")[2].strip()
    asked = re.search(r"GLOBAL (\S+) (?:was not|whose)|Can only build .* got (.+)", message)
    if asked is not None:
        return (
            f"holds {(asked[1] or asked[2])[:100]}, which is not read, since reading it may run "
            "code; where you trust the file, save its state dicts alone"
        )
    reason = (message or type(error).__name__).splitlines()[0][:120]
    return f"damaged, or not written by torch.save ({reason}); fetch or save it again"


def shown(name: str | Path) -> str:
    """A name as a message has it: in one line, without control codes, whatever is in it."""
    return str(name) if str(name).isprintable() else repr(str(name))


def listed(names: Iterable) -> str:
    """A handful of names, and how many more there are."""
    names = [shown(str(name)[:80]) for name in names]
    more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return ", ".join(names[:MOST_NAMES]) + more if names else "nothing"


def unwrapped(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict without what DistributedDataParallel (module.) and torch.compile (_orig_mod.)
    put into its names. Raises ValueError where two names become one.
    """
    wrappers = r"^((module|_orig_mod)\.)+|(?<=\.)_orig_mod\."
    bare = {re.sub(wrappers, "", str(name)): tensor for name, tensor in state.items()}
    if len(bare) < len(state):
        raise ValueError("it has tensors with and without module. or _orig_mod.; keep one set")
    return bare
