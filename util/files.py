"""Files that are whole or absent, and reading tensors without running what a file holds."""

import argparse
import datetime
import hashlib
import io
import os
import pathlib
import pickle
import pickletools
import re
import secrets
import types
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from util.errors import UserError
from util.stop import Stopped

DIRECTORY = 0x10  # among a zip record's attributes
ESCAPES = re.compile(r"\x1b\[[0-9;]*m")  # colours and bold of a terminal
MOST_NAMES = 5  # that a message lists
TORCH_PICKLE = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19"  # how files of torch before 1.6 begin
# How files begin that are something else, and what to do.
BEGINNINGS = {
    b"version https://git-lfs": "a git-LFS pointer, not the file; git lfs pull fetches the file",
    **dict.fromkeys(
        (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd", b"7z\xbc\xaf", b"Rar!"),
        "a packed archive; unpack it and name the file inside",
    ),
    b"\x89HDF": "an HDF5 file, as Keras writes, not one of torch.save",
    b"\x93NUMPY": "an array of NumPy, not a file of torch.save",
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


class PassedOver:
    """Stands for a type of another library: items stay, nothing of the type is ever run."""

    def __new__(cls, *args, **kwargs) -> OrderedDict:
        return OrderedDict()


def _plain_types() -> list:
    """What may stand beside tensors: types that are nothing but their value."""
    scalar, rebuild = (f.__reduce__()[0] for f in (np.float64(0), np.zeros(1)))
    arrays = ("numpy.core.multiarray", "numpy._core.multiarray")  # moved between releases
    homes = ("pathlib", "pathlib._local")
    paths = {"Posix": pathlib.PurePosixPath, "Windows": pathlib.PureWindowsPath}
    return [
        *(argparse.Namespace, types.SimpleNamespace, dict, list, tuple, str, int, float, bool),
        *(datetime.datetime, datetime.date, datetime.time, datetime.timedelta, datetime.timezone),
        *(np.ndarray, np.dtype, *{type(np.dtype(kind)) for kind in "?bhilqBHILQefdgFDSUMm"}),
        *((scalar, f"{home}.scalar") for home in arrays),
        *((rebuild, f"{home}._reconstruct") for home in arrays),
        *((kind, f"{home}.{name}Path") for home in homes for name, kind in paths.items()),
        *((kind, f"{home}.Pure{name}Path") for home in homes for name, kind in paths.items()),
        (str, "torch.torch_version.TorchVersion"),
        (PassedOver, "collections.defaultdict"),
    ]


PLAIN_TYPES = _plain_types()
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
        other = what_else(path, wide)
        if other is None:
            saved = _read(path, wide)
    except Stopped:
        raise
    except Exception as error:  # a damaged file can make the reader fail in any way
        raise UserError(f"{flag} {path}: {_what_failed(error)}") from error
    if other is not None:
        raise UserError(f"{flag} {path}: this is {other}")
    if not isinstance(saved, dict):
        raise UserError(f"{flag} {path}: holds a {type(saved).__name__}, not a dict of tensors")
    return saved


def _read(path: Path, wide: bool) -> object:
    if wide and is_safetensors(path):
        return safetensors.torch.load_file(path)
    archive = checked_archive(path)
    try:
        return _load(archive, [])
    except pickle.UnpicklingError:
        found = _types_in(path) if wide and zipfile.is_zipfile(path) else []
        if not any(PASSED_OVER.match(name) for name in found):
            raise
    return _load(archive, [(PassedOver, name) for name in found if PASSED_OVER.match(name)])


def _load(archive: Path | BinaryIO, more: list) -> object:
    with torch.serialization.safe_globals([*PLAIN_TYPES, *more]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what torch wonders about in a damaged file
        return torch.load(archive, map_location="cpu", weights_only=True)


def _types_in(path: Path) -> set[str]:
    """Names of the types and functions that an archive's pickle asks for; none is looked up."""
    with zipfile.ZipFile(path) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
        steps = pickletools.genops(archive.read(name))
        return {text.replace(" ", ".") for step, text, _ in steps if step.name == "GLOBAL"}


def what_else(path: Path, wide: bool = False) -> str | None:
    """What a file is that is no file of torch.save, and the remedy; None if it may be one."""
    with open(path, "rb") as file:
        head = file.read(512)
    text = head.strip().decode("latin-1")
    beginning = next((said for start, said in BEGINNINGS.items() if head.startswith(start)), None)
    if beginning is not None:
        return beginning
    if head.startswith(b"PK\x03\x04"):
        return _other_archive(path)
    if head[257:262] == b"ustar":
        return "a tar archive; unpack it (tar -xf) and name the file inside"
    if is_safetensors(path):
        return None if wide else "a file of safetensors; here one of torch.save is read"
    if text.startswith("<"):
        return (
            "a web page, not the file: its address asks for a login or a confirmation; fetch it in "
            "a browser, or by the site's own program"
        )
    if text and text.isascii() and text.replace("\n", " ").isprintable():
        said = " ".join(text[:60].split())
        return f"text, not tensors ({said!r}...), perhaps a server's answer; fetch the file again"
    if head.startswith(b"\x80") and not head.startswith(TORCH_PICKLE):
        return (
            "a pickle that torch.save did not write, and not read, since reading one may run code; "
            "where you trust it, save its tensors by torch.save"
        )
    return None


def _other_archive(path: Path) -> str | None:
    if not zipfile.is_zipfile(path):
        raise ValueError(f"its end is missing, {path.stat().st_size} bytes are there")
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    if any(name.endswith("/constants.pkl") for name in names):
        return "a TorchScript program, which is not run; save the state_dict() of its model"
    if any(name.endswith("/data.pkl") for name in names):
        return None
    if names and all(name.endswith(".npy") for name in names):
        return "an npz file of NumPy, not one of torch.save"
    return f"a zip archive of {listed(names)}; unpack it and name the file inside"


def is_safetensors(path: Path) -> bool:
    """By its beginning: the length of a header, which is JSON."""
    with open(path, "rb") as file:
        head = file.read(9)
    length = int.from_bytes(head[:8], "little")
    return head[8:] == b"{" and length < path.stat().st_size


def _what_failed(error: Exception) -> str:
    """What a reader says, without its advice and a terminal's escape codes, and the remedy."""
    said = ESCAPES.sub("", str(error)).rpartition("WeightsUnpickler error: ")[2].strip()
    asked = re.search(r"GLOBAL (\S+) (?:was not|whose)|Can only build .* got (.+)", said)
    if asked is not None:
        return (
            f"holds {(asked[1] or asked[2])[:100]}, which is not read, since reading it may run "
            "code; where you trust the file, load it with weights_only=False and save its state "
            "dicts alone"
        )
    if said.startswith("Unsupported operand 149"):  # of pickle's protocol 4
        return "is pickled in another form than torch.save's own; save it again by torch.save alone"
    reason = said.splitlines()[0][:120] if said else "it is empty, or its end is missing"
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
    names = {name: re.sub(r"(?:^|(?<=\.))_orig_mod\.", "", str(name)) for name in state}
    stripped = ["_orig_mod."] if any(names[name] != name for name in state) else []
    bare = {name: re.sub(r"^(module\.)+", "", short) for name, short in names.items()}
    stripped += ["module."] if bare != names else []
    found = {bare[name]: tensor for name, tensor in state.items()}
    if len(found) < len(state):
        raise ValueError(f"it has tensors with and without {' and '.join(stripped)}; keep one set")
    return found, " and ".join(stripped)
