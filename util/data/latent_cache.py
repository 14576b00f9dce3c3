"""A latent cache as a data set: posteriors of every image and of its mirror image.

    FOLDER/settings.json     what the folder is being filled with; the first file
    FOLDER/shard-00000.npy   [n, 2, 2C, h, w] float16 or float32: images, mirror images
    FOLDER/shard-00000.json  the shard is whole: its images' names, labels, checksums, statistics
    FOLDER/manifest.json     the cache is whole: VAE, image size, classes, scale, channel order, ...

Every file is whole or absent. The published form, CLASS/IMAGE.npz with float32 `moments` and
`moments_flip` [2C, h, w], takes the place of the .npy files on request, or is all there is. Field
by field: docs/formats.md. Nothing here is pickled, no name leads out of the folder, and each
posterior is checked against its CRC-32 when it is read.
Letters: N images, n those of a shard, B batch, C latent channels, h, w positions.
"""

import hashlib
import io
import json
import os
import resource
import zipfile
import zlib
from bisect import bisect_right
from copy import copy
from functools import cached_property
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

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


def read_json(path: Path) -> dict:
    """A JSON file of a cache, without its checksum. Raises UserError, naming it, if it is wrong."""
    with as_user_error(unreadable(path), (Exception,)):
        value = json.loads(path.read_bytes())
        checksum = value.pop(CHECKSUM)
    if value.get("format_version", FORMAT_VERSION) != FORMAT_VERSION:
        other = f"has format version {value['format_version']}, this program reads {FORMAT_VERSION}"
        raise UserError(f"--cached_path: {path} {other}; make the cache again in another folder")
    if checksum != json_digest(value):
        raise UserError(f"{unreadable(path)}: wrong checksum")
    return value


def read_sidecar(folder: Path, shard: int, cache_id: str) -> dict:
    """What shard-00000.json says. Raises UserError if it is of another cache or not in order."""
    path = shard_path(folder, shard, ".json")
    sidecar = read_json(path)
    if sidecar.get("cache_id") != cache_id or sidecar.get("shard") != shard:
        other = "belongs to another place or to a cache with other settings"
        raise UserError(f"--cached_path: {path} {other}; remove the shard's files, and cache again")
    for name in sidecar["names"]:
        if name.startswith("/") or ".." in name.split("/"):
            raise UserError(f"--cached_path: {path}: {name[:200]!r} leads out of the folder")
    return sidecar


def read_moments(path: str | Path, names: tuple[str, ...] = NPZ_NAMES) -> np.ndarray:
    """[len(names), 2C, h, w] float32, of an npz file. Raises UserError, naming the file."""
    # zipfile and numpy meet a damaged file with nearly any exception, so all of them count.
    with as_user_error(unreadable(path), (Exception,)):
        with zipfile.ZipFile(path) as archive:  # compares the checksums of whole entries
            entries = [io.BytesIO(archive.read(f"{name}.npy")) for name in names]
        array = np.stack([np.load(entry, allow_pickle=False) for entry in entries])
        if array.ndim != 4 or array.shape[1] % 2 or array.dtype.kind != "f" or not array.size:
            raise ValueError(f"it holds {array.dtype} {array.shape[1:]}, not floats [2C, h, w]")
        return array.astype(np.float32, copy=False)


def as_one_batch(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """A `collate_fn` for what is together already."""
    return batch


class CachedLatents(Dataset):
    """dataset[(index, flip)] -> (moments [2C, h, w] as they are stored, label).

    classes: their names, by label. labels: int64 [N]. latent_shape: (C, h, w). dtype: as stored.
    manifest: what `main_cache.py` wrote about the cache; None for a published one.
    """

    def __init__(
        self, folder: Path, classes: list[str], sidecars: list[dict], manifest: dict | None = None
    ):
        self.folder, self.classes, self.manifest = folder, classes, manifest
        self.counts = [len(sidecar["names"]) for sidecar in sidecars]
        self.labels = np.concatenate([np.array(s["labels"], np.int64) for s in sidecars])
        self.rows = range(len(self.labels))  # of each image among all that are stored
        self.paths = [str(shard_path(folder, k, ".npy")) for k in range(len(sidecars))]
        self.starts = [0, *accumulate(self.counts)]
        self.files, self.crcs = [], None
        if manifest is None or manifest["format"] == "npz":
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
        _ = self.files or self.shards  # what is wrong with a shard is said at once

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
            file, stored = self._read(row, flip)
            view[...] = stored
            if self.crcs is not None and zlib.crc32(view) != self.crcs[2 * row + flip]:
                raise UserError(f"{unreadable(file)}: wrong checksum")
        return moments, torch.from_numpy(self.labels[[index for index, _ in pairs]])

    def _read(self, row: int, flip: bool) -> tuple[str, np.ndarray]:
        """The file that a posterior is in, and the posterior [2C, h, w]."""
        if not self.files:
            shard = bisect_right(self.starts, row) - 1
            return self.paths[shard], self.shards[shard][row - self.starts[shard], int(flip)]
        (moments,) = read_moments(self.files[row], NPZ_NAMES[flip : flip + 1])
        if moments.shape != self.shape:
            raise UserError(f"{unreadable(self.files[row])}: {moments.shape} is not {self.shape}")
        return self.files[row], moments

    @cached_property
    def shards(self) -> list[np.ndarray | None]:
        """Mapped into memory: read where they are touched, never written; each an open file."""
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        files = min(hard, max(soft, len(self.counts) + 512))
        resource.setrlimit(resource.RLIMIT_NOFILE, (files, hard))
        return [self._map(shard) if n else None for shard, n in enumerate(self.counts)]

    def _map(self, shard: int) -> np.ndarray:
        path = self.paths[shard]
        with as_user_error(unreadable(path), (Exception,)):
            array = np.load(path, mmap_mode="r", allow_pickle=False).view(np.ndarray)
            shape, dtype = (self.counts[shard], 2, *self.shape), self.manifest["dtype"]
            if array.shape != shape or array.dtype != dtype:
                raise ValueError(f"it holds {array.dtype} {array.shape}, not {dtype} {shape}")
        return array

    def __getstate__(self) -> dict:  # for another process: the files' names, not the data
        return {name: value for name, value in self.__dict__.items() if name != "shards"}


def open_cache(
    path: str | Path, img_size: int | None = None, vae_sha256: str | None = None
) -> CachedLatents:
    """A cache of any form. img_size and vae_sha256: what it must have been made with, if it knows.

    Raises UserError if it is missing, not whole, damaged, or made with something else.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(f"--cached_path {path} is not a folder; make a cache with main_cache.py")
    if not (folder / MANIFEST).exists():
        return _open_published(folder)
    manifest = read_json(folder / MANIFEST)
    made_for, made_by = manifest["image_size"], manifest["vae_sha256"]
    if img_size not in (None, made_for):
        other = f"was made for images of {made_for} px, not --img_size {img_size}"
        raise UserError(f"--cached_path {path} {other}; pass the former or make another cache")
    if vae_sha256 not in (None, made_by):
        raise UserError(
            f"--cached_path {path} was made with another VAE (SHA-256 {made_by[:12]}) than "
            f"--vae_path ({vae_sha256[:12]}); name that one or make another cache"
        )
    sidecars = []
    for shard, entry in enumerate(manifest["shards"]):
        sidecars.append(read_sidecar(folder, shard, manifest["cache_id"]))
        sidecar = shard_path(folder, shard, ".json")
        if sha256(sidecar) != entry["sidecar_sha256"]:
            raise UserError(f"--cached_path: {sidecar} does not fit the manifest ({AGAIN})")
    return CachedLatents(folder, manifest["classes"], sidecars, manifest)


def _open_published(folder: Path) -> CachedLatents:
    if (folder / SETTINGS).exists() or any(folder.glob("shard-*")):
        remedy = "run main_cache.py with the same flags again, it goes on where it was stopped"
        raise UserError(f"--cached_path {folder} is not finished, it has no {MANIFEST}; {remedy}")
    if inside := sorted(path.parent for path in folder.glob(f"*/{SETTINGS}")):
        raise UserError(f"--cached_path {folder} holds caches; name --cached_path {inside[0]}")
    with as_user_error("no cache of main_cache.py"):
        images = list_images(folder, "", "--cached_path", (".npz",))
    files, labels = zip(*images.samples, strict=True)
    names = [os.path.relpath(path, folder) for path in files]
    return CachedLatents(folder, images.classes, [{"names": names, "labels": labels}])
