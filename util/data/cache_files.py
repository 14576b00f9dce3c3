"""The files of a latent cache: their names, what they must hold, their checksums.

    FOLDER/settings.json     what the folder is being filled with; the first file
    FOLDER/shard-00000.npy   [n, 2, 2C, h, w] float16 or float32: images, mirror images
    FOLDER/shard-00000.json  the shard is whole: its images' names, labels, checksums, statistics
    FOLDER/manifest.json     the cache is whole: VAE, image size, classes, scale, channel order, ...

Shard k stands for images [k*S, (k+1)*S) of the sorted list, whoever writes it, so any number of
processes can go on where others were stopped. Every file is whole or absent. The published form,
CLASS/IMAGE.npz with float32 `moments` and `moments_flip` [2C, h, w], takes the place of the .npy
files on request. Field by field: docs/formats.md.
Nothing here is pickled, no size is believed, and no name in a file leads out of the folder.
Letters: N images, n those of a shard, S its size, C latent channels, h, w positions.
"""

import hashlib
import json
import math
import os
import zlib
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np

from util.data.arrays import map_npy, open_regular, read_npz
from util.errors import UserError, as_user_error
from util.files import atomic_write, sha256

FORMAT_VERSION = 2
FORMATS = ("npy", "npz")
DTYPES = ("float16", "float32")
SETTINGS, MANIFEST = "settings.json", "manifest.json"
NPZ_NAMES = ("moments", "moments_flip")
CHECKSUM = "checksum"  # the last entry of every JSON file, over all others
# Far above anything that main_cache.py writes; what is larger is no cache and not worth the memory.
MAX_JSON_BYTES = 1 << 26
MAX_NPZ_BYTES = 1 << 24
MAX_SHARD_SIZE = 1 << 16
AGAIN = "remove it and run main_cache.py again"


def shard_path(folder: Path, shard: int, suffix: str) -> Path:
    return folder / f"shard-{shard:05d}{suffix}"


def npz_path(folder: Path, name: str) -> Path:
    return folder / f"{name}.npz"


def unreadable(path: str | Path) -> str:
    """How a complaint about a file begins, with the remedy."""
    return f"--cached_path: cannot read {path} (if it is damaged, {AGAIN})"


def write_json(path: Path, value: dict) -> None:
    with atomic_write(path) as file:
        signed = value | {CHECKSUM: json_digest(value)}
        file.write((json.dumps(signed, indent=1) + "\n").encode())


def read_json(path: Path) -> dict:
    """What `write_json` was given. Raises UserError, naming the file, if it is anything else."""
    with as_user_error(unreadable(path), (ValueError, RecursionError, OSError)):
        with open_regular(path) as file:
            content = file.read(MAX_JSON_BYTES + 1)
        if len(content) > MAX_JSON_BYTES:
            raise ValueError(f"it is larger than {MAX_JSON_BYTES} bytes")
        value = json.loads(content, parse_constant=_refuse_constant)
        if not isinstance(value, dict):
            raise ValueError("it holds no JSON object")
    version = value.get("format_version", FORMAT_VERSION)
    if type(version) is not int or version != FORMAT_VERSION:
        raise UserError(
            f"--cached_path: {path} has format version {str(version)[:20]}, this program reads "
            f"{FORMAT_VERSION}; make the cache again in another folder"
        )
    if value.pop(CHECKSUM, None) != json_digest(value):
        raise UserError(f"{unreadable(path)}: wrong checksum")
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number")


def json_digest(value: dict) -> str:
    """SHA-256 of what a JSON file says, however it is spaced and ordered."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def is_list(value: object, kind: type, length: int | None = None) -> bool:
    # type() and not isinstance: to Python, True is an int.
    right_length = isinstance(value, list) and length in (None, len(value))
    return right_length and all(type(entry) is kind for entry in value)


def read_sidecar(folder: Path, shard: int, cache_id: str) -> dict:
    """What shard-00000.json says. Raises UserError if it is of another cache or not in order."""
    path = shard_path(folder, shard, ".json")
    sidecar = read_json(path)
    if sidecar.get("cache_id") != cache_id or sidecar.get("shard") != shard:
        raise UserError(
            f"--cached_path: {path} belongs to another place or to a cache with other settings "
            "(VAE, image size, dtype or list of images); remove the shard and run main_cache.py "
            "again"
        )
    with as_user_error(unreadable(path), (ValueError, OSError)):
        names, labels, crcs = (sidecar.get(key) for key in ("names", "labels", "crc32"))
        if not (is_list(names, str) and is_list(labels, int, len(names))):
            raise ValueError("names and labels do not fit together")
        if not is_list(crcs, int, 2 * len(names)) or any(crc >> 32 for crc in crcs):
            raise ValueError("names and crc32 do not fit together")
        check_inside(folder, names)
    return sidecar


def check_inside(folder: Path, names: list[str]) -> None:
    """Raise ValueError if a name, or a link on its way, leads out of the folder."""
    parents = {}  # of one name each: they are the classes, of which there are few
    for name in names:
        path = PurePosixPath(name)
        if not name or "\0" in name or path.is_absolute() or ".." in path.parts:
            raise ValueError(f"{name[:80]!r} leads out of the folder")
        parents[path.parent] = name
    root = os.path.realpath(folder)
    for parent, name in parents.items():
        if os.path.commonpath([root, os.path.realpath(folder / parent)]) != root:
            raise ValueError(f"a link on the way to {name[:80]!r} leads out of the folder")


def read_moments(
    path: str | Path, names: Sequence[str] = NPZ_NAMES, links: bool = False
) -> np.ndarray:
    """[len(names), 2C, h, w] float32, of an npz file. Raises UserError, naming the file.

    links: whether the file may be a symbolic link, which could lead out of the cache.
    """
    # zipfile and numpy meet a damaged file with nearly any exception, so all of them count.
    with as_user_error(unreadable(path), (Exception,)):
        if not links and os.path.islink(path):
            raise ValueError("it is a symbolic link")
        found = read_npz(path, names, MAX_NPZ_BYTES)
        if set(found) != set(names):
            raise ValueError(f"it holds no {' and '.join(sorted(set(names) - set(found)))}")
        arrays = [found[name] for name in names]
        for array in arrays:
            if array.ndim != 3 or len(array) % 2 or array.dtype.kind != "f" or not array.size:
                raise ValueError(f"it holds {array.dtype} {array.shape}, not floats [2C, h, w]")
        return np.stack(arrays).astype(np.float32, copy=False)


def open_npy(path: Path, count: int) -> np.ndarray:
    """[count, 2, 2C, h, w], a view of the file that is read where it is touched."""
    if not count:
        return np.empty(0, np.float32)  # nothing to map
    with as_user_error(unreadable(path), (Exception,)):
        array = map_npy(path)
        if array.ndim != 5 or len(array) != count or array.dtype not in map(np.dtype, DTYPES):
            raise ValueError(f"it holds {array.dtype} {array.shape} for {count} images")
        if not array.flags.c_contiguous:
            raise ValueError("it is in Fortran order")
        return array


def load_shard(folder: Path, form: str, shard: int, names: list[str]) -> np.ndarray:
    """[n, 2, 2C, h, w], the moments of the shard's images and of their mirror images."""
    if form == "npy":
        return open_npy(shard_path(folder, shard, ".npy"), len(names))
    return np.array([read_moments(npz_path(folder, name)) for name in names], np.float32)


def shard_digest(folder: Path, form: str, shard: int, moments: np.ndarray) -> str:
    """SHA-256 of a shard: of its file, or of the arrays of all its npz files."""
    if form == "npy":
        return sha256(shard_path(folder, shard, ".npy"))
    return hashlib.sha256(moments.tobytes()).hexdigest()


def view_crc(moments: np.ndarray) -> int:
    """CRC-32 of one image's or mirror image's moments as they are stored."""
    return zlib.crc32(moments)


def read_manifest(folder: Path) -> dict:
    """Raises UserError unless all that is read from a manifest later is there and makes sense."""
    manifest = read_json(folder / MANIFEST)
    with as_user_error(unreadable(folder / MANIFEST), (Exception,)):
        wrong = [key for key, right in _manifest_checks(manifest).items() if not right]
        if wrong:
            raise ValueError(f"no sense in {', '.join(wrong)}")
    return manifest


def _manifest_checks(manifest: dict) -> dict[str, bool]:
    """{key: whether its value makes sense}. Raises any exception where not even that is clear."""
    size, shape, shards = (manifest[key] for key in ("image_size", "latent_shape", "shards"))
    scale, order, channels = manifest["latent_scale"], manifest["channel_order"], shape[0]
    return {
        "format_version": manifest["format_version"] == FORMAT_VERSION,
        "format": manifest["format"] in FORMATS,
        "dtype": manifest["dtype"] in DTYPES,
        "image_size": type(size) is int and 0 < size < 1 << 16,
        "vae_sha256": type(manifest["vae_sha256"]) is str,
        "cache_id": type(manifest["cache_id"]) is str,
        "classes": is_list(manifest["classes"], str),
        "latent_shape": is_list(shape, int, 3) and min(shape) > 0 and size % shape[1] == 0,
        "latent_scale": type(scale) is float and 0 < scale < math.inf,
        "channel_order": is_list(order, int, channels) and sorted(order) == [*range(channels)],
        "shards": is_list(shards, dict) and len(shards) > 0,
        "count": type(manifest["count"]) is int
        and manifest["count"] == sum(shard["count"] for shard in shards) > 0,
    }
