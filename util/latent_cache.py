"""Encoded images on disk: posteriors of every image and of its mirror image, written once.

    FOLDER/settings.json     what the folder is being filled with; the first file
    FOLDER/shard-00000.npy   [n, 2, 2C, h, w] float16 or float32: images, mirror images
    FOLDER/shard-00000.json  the shard is whole: its images' names and labels, checksum, statistics
    FOLDER/manifest.json     the cache is whole: VAE, image size, classes, scale, channel order, ...

Shard k stands for images [k*S, (k+1)*S) of the sorted list, whoever writes it, so any number of
processes can go on where others were stopped. Every file is whole or absent. The published form,
CLASS/IMAGE.npz with float32 `moments` and `moments_flip` [2C, h, w], takes the place of the .npy
files on request; a published cache, which has nothing beside these, is read as well.
Nothing here is pickled, and no name in a file leads out of the folder.
Letters: N images, n those of a shard, S its size, C latent channels, h, w positions.
"""

import hashlib
import json
import math
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.datasets.folder import find_classes, make_dataset
from tqdm import tqdm

from util.data import Key, parse_key
from util.errors import UserError, as_user_error
from util.files import sha256

FORMAT_VERSION = 1
FORMATS = ("npy", "npz")
DTYPES = ("float16", "float32")
SETTINGS, MANIFEST = "settings.json", "manifest.json"
NPZ_NAMES = ("moments", "moments_flip")
AGAIN = "remove it and run main_cache.py again"
MAX_NPZ_BYTES = 1 << 28  # far above any latents; a file that unpacks to more is no cache


def shard_path(folder: Path, shard: int, suffix: str) -> Path:
    return folder / f"shard-{shard:05d}{suffix}"


def npz_path(folder: Path, name: str) -> Path:
    return folder / f"{name}.npz"


def read_json(path: Path) -> dict:
    with as_user_error(f"--cached_path: {path} is damaged", (ValueError, RecursionError, OSError)):
        value = json.loads(path.read_bytes())
        if not isinstance(value, dict):
            raise ValueError("it holds no JSON object")
        return value


def read_sidecar(folder: Path, shard: int, cache_id: str) -> dict:
    """What shard-00000.json says. Raises UserError if it is of another cache or not in order."""
    path = shard_path(folder, shard, ".json")
    sidecar = read_json(path)
    if sidecar.get("cache_id") != cache_id:
        raise UserError(
            f"--cached_path: {path} belongs to a cache with other settings (VAE, image size, dtype "
            "or list of images); remove the shard and run main_cache.py again"
        )
    with as_user_error(f"--cached_path: {path} is damaged"):
        names, labels = sidecar.get("names"), sidecar.get("labels")
        if not (_is_list(names, str) and _is_list(labels, int) and len(names) == len(labels)):
            raise ValueError("names and labels do not fit together")
        for name in names:
            if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
                raise ValueError(f"{name!r} leads out of the folder")
    return sidecar


def _is_list(value: object, kind: type, length: int | None = None) -> bool:
    # type() and not isinstance: to Python, True is an int.
    right_length = isinstance(value, list) and length in (None, len(value))
    return right_length and all(type(entry) is kind for entry in value)


def _read_npz(path: str | Path, names: Iterable[str] = NPZ_NAMES) -> np.ndarray:
    """Arrays by their names: [len(names), 2C, h, w] float32. Raises UserError, naming the file."""
    # zipfile and numpy meet a damaged file with nearly any exception, so all of them count.
    with (
        as_user_error(f"--cached_path: {path} is damaged ({AGAIN})", (Exception,)),
        np.load(path, allow_pickle=False) as file,
    ):
        if sum(entry.file_size for entry in file.zip.infolist()) > MAX_NPZ_BYTES:
            raise ValueError(f"it unpacks to more than {MAX_NPZ_BYTES} bytes")
        arrays = np.stack([file[name] for name in names])
        if arrays.ndim != 4 or arrays.shape[1] % 2 or arrays.dtype.kind != "f":
            raise ValueError(f"it holds {arrays.dtype} {arrays.shape[1:]}, not floats [2C, h, w]")
        return arrays.astype(np.float32, copy=False)


def open_npy(path: Path, count: int) -> np.ndarray:
    """[count, 2, 2C, h, w], a view of the file that is read where it is touched."""
    if not count:
        return np.empty(0, np.float32)  # nothing to map
    with as_user_error(f"--cached_path: {path} is damaged ({AGAIN})", (Exception,)):
        array = np.lib.format.open_memmap(path, mode="r")  # never unpickles
        if array.ndim != 5 or len(array) != count or array.dtype not in map(np.dtype, DTYPES):
            raise ValueError(f"it holds {array.dtype} {array.shape} for {count} images")
        return array


def load_shard(folder: Path, form: str, shard: int, names: list[str]) -> np.ndarray:
    """[n, 2, 2C, h, w], the moments of the shard's images and of their mirror images."""
    if form == "npy":
        return open_npy(shard_path(folder, shard, ".npy"), len(names))
    return np.array([_read_npz(npz_path(folder, name)) for name in names], np.float32)


def shard_digest(folder: Path, form: str, shard: int, moments: np.ndarray) -> str:
    """SHA-256 of a shard: of its file, or of the arrays of all its npz files."""
    if form == "npy":
        return sha256(shard_path(folder, shard, ".npy"))
    return hashlib.sha256(moments.tobytes()).hexdigest()


def _read_manifest(folder: Path) -> dict:
    """Raises UserError unless all that is read from a manifest later is there and makes sense."""
    manifest = read_json(folder / MANIFEST)
    with as_user_error(f"--cached_path: {folder / MANIFEST} is damaged", (Exception,)):
        version, channels = manifest["format_version"], manifest["latent_shape"][0]
        if type(version) is not int or version != FORMAT_VERSION:
            raise ValueError(f"format version {version}, this program reads {FORMAT_VERSION}")
        checks = {
            "format": manifest["format"] in FORMATS,
            "dtype": manifest["dtype"] in DTYPES,
            "image_size": type(manifest["image_size"]) is int and manifest["image_size"] > 0,
            "vae_sha256": type(manifest["vae_sha256"]) is str,
            "cache_id": type(manifest["cache_id"]) is str,
            "classes": _is_list(manifest["classes"], str),
            "latent_shape": _is_list(manifest["latent_shape"], int, 3),
            "latent_scale": type(manifest["latent_scale"]) is float
            and 0 < manifest["latent_scale"] < math.inf,
            "channel_order": _is_list(manifest["channel_order"], int, channels)
            and sorted(manifest["channel_order"]) == list(range(channels)),
            "shards": _is_list(manifest["shards"], dict) and len(manifest["shards"]) > 0,
            "count": manifest["count"] == sum(shard["count"] for shard in manifest["shards"])
            and manifest["count"] > 0,
        }
        wrong = [key for key, right in checks.items() if not right]
        if wrong:
            raise ValueError(f"no sense in {', '.join(wrong)}")
    return manifest


class CachedLatents(Dataset):
    """dataset[(index, flip)] -> (moments float32 [2C, h, w], label); a plain index is not flipped.

    classes: their names, by label. latent_shape: (C, h, w). manifest: what `main_cache.py` wrote
    about the cache (scale, channel order, VAE, ...); None for a published one, which says nothing.
    """

    classes: list[str]
    labels: np.ndarray  # [N]
    latent_shape: tuple[int, int, int]
    manifest: dict | None

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, key: Key | int) -> tuple[Tensor, int]:
        index, flip = parse_key(key, len(self))
        moments = torch.from_numpy(np.array(self._read(index, flip)))  # out of the mapped file
        return moments.float(), int(self.labels[index])

    def _read(self, index: int, flip: bool) -> np.ndarray:
        """[2C, h, w] of any float type."""
        raise NotImplementedError


class ShardedLatents(CachedLatents):
    """The npy form, mapped into memory."""

    def __init__(self, folder: Path, manifest: dict, sidecars: list[dict]):
        self.manifest = manifest
        self.classes = manifest["classes"]
        self.labels = _labels(sidecars)
        self.latent_shape = tuple(manifest["latent_shape"])
        self.folder = folder
        self.counts = [len(sidecar["names"]) for sidecar in sidecars]
        self._map_shards()

    def _map_shards(self) -> None:
        channels, height, width = self.latent_shape
        self.starts = np.cumsum([0, *self.counts])
        self.shards = []
        for shard, count in enumerate(self.counts):
            path = shard_path(self.folder, shard, ".npy")
            array = open_npy(path, count)
            if count and array.shape[1:] != (2, 2 * channels, height, width):
                raise UserError(f"--cached_path: {path} is {array.shape}, unlike the manifest")
            self.shards.append(array)

    def _read(self, index: int, flip: bool) -> np.ndarray:
        shard = np.searchsorted(self.starts, index, side="right") - 1
        return self.shards[shard][index - self.starts[shard], int(flip)]

    # Worker processes that are not forked get the dataset pickled: the files' names, not the data.
    def __getstate__(self) -> dict:
        return {**self.__dict__, "shards": None}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._map_shards()


class NpzLatents(CachedLatents):
    """The published form, one file an image."""

    def __init__(
        self, files: list[str], labels: np.ndarray, classes: list[str], manifest: dict | None
    ):
        self.manifest = manifest
        self.classes = classes
        self.labels = labels
        self.files = files
        channels, height, width = _read_npz(files[0]).shape[1:]
        self.latent_shape = (channels // 2, height, width)

    def _read(self, index: int, flip: bool) -> np.ndarray:
        moments = _read_npz(self.files[index], NPZ_NAMES[flip : flip + 1])[0]
        channels, height, width = self.latent_shape
        if moments.shape != (2 * channels, height, width):
            raise UserError(
                f"--cached_path: {self.files[index]} has shape {moments.shape}, the first file of "
                f"the cache {(2 * channels, height, width)}; cache it again"
            )
        return moments


def open_cache(
    path: str | Path, img_size: int | None = None, vae_sha256: str | None = None
) -> CachedLatents:
    """A cache of any form, told apart by what the folder holds.

    img_size and vae_sha256: what the cache must have been made with, where it says so.
    Raises UserError if it is missing, not whole, damaged, or made with something else.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(f"--cached_path {path} is not a folder; make a cache with main_cache.py")
    if not (folder / MANIFEST).exists():
        return _open_published(folder)
    manifest = _read_manifest(folder)
    made_for, made_by = manifest["image_size"], manifest["vae_sha256"]
    if img_size not in (None, made_for):
        raise UserError(
            f"--cached_path {path} was made for images of {made_for} px, not --img_size {img_size};"
            f" pass --img_size {made_for} or make another cache"
        )
    if vae_sha256 not in (None, made_by):
        raise UserError(
            f"--cached_path {path} was made with another VAE (SHA-256 {made_by[:12]}) than "
            f"--vae_path ({vae_sha256[:12]}); name that one or make another cache"
        )
    sidecars = _read_sidecars(folder, manifest)
    if manifest["format"] == "npy":
        return ShardedLatents(folder, manifest, sidecars)
    files = [str(npz_path(folder, name)) for sidecar in sidecars for name in sidecar["names"]]
    return NpzLatents(files, _labels(sidecars), manifest["classes"], manifest)


def _open_published(folder: Path) -> NpzLatents:
    if (folder / SETTINGS).exists() or any(folder.glob("shard-*")):
        raise UserError(
            f"--cached_path {folder} is not finished, it has no {MANIFEST}; run main_cache.py with "
            "the same flags again, it goes on where it was stopped"
        )
    with as_user_error(f"--cached_path {folder} is no cache of main_cache.py", (OSError,)):
        classes, label_of = find_classes(folder)
        samples = make_dataset(folder, label_of, (".npz",))
    files, labels = zip(*samples, strict=True)
    return NpzLatents(list(files), np.array(labels), classes, None)


def _read_sidecars(folder: Path, manifest: dict) -> list[dict]:
    sidecars = []
    for shard, entry in enumerate(manifest["shards"]):
        sidecar = read_sidecar(folder, shard, manifest["cache_id"])
        labels, classes = sidecar["labels"], manifest["classes"]
        if len(labels) != entry["count"] or not set(labels) <= set(range(len(classes))):
            path = shard_path(folder, shard, ".json")
            raise UserError(f"--cached_path: {path} does not fit the manifest ({AGAIN})")
        sidecars.append(sidecar)
    return sidecars


def _labels(sidecars: list[dict]) -> np.ndarray:
    return np.concatenate([np.array(sidecar["labels"], np.int64) for sidecar in sidecars])


def verify(path: str | Path) -> CachedLatents:
    """Read all of a cache and compare the checksums; a published one has none, and is read only.

    Raises UserError, naming what is damaged.
    """
    cache = open_cache(path)
    if cache.manifest is None:
        for index in tqdm(range(len(cache)), "reading", disable=None):
            for flip in (False, True):
                cache[(index, flip)]
        return cache
    folder, form = Path(path), cache.manifest["format"]
    damaged = []
    for shard, entry in enumerate(tqdm(cache.manifest["shards"], "reading", disable=None)):
        sidecar_path = shard_path(folder, shard, ".json")
        names = read_sidecar(folder, shard, cache.manifest["cache_id"])["names"]
        moments = load_shard(folder, form, shard, names)
        digests = shard_digest(folder, form, shard, moments), sha256(sidecar_path)
        if digests != (entry["sha256"], entry["sidecar_sha256"]):
            damaged.append(sidecar_path.stem)
    if damaged:
        raise UserError(
            f"--cached_path {path}: wrong checksums in {', '.join(damaged)}; remove the files of "
            "these shards and run main_cache.py again"
        )
    return cache
