"""The loaders: both forms of a latent cache, and JPEG images, through the loader of training.

Both caches hold the same synthetic posteriors of the published size, are written by the project's
own writer, and are read in training's order. The files are in the page cache, as those of a
training after its first epoch are where memory allows.
"""

import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from benchmarks.work import FAST, Settings, Variant, Work
from main_cache import make_parser
from util.data.batches import Batches, MicroBatchSampler
from util.data.cache_writer import FORMATS, CacheSettings, CacheWriter, list_digest
from util.data.images import ImageDataset, collate_skipping
from util.data.latent_cache import CachedLatents, as_one_batch, open_cache
from util.data.listing import list_images
from util.provenance import cores

CHANNELS, SIDE = 16, 16  # of the latents of a 256 px image
IMAGES_A_CLASS = 512
WARM_UP = 4  # batches, until the workers are there and their queues are full
BATCHES = 64  # timed
PHOTO = (500, 375)  # width and height in pixels, the most common ones of ImageNet
JPEG_QUALITY = 90


def make_cache(folder: Path, form: str, count: int) -> CachedLatents:
    """A cache of `count` images with the default dtype of its form."""
    labels = [i // IMAGES_A_CLASS for i in range(count)]
    names = [f"class{label:04d}/{i:06d}.png" for i, label in enumerate(labels)]
    settings = CacheSettings(
        format=form,
        dtype="float16" if form == "npy" else "float32",
        shard_size=1024,
        image_size=256,
        vae_sha256="0" * 64,
        vae_config={},
        vae_stride=256 // SIDE,
        classes=sorted({os.path.dirname(name) for name in names}),
        images_sha256=list_digest(names, labels),
    )
    writer = CacheWriter(str(folder), settings, names, labels)
    rng = np.random.default_rng(0)
    for shard in range(writer.num_shards):
        images = writer.missing(shard)
        shape = (len(images), 2, 2 * CHANNELS, SIDE, SIDE)
        writer.write_shard(shard, [(images, rng.standard_normal(shape, np.float32))])
    writer.write_manifest(published_constants=False)
    return open_cache(folder)


def make_photos(folder: Path, count: int, suffix: str = "jpg") -> Path:
    """data/train/CLASS/IMAGE: smooth colours and some noise, as photographs have."""
    rng = np.random.default_rng(0)
    for i in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        pixels = np.asarray(coarse.resize(PHOTO, Image.Resampling.BICUBIC), dtype=np.float32)
        pixels += rng.normal(0, 6, pixels.shape)
        path = folder / "train" / f"class{i % 2}" / f"{i:06d}.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
        image.save(path, quality=JPEG_QUALITY)  # which a PNG has none of, and passes over
    return folder


def seconds_of(
    dataset: Dataset, batch_size: int, collate: Callable | None, num_workers: int
) -> Callable[[], float]:
    """Seconds for BATCHES batches, once the workers are at it."""
    seeds = iter(range(10**6))

    def run() -> float:
        batches = Batches(batch_size, 1, len(dataset), next(seeds))
        sampler = MicroBatchSampler(batches, range(WARM_UP + BATCHES), 0, 1)
        loader = iter(
            DataLoader(dataset, batch_sampler=sampler, collate_fn=collate, num_workers=num_workers)
        )
        for _ in range(WARM_UP):
            next(loader)
        started = time.perf_counter()
        read = sum(len(labels) for _, labels in loader)
        assert read == BATCHES * batch_size
        return time.perf_counter() - started

    return run


def latent_loaders(settings: Settings, folder: Path) -> Work:
    size, workers = min(64, settings.read), max(1, cores() - 1)
    variants = []
    for form, name in zip(FORMATS, (FAST, "published form, npz"), strict=True):
        cache = make_cache(folder / form, form, settings.read)
        variants.append(Variant(name, "", seconds_of(cache, size, as_one_batch, workers)))
    title = f"latent loader, batch {size}, {workers} worker(s)"
    return Work("loaders", title, BATCHES * size, "samples", variants)


def image_loader(settings: Settings, folder: Path) -> Work:
    """JPEG through a worker for each core but one; the default number of workers, PNG."""
    size, workers = min(8, settings.photos), max(1, cores() - 1)

    def variant(name: str, suffix: str, num_workers: int) -> Variant:
        photos = list_images(folder / suffix)
        dataset = ImageDataset(photos.samples, settings.img_size, "raise")
        return Variant(name, "", seconds_of(dataset, size, collate_skipping, num_workers))

    for suffix in ("jpg", "png"):
        make_photos(folder / suffix, settings.photos, suffix)
    found = [variant(FAST, "jpg", workers)]
    more = sorted({2, make_parser().get_default("num_workers")} - {workers})
    found += [variant(f"{count} workers", "jpg", count) for count in more]
    found.append(variant("PNG", "png", workers))
    title = f"image loader, {PHOTO[0]} x {PHOTO[1]} JPEG to {settings.img_size} px"
    return Work("images", f"{title}, {workers} worker(s)", BATCHES * size, "images", found)
