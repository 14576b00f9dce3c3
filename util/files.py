"""Files that are whole or absent, folders that one job has, and reading tensors without running
what a file holds.

The lock of a folder is kept by hand: `filelock` uses flock, which a forked loader worker of a
killed run keeps. A POSIX record lock is its holder's alone, and ends with it.
"""

import argparse
import datetime
import errno
import fcntl
import hashlib
import io
import os
import pickletools
import re
import secrets
import socket
import sys
import types
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import BinaryIO

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from util.errors import UserError, as_user_error
from util.stop import Stopped

LOCK = ".lock"
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)  # on this file system
ESCAPES = re.compile(r"\x1b\[[0-9;]*m")  # colours and bold of a terminal
MOST_NAMES = 5  # that a message lists
DIRECTORY = 0x10  # among a zip record's attributes
TORCH_PICKLE = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19"  # how files of torch before 1.6 begin
PACKED = "a packed archive; unpack it and name the file inside"
# How files begin that are something else, and what to do.
BEGINNINGS = {
    b"version https://git-lfs": "a git-LFS pointer, not the file; git lfs pull fetches the file",
    **dict.fromkeys((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd"), PACKED),
    b"<": "a web page, not the file: its address asks for a login or a confirmation; fetch it in "
    "a browser, or by the site's own program",
    TORCH_PICKLE: None,
    b"\x80": "a pickle that torch.save did not write, and not read, since reading one may run "
    "code; where you trust it, save its tensors by torch.save",
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
        flush_folder(path.parent)


def flush_file(path: Path) -> None:
    """Put on the disk what something else has written to a file, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


flush_folder = flush_file


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
    A file system without locks is said once, and the work goes on.
    """
    folder = Path(folder)
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    with as_user_error(f"{flag} {folder}: cannot write", (OSError,)):
        folder.mkdir(parents=True, exist_ok=True)
        lock = _locked(folder, flag, "a+b")
    try:
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
        yield
    finally:
        with suppress(OSError):
            os.unlink(folder / LOCK)  # while it is held: see _locked
        lock.close()
        with suppress(OSError):  # not empty
            for place in made:
                place.rmdir()


def refuse_busy(folder: str | Path, flag: str) -> None:
    """Raise UserError, naming the flag, if another job holds the folder's lock now.

    Early, before its files are read, which the other job replaces and removes; nothing is made.
    """
    missing = suppress(FileNotFoundError, NotADirectoryError)
    with as_user_error(f"{flag} {folder}: cannot write", (OSError,)), missing:
        _locked(Path(folder), flag, "r+b").close()


def _locked(folder: Path, flag: str, mode: str) -> BinaryIO:
    """The open file .lock, which holds the lock until it is closed."""
    file = open(folder / LOCK, mode, buffering=0)  # noqa: SIM115
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            file.seek(0)
            holder = shown(file.read(100).decode(errors="replace")) or "starting"
            file.close()
            raise UserError(
                f"{flag} {folder} is in use by another job ({holder}); wait for it or stop it"
            ) from None
        if error.errno not in NO_LOCKS:
            raise
        why = f"this file system has no locks ({error.strerror})"
        print(f"warning: {flag} {folder}: {why}; start no second job there", file=sys.stderr)
    with suppress(FileNotFoundError):
        if os.path.samestat(os.fstat(file.fileno()), os.stat(folder / LOCK)):
            return file
    file.close()  # its last holder has removed it meanwhile
    return _locked(folder, flag, mode)


class PassedOver:
    """Stands for a type of another library: items stay, nothing of the type is ever run."""

    def __new__(cls, *args, **kwargs) -> OrderedDict:
        return OrderedDict()


NUMPY = ("numpy.core.multiarray", "numpy._core.multiarray")  # moved between releases
PATHS = [f"{home}.{pure}" for home in ("pathlib", "pathlib._local") for pure in ("", "Pure")]
# What may stand beside tensors: types that are nothing but their value.
PLAIN_TYPES = [
    *(argparse.Namespace, types.SimpleNamespace, dict, list, tuple, str, int, float, bool),
    *(datetime.datetime, datetime.date, datetime.time, datetime.timedelta, datetime.timezone),
    *(np.ndarray, np.dtype, *{type(np.dtype(kind)) for kind in "?bhilqBHILQefdgFDSUMm"}),
    *((np.float64(0).__reduce__()[0], f"{home}.scalar") for home in NUMPY),
    *((np.zeros(1).__reduce__()[0], f"{home}._reconstruct") for home in NUMPY),
    *((PurePosixPath, f"{path}PosixPath") for path in PATHS),
    *((PureWindowsPath, f"{path}WindowsPath") for path in PATHS),
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
        if other := what_else(path, wide):
            raise UserError(f"this is {other}")
        saved = _read(path, wide)
        if not isinstance(saved, dict):
            raise UserError(f"holds a {type(saved).__name__}, not a dict of tensors")
        return saved
    except Stopped:
        raise
    except Exception as error:  # a damaged file can make the reader fail in any way
        reason = error if isinstance(error, UserError) else _what_failed(error)
        raise UserError(f"{flag} {path}: {reason}") from error


def _read(path: Path, wide: bool) -> object:
    if is_safetensors(path):
        return safetensors.torch.load_file(path)
    if not zipfile.is_zipfile(path):  # of torch before 1.6; a wrong length ends with the bytes
        return _load(io.BytesIO(path.read_bytes()))
    with zipfile.ZipFile(path) as archive:
        for record in archive.infolist():
            stored = (record.compress_type, record.file_size) == (0, record.compress_size)
            if not stored or record.external_attr & DIRECTORY:  # torch would not fill its memory
                raise ValueError(f"{record.filename} is compressed or marked as a folder")
        if damaged := archive.testzip():  # compares the checksums (CRC-32), which torch does not
            raise ValueError(f"wrong checksum of {damaged}")
        (pickled,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
        steps = pickletools.genops(archive.read(pickled)) if wide else ()
        # Types and functions that it asks for; none is looked up.
        asked = {text.replace(" ", ".") for step, text, _ in steps if step.name == "GLOBAL"}
    return _load(path, [(PassedOver, name) for name in asked if PASSED_OVER.match(name)])


def _load(file: Path | BinaryIO, more: Iterable = ()) -> object:
    with torch.serialization.safe_globals([*PLAIN_TYPES, *more]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what torch wonders about in a damaged file
        return torch.load(file, map_location="cpu", weights_only=True)


def what_else(path: Path, wide: bool = False) -> str | None:
    """What a file is that is no file of torch.save, and the remedy; None if it may be one."""
    with open(path, "rb") as file:
        head = file.read(512)
    if is_safetensors(path):
        return None if wide else "a file of safetensors; here one of torch.save is read"
    if head.startswith(b"PK\x03\x04"):
        return _other_zip(path)
    if head[257:262] == b"ustar":
        return PACKED
    for start, other in BEGINNINGS.items():
        if head.lstrip().startswith(start):
            return other
    text = " ".join(head.decode("latin-1").split())
    if text and text.isascii() and text.isprintable():
        return f"text, not tensors ({text[:60]!r}...), perhaps a server's answer; fetch it again"
    return None


def _other_zip(path: Path) -> str | None:
    if not zipfile.is_zipfile(path):
        raise ValueError(f"its end is missing, {path.stat().st_size} bytes are there")
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    if any(name.endswith("/constants.pkl") for name in names):
        return "a TorchScript program, which is not run; save the state_dict() of its model"
    if any(name.endswith("/data.pkl") for name in names):
        return None
    return f"a zip archive of {listed(names)}, not a file of torch.save"


def is_safetensors(path: Path) -> bool:
    """By its beginning: the length of a header, which is JSON."""
    with open(path, "rb") as file:
        head = file.read(9)
    return head[8:] == b"{" and int.from_bytes(head[:8], "little") < path.stat().st_size


def _what_failed(error: Exception) -> str:
    """What a reader says, without its advice and a terminal's escape codes, and the remedy."""
    message = ESCAPES.sub("", str(error)).rpartition("WeightsUnpickler error: ")[2].strip()
    asked = re.search(r"GLOBAL (\S+) (?:was not|whose)|Can only build .* got (.+)", message)
    if asked is not None:
        return (
            f"holds {(asked[1] or asked[2])[:100]}, which is not read, since reading it may run "
            "code; where you trust the file, save its state dicts alone"
        )
    if message.startswith("Unsupported operand 149"):  # of pickle's protocol 4
        return "is pickled in another form than torch.save's own; save it again by torch.save alone"
    reason = message.splitlines()[0][:120] if message else "it is empty, or its end is missing"
    return f"damaged ({reason}); fetch or save it again"


def shown(name: str | Path) -> str:
    """A name as a message has it: in one line, without control codes, whatever is in it."""
    return str(name) if str(name).isprintable() else repr(str(name))


def listed(names: Iterable) -> str:
    """A handful of names, and how many more there are."""
    names = [shown(str(name)[:80]) for name in names]
    more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return ", ".join(names[:MOST_NAMES]) + more if names else "nothing"


def unwrapped(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """A state dict without what DistributedDataParallel (module.) and torch.compile (_orig_mod.)
    put into its names, and what was stripped. Raises ValueError where two names become one.
    """
    names, stripped = [str(name) for name in state], []
    for prefix, where in {
        "_orig_mod.": r"(?:^|(?<=\.))_orig_mod\.",
        "module.": r"^(module\.)+",
    }.items():
        before, names = names, [re.sub(where, "", name) for name in names]
        stripped += [prefix] if names != before else []
    bare = dict(zip(names, state.values(), strict=True))
    if len(bare) < len(state):
        raise ValueError(f"it has tensors with and without {' and '.join(stripped)}; keep one set")
    return bare, " and ".join(stripped)
