"""A latent cache as a data set: posteriors of every image and of its mirror image.

    FOLDER/settings.json     what the folder is being filled with; the first file
    FOLDER/shard-00000.npy   [n, 2, 2C, h, w] float16 or float32: images, mirror images
    FOLDER/shard-00000.json  the shard is whole: its images' names, labels, checksums, statistics
    FOLDER/manifest.json     the cache is whole: VAE, image size, classes, scale, channel order, ...

Every file is whole or absent. The published form, CLASS/IMAGE.npz with float32 `moments` and
`moments_flip` [2C, h, w], takes the place of the .npy files on request, or is all there is; see
docs/data.md. Nothing is pickled, no name leads out of the folder, each posterior has its CRC-32.
Letters: N images, n those of a shard, B batch, C latent channels, h, w positions.
"""

import hashlib
import json
import os
import zlib
from bisect import bisect_right
from copy import copy
from functools import lru_cache
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from util.data.images import Key, parse_key
from util.data.listing import list_images
from util.errors import UserError, as_user_error
from util.files import sha256

FORMAT_VERSION = 2
SETTINGS, MANIFEST = "settings.json", "manifest.json"
NPZ_NAMES = ("moments", "moments_flip")
CHECKSUM = "checksum"  # the last entry of every JSON file, over all others
AGAIN = "remove it and run main_cache.py again"


def shard_path(folder: Path, shard: int, suffix: str) -> Path:
    return folder / f"shard-{shard:05d}{suffix}"


def unreadable(path: str | Path) -> str:
    return f"--cached_path: cannot read {path} (if it is damaged, {AGAIN})"


def json_digest(value: dict) -> str:
    """SHA-256 of what a JSON file says, however it is spaced and ordered."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def read_json(path: Path, **expected) -> dict:
    """A JSON file of a cache, without its checksum. Raises UserError, naming it, if it is damaged
    or says something else than expected.
    """
    with as_user_error(unreadable(path), (Exception,)):
        value = json.loads(path.read_bytes())
        if value.pop(CHECKSUM) != json_digest(value):
            raise ValueError("wrong checksum")
        for name, own in expected.items():
            if value.get(name) != own:
                raise ValueError(f"its {name} is {value.get(name)!s:.40}, not {own!s:.40}")
        return value


def read_sidecar(folder: Path, shard: int, cache_id: str) -> dict:
    """What shard-00000.json says. Raises UserError if it is damaged or not that of this cache."""
    path = shard_path(folder, shard, ".json")
    sidecar = read_json(path, cache_id=cache_id, shard=shard)
    if outside := [n for n in sidecar["names"] if n.startswith("/") or ".." in n.split("/")]:
        raise UserError(f"--cached_path: {path}: {outside[0][:200]!r} leads out of the folder")
    return sidecar


def read_moments(path: str | Path, names: tuple[str, ...] = NPZ_NAMES) -> np.ndarray:
    """[len(names), 2C, h, w] float32, of an npz file. Raises UserError, naming the file."""
    # zipfile, which compares checksums, and numpy raise nearly anything at a damaged file.
    with as_user_error(unreadable(path), (Exception,)):
        with np.load(path, allow_pickle=False) as file:
            array = np.stack([file[name] for name in names])
        if array.ndim != 4 or array.shape[1] % 2 or array.dtype.kind != "f" or not array.size:
            raise ValueError(f"it holds {array.dtype} {array.shape[1:]}, not floats [2C, h, w]")
        return array.astype(np.float32, copy=False)


@lru_cache(maxsize=512)  # open files of a process
def map_shard(path: str, dtype: str, shape: tuple[int, ...], opened: object) -> np.ndarray:
    """A shard in memory: read where it is touched, never written. opened: by what."""
    with as_user_error(unreadable(path), (Exception,)):
        array = np.load(path, mmap_mode="r", allow_pickle=False).view(np.ndarray)
        if shape[0] and (array.shape != shape or array.dtype != dtype):
            raise ValueError(f"it holds {array.dtype} {array.shape}, not {dtype} {shape}")
        return array


class CachedLatents(Dataset):
    """dataset[(index, flip)] -> (moments [2C, h, w] as they are stored, label).

    classes: their names, by label. labels: int64 [N]. latent_shape: (C, h, w). dtype: as stored.
    manifest: what `main_cache.py` wrote about the cache; None for a published one.
    """

    def __init__(
        self, folder: Path, classes: list[str], sidecars: list[dict], manifest: dict | None = None
    ):
        self.classes, self.manifest, self.crcs = classes, manifest, None
        self.labels = np.concatenate([np.array(s["labels"], np.int64) for s in sidecars])
        self.rows = range(len(self.labels))  # of each image among all that are stored
        self.starts = [0, *accumulate(len(sidecar["names"]) for sidecar in sidecars)]
        self.is_npz = manifest is None or manifest["format"] == "npz"
        self.files = [str(shard_path(folder, k, ".npy")) for k in range(len(sidecars))]
        if self.is_npz:
            end = ".npz" if manifest else ""
            self.files = [str(folder / f"{name}{end}") for s in sidecars for name in s["names"]]
        if manifest is None:
            channels, *sides = read_moments(self.files[0]).shape[1:]
            self.latent_shape, self.dtype = (channels // 2, *sides), torch.float32
        else:
            self.crcs = np.concatenate([np.array(s["crc32"], np.uint32) for s in sidecars])
            self.latent_shape = tuple(manifest["latent_shape"])
            self.dtype = getattr(torch, manifest["dtype"])
        self.shape = (2 * self.latent_shape[0], *self.latent_shape[1:])  # of moments
        self.opened = object()  # opened again, a file may be another one
        for shard in () if self.is_npz else range(len(self.files)):
            self._shard(shard)  # what is wrong with it is said at once

    def subset(self, chosen: list[int]) -> "CachedLatents":
        """The images of those numbers, numbered anew."""
        part = copy(self)
        part.labels, part.rows = self.labels[chosen], [self.rows[i] for i in chosen]
        return part

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, key: Key | int) -> tuple[Tensor, int]:
        moments, labels = self.__getitems__([key])
        return moments[0], int(labels[0])

    def __getitems__(self, keys: list[Key | int]) -> tuple[Tensor, Tensor]:
        """A batch, as a DataLoader asks for it: moments [B, 2C, h, w], labels int64 [B]."""
        moments = torch.empty(len(keys), *self.shape, dtype=self.dtype)
        pairs = [parse_key(key, len(self)) for key in keys]
        for view, (index, flip) in zip(moments.numpy(), pairs, strict=True):
            row = self.rows[index]
            shard = row if self.is_npz else bisect_right(self.starts, row) - 1
            if self.is_npz:
                (stored,) = read_moments(self.files[row], NPZ_NAMES[flip : flip + 1])
            else:
                stored = self._shard(shard)[row - self.starts[shard], int(flip)]
            checked = self.crcs is None or zlib.crc32(stored) == self.crcs[2 * row + flip]
            if stored.shape != self.shape or not checked:
                raise UserError(f"{unreadable(self.files[shard])}: wrong shape or checksum")
            view[...] = stored
        return moments, torch.from_numpy(self.labels[[index for index, _ in pairs]])

    def _shard(self, shard: int) -> np.ndarray:
        shape = (self.starts[shard + 1] - self.starts[shard], 2, *self.shape)
        return map_shard(self.files[shard], self.manifest["dtype"], shape, self.opened)


def open_cache(
    path: str | Path, img_size: int | None = None, vae_sha256: str | None = None
) -> CachedLatents:
    """A cache of any form. img_size and vae_sha256: what it must have been made with, if it knows.

    Raises UserError if it is missing, not whole, damaged, or made with something else.
    """
    folder = Path(path)
    if not (folder / MANIFEST).exists():
        return _open_published(folder)
    manifest = read_json(folder / MANIFEST, format_version=FORMAT_VERSION)
    for name, own, flag in (
        ("image_size", img_size, "another image size than --img_size"),
        ("vae_sha256", vae_sha256, "another VAE than --vae_path"),
    ):
        if own not in (None, manifest[name]):
            differ = f"{name} is {manifest[name]}, not {own}"
            raise UserError(f"--cached_path {path} was made with {flag}: {differ}")
    sidecars = []
    for shard, entry in enumerate(manifest["shards"]):
        sidecars.append(read_sidecar(folder, shard, manifest["cache_id"]))
        sidecar = shard_path(folder, shard, ".json")
        if sha256(sidecar) != entry["sidecar_sha256"]:
            raise UserError(f"--cached_path: {sidecar} does not fit the manifest ({AGAIN})")
    return CachedLatents(folder, manifest["classes"], sidecars, manifest)


def _open_published(folder: Path) -> CachedLatents:
    if (folder / SETTINGS).exists() or any(folder.glob("shard-*")):
        remedy = "run main_cache.py with the same flags again"
        raise UserError(f"--cached_path {folder} is not finished, it has no {MANIFEST}; {remedy}")
    with as_user_error("no cache of main_cache.py"):
        images = list_images(folder, "", "--cached_path", (".npz",))
    files, labels = zip(*images.samples, strict=True)
    names = [os.path.relpath(path, folder) for path in files]
    return CachedLatents(folder, images.classes, [{"names": names, "labels": labels}])


def verify(path: str | Path) -> CachedLatents:
    """Read all of a cache, and so compare the checksums, which a published one has not."""
    cache = open_cache(path)
    for index in tqdm(range(len(cache)), "reading", disable=None):
        cache.__getitems__([(index, False), (index, True)])
    return cache
