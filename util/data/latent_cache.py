"""A latent cache as a data set: posteriors of every image and of its mirror image.

Reads every form of cache_files.py without being told which, and the published one, which is
CLASS/IMAGE.npz and nothing beside. Each posterior is checked against its CRC-32 when it is read.
Letters: N images, B batch, C latent channels, h, w positions.
"""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from util.data.arrays import allow_open_files
from util.data.cache_files import (
    AGAIN,
    MANIFEST,
    NPZ_NAMES,
    SETTINGS,
    load_shard,
    npz_path,
    open_npy,
    read_manifest,
    read_moments,
    read_sidecar,
    shard_digest,
    shard_path,
    unreadable,
    view_crc,
)
from util.data.images import Key, list_images, parse_key
from util.errors import UserError, as_user_error
from util.files import sha256


class LatentBatch(Sequence):
    """Items of a CachedLatents, (moments, label) each, that lie in one tensor.

    moments: [B, 2C, h, w] as stored. labels: int64 [B].
    """

    def __init__(self, moments: Tensor, labels: Tensor):
        self.moments, self.labels = moments, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, position: int) -> tuple[Tensor, int]:
        return self.moments[position], int(self.labels[position])


def as_one_batch(batch: LatentBatch) -> tuple[Tensor, Tensor]:
    """A `collate_fn`: what torch's own would put together item by item is together already."""
    return batch.moments, batch.labels


class CachedLatents(Dataset):
    """dataset[(index, flip)] -> (moments [2C, h, w], label); a plain index is not flipped.

    Moments are handed over as they are stored: float16 is half the bytes between processes, and
    `Tokenizer.from_moments` widens them on the device.
    classes: their names, by label. latent_shape: (C, h, w). dtype: of the stored moments.
    manifest: what `main_cache.py` wrote about the cache (scale, channel order, VAE, ...); None for
    a published one, which says nothing.
    """

    classes: list[str]
    labels: np.ndarray  # int64 [N]
    latent_shape: tuple[int, int, int]
    dtype: torch.dtype
    manifest: dict | None
    crcs: np.ndarray | None  # [N, 2], of the image and of the mirror image

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, key: Key | int) -> tuple[Tensor, int]:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: list[Key | int]) -> LatentBatch:
        """A whole batch, as a DataLoader asks for it. Raises UserError, naming a damaged file."""
        channels, height, width = self.latent_shape
        moments = torch.empty(len(keys), 2 * channels, height, width, dtype=self.dtype)
        views, chosen = moments.numpy(), []
        for view, key in zip(views, keys, strict=True):
            index, flip = parse_key(key, len(self))
            view[...] = self._read(index, flip)
            if self.crcs is not None and view_crc(view) != self.crcs[index, int(flip)]:
                raise UserError(f"{self._complaint(index)}: wrong checksum")
            chosen.append(index)
        return LatentBatch(moments, torch.from_numpy(self.labels[chosen]))

    def _read(self, index: int, flip: bool) -> np.ndarray:
        """[2C, h, w] of the stored dtype."""
        raise NotImplementedError

    def _complaint(self, index: int) -> str:
        """Which file of which image is damaged, and the remedy."""
        raise NotImplementedError


class ShardedLatents(CachedLatents):
    """The npy form, mapped into memory."""

    def __init__(self, folder: Path, manifest: dict, sidecars: list[dict]):
        self.manifest = manifest
        self.classes = manifest["classes"]
        self.labels, self.crcs = _labels(sidecars), _crcs(sidecars)
        self.latent_shape = tuple(manifest["latent_shape"])
        self.dtype = getattr(torch, manifest["dtype"])
        self.folder = folder
        self.counts = [len(sidecar["names"]) for sidecar in sidecars]
        self._map_shards()

    def _map_shards(self) -> None:
        channels, height, width = self.latent_shape
        with as_user_error(f"--cached_path {self.folder} has many shards (see --shard_size)"):
            allow_open_files(len(self.counts))
        self.starts = [0, *accumulate(self.counts)]
        self.shards = []
        for shard, count in enumerate(self.counts):
            path = shard_path(self.folder, shard, ".npy")
            array = open_npy(path, count)
            found, expected = (array.shape[1:], array.dtype), (2, 2 * channels, height, width)
            if count and found != (expected, self.manifest["dtype"]):
                raise UserError(
                    f"--cached_path: {path} is {array.dtype} {array.shape}, unlike the manifest "
                    f"({AGAIN})"
                )
            self.shards.append(array)

    def _read(self, index: int, flip: bool) -> np.ndarray:
        shard = bisect_right(self.starts, index) - 1
        return self.shards[shard][index - self.starts[shard], int(flip)]

    def _complaint(self, index: int) -> str:
        shard = bisect_right(self.starts, index) - 1
        path = shard_path(self.folder, shard, ".npy")
        return f"{unreadable(path)}, image {index - self.starts[shard]}"

    # Worker processes that are not forked get the dataset pickled: the files' names, not the data.
    def __getstate__(self) -> dict:
        return {**self.__dict__, "shards": None}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._map_shards()


class NpzLatents(CachedLatents):
    """The published form, one file an image."""

    dtype = torch.float32

    def __init__(
        self,
        files: list[str],
        labels: np.ndarray,
        classes: list[str],
        manifest: dict | None = None,
        crcs: np.ndarray | None = None,
    ):
        self.manifest = manifest
        self.classes = classes
        self.labels, self.crcs = labels, crcs
        self.files = files
        # Names that a manifest leads to stay in its folder; what a user linked into one is his.
        self.links = manifest is None
        channels, height, width = read_moments(files[0], links=self.links).shape[1:]
        self.latent_shape = (channels // 2, height, width)

    def _read(self, index: int, flip: bool) -> np.ndarray:
        name = NPZ_NAMES[flip : flip + 1]
        moments = read_moments(self.files[index], name, self.links)[0]
        channels, height, width = self.latent_shape
        if moments.shape != (2 * channels, height, width):
            raise UserError(
                f"--cached_path: {self.files[index]} has shape {moments.shape}, the first file of "
                f"the cache {(2 * channels, height, width)}; cache it again"
            )
        return moments

    def _complaint(self, index: int) -> str:
        return unreadable(self.files[index])


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
    manifest = read_manifest(folder)
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
    cache = NpzLatents(files, _labels(sidecars), manifest["classes"], manifest, _crcs(sidecars))
    if cache.latent_shape != tuple(manifest["latent_shape"]):
        raise UserError(f"--cached_path: {files[0]} is unlike the manifest ({AGAIN})")
    return cache


def _open_published(folder: Path) -> NpzLatents:
    if (folder / SETTINGS).exists() or any(folder.glob("shard-*")):
        raise UserError(
            f"--cached_path {folder} is not finished, it has no {MANIFEST}; run main_cache.py with "
            "the same flags again, it goes on where it was stopped"
        )
    if inside := sorted(
        p.parent for name in (MANIFEST, SETTINGS) for p in folder.glob(f"*/{name}")
    ):
        raise UserError(
            f"--cached_path {folder} is no cache but holds some; name --cached_path {inside[0]}"
        )
    if not folder.is_dir():
        raise UserError(f"--cached_path {folder} is not a folder; main_cache.py makes one")
    with as_user_error("no cache of main_cache.py"):
        found = list_images(folder, "", "--cached_path", (".npz",))
    files, labels = zip(*found.samples, strict=True)
    return NpzLatents(list(files), np.array(labels), found.classes)


def _read_sidecars(folder: Path, manifest: dict) -> list[dict]:
    """Of all shards; what they say of names, labels and checksums is what the manifest vouches for.

    Raises UserError, naming the file, where it is not.
    """
    sidecars, known = [], set(range(len(manifest["classes"])))
    for shard, entry in enumerate(manifest["shards"]):
        sidecar = read_sidecar(folder, shard, manifest["cache_id"])
        path = shard_path(folder, shard, ".json")
        fits = len(sidecar["labels"]) == entry["count"] and set(sidecar["labels"]) <= known
        if not fits or sha256(path) != entry.get("sidecar_sha256"):
            raise UserError(f"--cached_path: {path} does not fit the manifest ({AGAIN})")
        sidecars.append(sidecar)
    return sidecars


def _labels(sidecars: list[dict]) -> np.ndarray:
    return np.concatenate([np.array(sidecar["labels"], np.int64) for sidecar in sidecars])


def _crcs(sidecars: list[dict]) -> np.ndarray:
    return np.concatenate([np.array(s["crc32"], np.uint32).reshape(-1, 2) for s in sidecars])


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
        if shard_digest(folder, form, shard, moments) != entry["sha256"]:
            damaged.append(sidecar_path.stem)
    if damaged:
        raise UserError(
            f"--cached_path {path}: wrong checksums in {', '.join(damaged)}; remove the files of "
            "these shards and run main_cache.py again"
        )
    return cache
