"""Writing a latent cache, and checking one as a whole. The files: util/data/latent_cache.py.

Shard k stands for images [k*S, (k+1)*S) of the sorted list, whoever writes it, so any number of
processes can go on where others were stopped.
Letters: n images of a shard, S its size, b of a batch, C latent channels, h, w positions.
"""

import hashlib
import io
import json
import math
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from models.config import PUBLISHED_CHANNEL_ORDER, PUBLISHED_LATENT_SCALE
from util.args import CONFIG
from util.data.latent_cache import (
    CHECKSUM,
    FORMAT_VERSION,
    MANIFEST,
    NPZ_NAMES,
    SETTINGS,
    CachedLatents,
    check_inside,
    json_digest,
    open_cache,
    read_json,
    read_moments,
    read_sidecar,
    shard_path,
)
from util.data.statistics import LatentStats
from util.errors import UserError, as_user_error
from util.files import atomic_write, check_writable, sha256

FORMATS = ("npy", "npz")
DTYPES = ("float16", "float32")
STATS_IMAGES = 256  # images a step of the statistics, to bound its memory


@dataclass(frozen=True)
class CacheSettings:
    """All that decides what a cache holds."""

    format: str
    dtype: str
    shard_size: int
    image_size: int
    vae_sha256: str
    vae_config: dict
    vae_stride: int
    classes: list[str]
    images_sha256: str  # see `list_digest`
    crop: str = "adm_center_crop"
    format_version: int = FORMAT_VERSION

    def to_dict(self) -> dict:
        """As JSON gives it back, where tuples are lists."""
        return json.loads(json.dumps(asdict(self)))

    @property
    def cache_id(self) -> str:
        """What the shards of one cache have in common, and those of no other."""
        return hashlib.sha256(json.dumps(self.to_dict()).encode()).hexdigest()


def list_digest(names: list[str], labels: list[int]) -> str:
    return hashlib.sha256(json.dumps([names, labels]).encode()).hexdigest()


class CacheWriter:
    """Fills one folder with the posteriors of a list of images, shard by shard.

    names: the images' paths relative to the folder of classes; labels: their classes' numbers.
    Raises UserError if the folder holds anything but (a part of) the cache with these settings.
    """

    def __init__(self, path: str, settings: CacheSettings, names: list[str], labels: list[int]):
        self.folder, self.settings, self.names, self.labels = Path(path), settings, names, labels
        self.num_shards = math.ceil(len(names) / settings.shard_size)
        self._check_folder()

    def _check_folder(self) -> None:
        check_writable(self.folder, "--cached_path")
        if not self.folder.exists():
            return
        names = [entry.name for entry in self.folder.iterdir()]
        others = [name for name in names if not name.startswith(".") and name != CONFIG]
        if SETTINGS in others:
            before, own = read_json(self.folder / SETTINGS), self.settings.to_dict()
            pairs = {key: (str(before.get(key)), str(own.get(key))) for key in {**own, **before}}
            if other := [f"{k} is {a:.40}, not {b:.40}" for k, (a, b) in pairs.items() if a != b]:
                raise UserError(
                    f"--cached_path {self.folder} holds a cache with other settings: "
                    f"{'; '.join(other)}; name another folder or remove this one"
                )
        # Without settings, every shard still says what it belongs to.
        elif others and not any(self.folder.glob("shard-*.json")):
            raise UserError(
                f"--cached_path {self.folder} holds other files ({others[0]}); name a folder that "
                "is new or was begun by main_cache.py"
            )

    def pending(self) -> list[int]:
        """The shards to be written. For one process to call, before any of them writes."""
        self._check_folder()
        for left in self.folder.rglob(".*.tmp"):  # by killed processes
            left.unlink()
        return self.unfinished()

    def unfinished(self) -> list[int]:
        """The shards that are not whole."""
        return [shard for shard in range(self.num_shards) if not self._is_whole(shard)]

    def _is_whole(self, shard: int) -> bool:
        if not shard_path(self.folder, shard, ".json").exists():
            return False
        names = read_sidecar(self.folder, shard, self.settings.cache_id)["names"]
        files = [str(shard_path(self.folder, shard, ".npy"))]
        if self.settings.format == "npz":
            files = [str(self.npz_path(name)) for name in names]
        check_inside(self.folder, files)
        return all(map(os.path.isfile, files))

    def npz_path(self, name: str) -> Path:
        return self.folder / f"{name}.npz"

    def images(self, shard: int) -> range:
        start = shard * self.settings.shard_size
        return range(start, min(start + self.settings.shard_size, len(self.names)))

    def missing(self, shard: int) -> list[int]:
        """Numbers of the images that must be encoded for it."""
        all_of_them, images = self.settings.format == "npy", self.images(shard)
        return [i for i in images if all_of_them or not self.npz_path(self.names[i]).is_file()]

    @contextmanager
    def writing(self) -> Iterator[None]:
        """The settings come first, and only when there is something to write."""
        with as_user_error(f"--cached_path {self.folder}: cannot write", (OSError, ValueError)):
            if not (self.folder / SETTINGS).exists():
                self.folder.mkdir(parents=True, exist_ok=True)
                write_json(self.folder / SETTINGS, self.settings.to_dict())
            yield

    def write_manifest(self, published_constants: bool) -> dict:
        """Declare the cache whole, when all shards are.

        published_constants: take the scale and channel order that the released models were trained
        with, since the VAE is KL-16; what is measured stands beside them.
        """
        folder, cache_id = self.folder, self.settings.cache_id
        sidecars = [read_sidecar(folder, shard, cache_id) for shard in range(self.num_shards)]
        parts = [LatentStats.from_dict(s["statistics"]) for s in sidecars if s["names"]]
        if not parts:
            raise UserError(f"none of the {len(self.names)} images can be read; see --data_path")
        stats = sum(parts[1:], parts[0])
        scale, order = stats.latent_scale(), stats.channel_order()
        published = PUBLISHED_LATENT_SCALE, list(PUBLISHED_CHANNEL_ORDER)
        manifest = {
            **self.settings.to_dict(),
            "cache_id": cache_id,
            "count": sum(len(sidecar["names"]) for sidecar in sidecars),
            "latent_shape": list(stats.latent_shape),
            "latent_scale": published[0] if published_constants else scale,
            "channel_order": published[1] if published_constants else order,
            "measured_latent_scale": scale,
            "measured_channel_order": order,
            "channel_mean": stats.channel_mean().tolist(),
            "channel_std": stats.channel_std().tolist(),
            "channel_low_frequency_share": stats.low_frequency_share().tolist(),
            "histogram": stats.histogram.to_dict(),
            "skipped": [name for sidecar in sidecars for name in sidecar["skipped"]],
            "shards": [
                {
                    "count": len(sidecar["names"]),
                    "sha256": sidecar["sha256"],
                    "sidecar_sha256": sha256(shard_path(folder, shard, ".json")),
                }
                for shard, sidecar in enumerate(sidecars)
            ],
        }
        with self.writing():
            write_json(folder / MANIFEST, manifest)
        return manifest


class ShardWriter:
    """A shard that is being filled: `take` its batches, then `finish` it.

    An npy shard is held in memory until it is full; npz files are written as they come, and stay.
    Statistics are summed in steps of STATS_IMAGES however large the batches are.
    Raises UserError if the disk refuses, or if values do not fit the dtype.
    """

    def __init__(self, writer: CacheWriter, shard: int):
        self.writer, self.shard, self.is_npy = writer, shard, writer.settings.format == "npy"
        self.images, self.missing = writer.images(shard), set(writer.missing(shard))
        self.kept: list[int] = []  # numbers of the images in the shard
        self.moments = np.empty(0, writer.settings.dtype)  # those of an npy shard
        self.statistics: list[LatentStats] = []

    def take(self, images: list[int], moments: np.ndarray) -> None:
        """moments: [b, 2, 2C, h, w] float32, of the images of those numbers."""
        writer = self.writer
        with np.errstate(over="ignore"):
            stored = moments.astype(writer.settings.dtype)
        if not np.isfinite(stored).all():
            said = f"the VAE gives values that are not finite in {stored.dtype}"
            raise UserError(f"{said}; check --vae_path, or pass --dtype float32")
        if self.is_npy:
            if not self.kept:
                self.moments = np.empty((len(self.images), *stored.shape[1:]), stored.dtype)
            self.moments[len(self.kept) : len(self.kept) + len(images)] = stored
            self.kept += images
            self._sum_up(self.moments[: len(self.kept)])
            return
        for i, views in zip(images, stored, strict=True):
            if i in self.missing:
                path = writer.npz_path(writer.names[i])
                with writer.writing():
                    path.parent.mkdir(parents=True, exist_ok=True)
                    with atomic_write(path) as file:
                        np.savez(file, **dict(zip(NPZ_NAMES, views, strict=True)))

    def finish(self) -> None:
        """From here on the shard is whole."""
        writer, shard = self.writer, self.shard
        if self.is_npy:
            path, moments = shard_path(writer.folder, shard, ".npy"), self.moments[: len(self.kept)]
            with writer.writing(), atomic_write(path) as file:
                np.save(whole := io.BytesIO(), moments)
                file.write(whole.getbuffer())  # np.save itself does not say why it fails
            digest = sha256(path)
        else:
            self.kept = sorted(set(self.images) - set(writer.missing(shard)))
            files = (writer.npz_path(writer.names[i]) for i in self.kept)
            moments = np.array([read_moments(file) for file in files], np.float32)
            digest = hashlib.sha256(moments.tobytes()).hexdigest()
        self._sum_up(moments, 1)
        parts = self.statistics
        sidecar = {
            "cache_id": writer.settings.cache_id,
            "shard": shard,
            "sha256": digest,
            "statistics": sum(parts[1:], parts[0]).to_dict() if parts else None,
            "skipped": [writer.names[i] for i in sorted(set(self.images) - set(self.kept))],
            "names": [writer.names[i] for i in self.kept],
            "labels": [writer.labels[i] for i in self.kept],
            "crc32": [zlib.crc32(view) for image in moments for view in image],
        }
        with writer.writing():
            write_json(shard_path(writer.folder, shard, ".json"), sidecar)

    def _sum_up(self, moments: np.ndarray, fewest: int = STATS_IMAGES) -> None:
        """moments: [n, 2, 2C, h, w], all so far. Steps of fewer images than `fewest` wait."""
        while len(rest := moments[len(self.statistics) * STATS_IMAGES :]) >= fewest:
            both_views = torch.tensor(rest[:STATS_IMAGES]).flatten(0, 1)  # as training meets them
            self.statistics.append(LatentStats.of(both_views))


def write_json(path: Path, value: dict) -> None:
    """A JSON file of a cache, with its checksum."""
    with atomic_write(path) as file:
        signed = value | {CHECKSUM: json_digest(value)}
        file.write((json.dumps(signed, indent=1) + "\n").encode())


def verify(path: str | Path) -> CachedLatents:
    """Read all of a cache and compare the checksums, which a published one has not."""
    cache = open_cache(path)
    if cache.files:
        for index in tqdm(range(len(cache)), "reading", disable=None):
            cache.__getitems__([(index, False), (index, True)])
        return cache
    said = zip(tqdm(cache.paths, "reading", disable=None), cache.manifest["shards"], strict=True)
    if damaged := [Path(file).stem for file, entry in said if sha256(file) != entry["sha256"]]:
        remedy = "remove the files of these shards and run main_cache.py again"
        raise UserError(f"--cached_path {path}: wrong checksums in {', '.join(damaged)}; {remedy}")
    return cache
