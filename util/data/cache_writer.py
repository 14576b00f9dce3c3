"""Writing a latent cache: what it will hold, its shards one by one, and at the end the manifest.

The files are those that `util.data.cache_files` describes. Settings come first, as soon as there is
something to write; a shard is whole with its .json file, the cache with manifest.json.
Letters: n images of a shard, b of a batch, C latent channels, h, w positions.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch

from models.config import PUBLISHED_CHANNEL_ORDER, PUBLISHED_LATENT_SCALE
from util.config_file import CONFIG
from util.data.cache_files import (
    FORMAT_VERSION,
    MANIFEST,
    NPZ_NAMES,
    SETTINGS,
    check_inside,
    load_shard,
    npz_path,
    read_json,
    read_sidecar,
    shard_digest,
    shard_path,
    unreadable,
    view_crc,
    write_json,
)
from util.data.statistics import LatentStats
from util.errors import UserError, as_user_error
from util.files import atomic_write, check_writable, sha256

STATS_IMAGES = 256  # images a step of the statistics, to bound its memory

# What the encoder hands over: numbers of the images, their moments [b, 2, 2C, h, w] float32.
Batch = tuple[list[int], np.ndarray]


@dataclass(frozen=True)
class CacheSettings:
    """All that decides what a cache holds: two with equal settings are the same cache."""

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
    """SHA-256 of the images' names and labels, in order."""
    return hashlib.sha256(json.dumps([names, labels]).encode()).hexdigest()


class CacheWriter:
    """Fills one folder with the posteriors of a list of images, shard by shard.

    names: the images' paths relative to the folder of classes; labels: their classes' numbers.
    Raises UserError if the folder holds anything but (a part of) the cache with these settings.
    """

    def __init__(self, path: str, settings: CacheSettings, names: list[str], labels: list[int]):
        self.folder = Path(path)
        self.settings = settings
        self.names = names
        self.labels = labels
        self._check_folder()

    def _check_folder(self) -> None:
        folder = self.folder
        check_writable(folder, "--cached_path")
        if not folder.exists():
            return
        names = (entry.name for entry in folder.iterdir())
        visible = [name for name in names if not name.startswith(".") and name != CONFIG]
        if SETTINGS in visible:
            self._check_settings(read_json(folder / SETTINGS))
        # Without settings, every shard still says what it belongs to.
        elif visible and not any(folder.glob("shard-*.json")):
            raise UserError(
                f"--cached_path {self.folder} holds other files already ({visible[0]}); "
                "name a folder that is new or was begun by main_cache.py"
            )

    def _check_settings(self, found: dict) -> None:
        mine = self.settings.to_dict()
        differences = [
            f"{key} is {str(found.get(key))[:40]}, not {str(mine.get(key))[:40]}"
            for key in {**mine, **found}
            if mine.get(key) != found.get(key)
        ]
        if differences:
            raise UserError(
                f"--cached_path {self.folder} holds a cache with other settings: "
                f"{'; '.join(differences)}; name another folder or remove this one"
            )

    @property
    def num_shards(self) -> int:
        return math.ceil(len(self.names) / self.settings.shard_size)

    def pending(self) -> list[int]:
        """The shards still to be written, after removing what killed processes left unfinished.

        For one process alone to call, before any of them writes. Raises UserError if the folder
        has been filled with something else in the meantime.
        """
        self._check_folder()
        for unfinished in self.folder.rglob(".*.tmp"):
            unfinished.unlink()
        return self.unfinished()

    def unfinished(self) -> list[int]:
        """The shards that are not whole."""
        return [shard for shard in range(self.num_shards) if not self._is_whole(shard)]

    def _is_whole(self, shard: int) -> bool:
        if not shard_path(self.folder, shard, ".json").exists():
            return False
        kept = read_sidecar(self.folder, shard, self.settings.cache_id)["names"]
        if self.settings.format == "npz":
            return all(os.path.isfile(npz_path(self.folder, name)) for name in kept)
        return os.path.isfile(shard_path(self.folder, shard, ".npy"))

    def images(self, shard: int) -> range:
        """Numbers of the images that a shard stands for."""
        start = shard * self.settings.shard_size
        return range(start, min(start + self.settings.shard_size, len(self.names)))

    def missing(self, shard: int) -> list[int]:
        """Numbers of the images that must be encoded to write a pending shard."""
        if self.settings.format == "npy":
            return list(self.images(shard))
        files = {i: npz_path(self.folder, self.names[i]) for i in self.images(shard)}
        return [i for i, file in files.items() if not os.path.isfile(file)]

    def write_shard(self, shard: int, batches: Iterable[Batch]) -> None:
        """Write a shard from batches that hold the images in `missing`, but for unreadable ones."""
        filled = self.begin(shard)
        for images, moments in batches:
            filled.take(images, moments)
        filled.finish()

    def begin(self, shard: int) -> "ShardWriter":
        return {"npy": NpyShard, "npz": NpzShard}[self.settings.format](self, shard)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Says first, and only when there is something to write, what the folder is filled with."""
        with as_user_error(f"--cached_path {self.folder}: cannot write", (OSError, ValueError)):
            if not (self.folder / SETTINGS).exists():
                self.folder.mkdir(parents=True, exist_ok=True)
                write_json(self.folder / SETTINGS, self.settings.to_dict())
            yield

    def stored(self, moments: np.ndarray) -> np.ndarray:
        with np.errstate(over="ignore"):
            stored = moments.astype(self.settings.dtype)
        if not np.isfinite(stored).all():
            raise UserError(
                f"the VAE gives values that are not finite in {self.settings.dtype}; check "
                "--vae_path, or pass --dtype float32"
            )
        return stored

    def write_manifest(self, published_constants: bool) -> dict:
        """Declare the cache whole, when all shards are.

        published_constants: the VAE is KL-16, whose scale and channel order are those that the
        released models were trained with; what is measured here then stands beside them.
        """
        folder, cache_id = self.folder, self.settings.cache_id
        sidecars = [read_sidecar(folder, shard, cache_id) for shard in range(self.num_shards)]
        with as_user_error(unreadable(folder / "shard-*.json"), (Exception,)):
            parts = [LatentStats.from_dict(s["statistics"]) for s in sidecars if s["names"]]
        if not parts:
            raise UserError(f"none of the {len(self.names)} images can be read; see --data_path")
        stats = sum(parts[1:], parts[0])
        measured = {"latent_scale": stats.latent_scale(), "channel_order": stats.channel_order()}
        published = {
            "latent_scale": PUBLISHED_LATENT_SCALE,
            "channel_order": list(PUBLISHED_CHANNEL_ORDER),
        }
        manifest = {
            **self.settings.to_dict(),
            "cache_id": cache_id,
            "count": sum(len(sidecar["names"]) for sidecar in sidecars),
            "latent_shape": list(stats.latent_shape),
            **(published if published_constants else measured),
            **{f"measured_{key}": value for key, value in measured.items()},
            "channel_mean": stats.channel_mean().tolist(),
            "channel_std": stats.channel_std().tolist(),
            "channel_low_frequency_share": stats.low_frequency_share().tolist(),
            "histogram": stats.histogram.to_dict() if stats.histogram else None,
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

    Statistics are summed in steps of STATS_IMAGES however large the batches are, an npy shard's
    while it fills. Training meets images and mirror images alike, so both count.
    Raises UserError if the disk refuses, or if values do not fit the dtype.
    """

    def __init__(self, writer: CacheWriter, shard: int):
        self.writer = writer
        self.shard = shard
        self.statistics: list[LatentStats] = []

    def take(self, images: list[int], moments: np.ndarray) -> None:
        """moments: [b, 2, 2C, h, w] float32."""
        raise NotImplementedError

    def _kept(self) -> list[int]:
        """Write what is left to write; numbers of all images in the shard."""
        raise NotImplementedError

    def finish(self) -> None:
        """From here on the shard is whole."""
        kept, writer, shard = self._kept(), self.writer, self.shard
        form, names = writer.settings.format, [writer.names[i] for i in kept]
        moments = load_shard(writer.folder, form, shard, names)
        self._sum_up(moments, 1)
        parts = self.statistics
        sidecar = {
            "cache_id": writer.settings.cache_id,
            "shard": shard,
            "sha256": shard_digest(writer.folder, form, shard, moments),
            "statistics": sum(parts[1:], parts[0]).to_dict() if parts else None,
            "skipped": [writer.names[i] for i in sorted(set(writer.images(shard)) - set(kept))],
            "names": names,
            "labels": [writer.labels[i] for i in kept],
            "crc32": [view_crc(view) for image in moments for view in image],
        }
        with writer.writing():
            write_json(shard_path(writer.folder, shard, ".json"), sidecar)

    def _sum_up(self, moments: np.ndarray, fewest: int = STATS_IMAGES) -> None:
        """moments: [n, 2, 2C, h, w], all so far. Steps of fewer images than `fewest` wait."""
        while len(rest := moments[len(self.statistics) * STATS_IMAGES :]) >= fewest:
            step = torch.tensor(rest[:STATS_IMAGES])
            self.statistics.append(LatentStats.of(step.flatten(0, 1)))


class NpyShard(ShardWriter):
    """Held in memory, once, until it is full."""

    def __init__(self, writer: CacheWriter, shard: int):
        super().__init__(writer, shard)
        self.kept: list[int] = []
        self.moments = np.empty(0, writer.settings.dtype)

    def take(self, images: list[int], moments: np.ndarray) -> None:
        stored = self.writer.stored(moments)
        if not self.kept:
            size = len(self.writer.images(self.shard))
            self.moments = np.empty((size, *stored.shape[1:]), stored.dtype)
        self.moments[len(self.kept) : len(self.kept) + len(images)] = stored
        self.kept += images
        self._sum_up(self.moments[: len(self.kept)])

    def _kept(self) -> list[int]:
        path = shard_path(self.writer.folder, self.shard, ".npy")
        with self.writer.writing(), atomic_write(path) as file:
            write_array(file, self.moments[: len(self.kept)])
        return self.kept


class NpzShard(ShardWriter):
    """One file an image, written as it comes; what a stopped job has left stays."""

    def __init__(self, writer: CacheWriter, shard: int):
        super().__init__(writer, shard)
        self.missing = set(writer.missing(shard))

    def take(self, images: list[int], moments: np.ndarray) -> None:
        writer = self.writer
        for i, of_image in zip(images, writer.stored(moments), strict=True):
            if i in self.missing:
                with writer.writing():
                    check_inside(writer.folder, [writer.names[i]])
                    write_npz(npz_path(writer.folder, writer.names[i]), of_image)

    def _kept(self) -> list[int]:
        return sorted(set(self.writer.images(self.shard)) - set(self.writer.missing(self.shard)))


def write_array(file: BinaryIO, array: np.ndarray) -> None:
    """As np.save, which on a full disk only says how many numbers it could not write."""
    header = np.lib.format.header_data_from_array_1_0(array)
    np.lib.format.write_array_header_1_0(file, header)
    file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8))


def write_npz(path: Path, moments: np.ndarray) -> None:
    """moments: [2, 2C, h, w] float32, of the image and of its mirror image."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        np.savez(file, **dict(zip(NPZ_NAMES, moments, strict=True)))
