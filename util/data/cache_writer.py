"""Writing a latent cache, and checking one as a whole. The files: util/data/latent_cache.py.

Shard k stands for images [k*S, (k+1)*S) of the sorted list, whoever writes it, so any number of
processes can go on where others were stopped.
Letters: n images of a shard, S its size, b of a batch, C latent channels, h, w positions.
"""

import hashlib
import json
import math
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from numpy.lib import format as npy

from models.config import PUBLISHED_CHANNEL_ORDER, PUBLISHED_LATENT_SCALE
from util.args import CONFIG
from util.data.latent_cache import (
    CHECKSUM,
    MANIFEST,
    NPZ_NAMES,
    SETTINGS,
    json_digest,
    read_json,
    read_sidecar,
    shard_path,
)
from util.data.statistics import LatentStats
from util.errors import UserError, as_user_error
from util.files import atomic_write, check_writable, listed, sha256

STATS_IMAGES = 256  # images a step of the statistics, to bound its memory


def list_digest(names: list[str], labels: list[int]) -> str:
    return hashlib.sha256(json.dumps([names, labels]).encode()).hexdigest()


class CacheWriter:
    """Fills one folder with the posteriors of a list of images, shard by shard.

    settings: all that decides what the cache holds, as docs/data.md lists it. names: the images'
    paths relative to the folder of classes; labels: their classes' numbers.
    Raises UserError if the folder holds anything but (a part of) the cache with these settings.
    """

    def __init__(self, path: str, settings: dict, names: list[str], labels: list[int]):
        self.folder, self.names, self.labels = Path(path), names, labels
        self.settings = settings = json.loads(json.dumps(settings))  # as it is read, without tuples
        # What the shards of one cache have in common, and those of no other.
        self.cache_id = hashlib.sha256(json.dumps(settings).encode()).hexdigest()
        self.is_npy, self.shard_size = settings["format"] == "npy", settings["shard_size"]
        self.num_shards = math.ceil(len(names) / self.shard_size)
        check_writable(self.folder, "--cached_path")
        files = os.listdir(self.folder) if self.folder.exists() else []
        others = [name for name in files if not name.startswith(".") and name != CONFIG]
        if SETTINGS in others:
            before = read_json(self.folder / SETTINGS)
            differ = [name for name in before | settings if before.get(name) != settings.get(name)]
            others = [f"a cache of {name} {before.get(name)!s:.40}" for name in differ]
        if others:
            raise UserError(f"--cached_path {path} holds {listed(others)}; name a new folder")

    def pending(self) -> list[int]:
        """The shards that are not whole."""
        return [shard for shard in range(self.num_shards) if not self._is_whole(shard)]

    def _is_whole(self, shard: int) -> bool:
        if not shard_path(self.folder, shard, ".json").exists():
            return False
        names = read_sidecar(self.folder, shard, self.cache_id)["names"]
        return all(map(os.path.isfile, self.files(shard, names)))

    def files(self, shard: int, names: list[str]) -> list[Path]:
        """What holds the posteriors of a shard's images."""
        if self.is_npy:
            return [shard_path(self.folder, shard, ".npy")]
        return [self.folder / f"{name}.npz" for name in names]

    def images(self, shard: int) -> range:
        """The numbers of a shard's images."""
        return range(len(self.names))[shard * self.shard_size : (shard + 1) * self.shard_size]

    @contextmanager
    def writing(self) -> Iterator[None]:
        """The settings come first, and only when there is something to write."""
        with as_user_error(f"--cached_path {self.folder}: cannot write", (OSError, ValueError)):
            if not (self.folder / SETTINGS).exists():
                self.folder.mkdir(parents=True, exist_ok=True)
                write_json(self.folder / SETTINGS, self.settings)
            yield

    def stored(self, moments: np.ndarray) -> np.ndarray:
        """As the files hold them. Raises UserError if values do not fit the dtype."""
        with np.errstate(over="ignore"):
            stored = moments.astype(self.settings["dtype"], order="C")
        if not np.isfinite(stored).all():
            said = f"the VAE gives values that are not finite in {stored.dtype}"
            raise UserError(f"{said}; check --vae_path, or pass --dtype float32")
        return stored

    def write_shard(self, shard: int, kept: list[int], batches: list[np.ndarray]) -> None:
        """kept: numbers of its images that could be read. batches: `stored` [b, 2, 2C, h, w] of
        these. Raises UserError if the disk refuses.
        """
        moments = np.concatenate(batches) if kept else np.empty(0, self.settings["dtype"])
        starts = range(0, len(moments), STATS_IMAGES)
        steps = (torch.tensor(moments[i : i + STATS_IMAGES]) for i in starts)
        parts = [LatentStats.of(both.flatten(0, 1)) for both in steps]  # as training meets them
        names = [self.names[i] for i in kept]
        files = self.files(shard, names)
        with self.writing():
            if self.is_npy:
                with atomic_write(files[0]) as file:  # np.save would not say why it fails
                    npy.write_array_header_1_0(file, npy.header_data_from_array_1_0(moments))
                    file.write(moments)
            else:
                for path, views in zip(files, moments, strict=True):
                    path.parent.mkdir(parents=True, exist_ok=True)
                    with atomic_write(path) as file:
                        np.savez(file, **dict(zip(NPZ_NAMES, views, strict=True)))
            sidecar = {
                "cache_id": self.cache_id,
                "shard": shard,
                "statistics": sum(parts[1:], parts[0]).to_dict() if parts else None,
                "names": names,
                "labels": [self.labels[i] for i in kept],
                "crc32": [zlib.crc32(view) for image in moments for view in image],
            }
            # From here on the shard is whole.
            write_json(shard_path(self.folder, shard, ".json"), sidecar)

    def write_manifest(self, published_constants: bool, normalised: bool = False) -> dict:
        """Declare the cache whole, when all shards are. For one process to call, after all others.

        published_constants: take the scale and channel order that the released models were trained
        with, since the VAE is KL-16; what is measured stands beside them. normalised: see `VAE`.
        """
        folder, cache_id, shards = self.folder, self.cache_id, range(self.num_shards)
        sidecars = [read_sidecar(folder, shard, cache_id) for shard in shards]
        digests = [sha256(shard_path(folder, shard, ".json")) for shard in shards]
        names = {name for sidecar in sidecars for name in sidecar["names"]}
        parts = [LatentStats.from_dict(s["statistics"]) for s in sidecars if s["names"]]
        if not parts:
            raise UserError(f"none of the {len(self.names)} images can be read; see --data_path")
        stats = sum(parts[1:], parts[0])
        scale, order = stats.latent_scale(), stats.channel_order()
        manifest = {
            **self.settings,
            "cache_id": cache_id,
            "count": len(names),
            "latent_shape": list(stats.latent_shape),
            "latent_scale": PUBLISHED_LATENT_SCALE if published_constants else scale,
            "channel_order": list(PUBLISHED_CHANNEL_ORDER) if published_constants else order,
            "measured_latent_scale": scale,
            "measured_channel_order": order,
            "channel_mean": stats.channel_mean().tolist(),
            "channel_std": stats.channel_std(of_means=normalised).tolist(),
            "normalised": normalised,
            "channel_low_frequency_share": stats.low_frequency_share().tolist(),
            "histogram": stats.histogram.to_dict(),
            "skipped": [name for name in self.names if name not in names],
            "shards": [{"sidecar_sha256": digest} for digest in digests],
        }
        with self.writing():
            write_json(folder / MANIFEST, manifest)
            for left in folder.rglob(".*.tmp"):  # by killed processes
                left.unlink()
        return manifest


def write_json(path: Path, value: dict) -> None:
    """A JSON file of a cache, with its checksum."""
    with atomic_write(path) as file:
        signed = value | {CHECKSUM: json_digest(value)}
        file.write((json.dumps(signed, indent=1) + "\n").encode())
