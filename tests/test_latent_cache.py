"""A cache gives back what was put in, goes on where it stopped, and is never mixed or believed."""

import errno
import json
import pickle
import resource
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from models.config import PUBLISHED_CHANNEL_ORDER, PUBLISHED_LATENT_SCALE
from util.data import cache_writer
from util.data.arrays import allow_open_files
from util.data.batches import Batches, MicroBatchSampler
from util.data.cache_files import json_digest
from util.data.cache_writer import CacheSettings, CacheWriter, list_digest
from util.data.latent_cache import as_one_batch, open_cache, verify
from util.data.statistics import LatentStats
from util.errors import UserError

C, H, W = 3, 4, 5
NAMES = [f"{name}/{i}.png" for name in ("ant", "bee") for i in range(5)]
LABELS = [0] * 5 + [1] * 5
MOMENTS = np.random.default_rng(0).normal(size=(10, 2, 2 * C, H, W)).astype(np.float32)
SETTINGS = CacheSettings(
    format="npy",
    dtype="float32",
    shard_size=4,
    image_size=16,
    vae_sha256="ab" * 32,
    vae_config={"embed_dim": C, "ch_mult": (1, 1)},
    vae_stride=4,
    classes=["ant", "bee"],
    images_sha256=list_digest(NAMES, LABELS),
)
FORMS = pytest.mark.parametrize("form", ["npy", "npz"])


def writer_for(path: Path, **changes) -> CacheWriter:
    return CacheWriter(str(path), replace(SETTINGS, **changes), NAMES, LABELS)


def batches(images: list[int]):
    """What the encoder would hand over, in batches of three."""
    for i in range(0, len(images), 3):
        yield images[i : i + 3], MOMENTS[images[i : i + 3]]


def fill(path: Path, bad: tuple[int, ...] = (), **changes) -> list[int]:
    """Write what is missing, without the bad images; return the numbers of those encoded."""
    writer = writer_for(path, **changes)
    encoded = []
    for shard in writer.pending():
        images = [i for i in writer.missing(shard) if i not in bad]
        writer.write_shard(shard, batches(images))
        encoded += images
    writer.write_manifest(published_constants=False)
    return encoded


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def rewrite(path: Path, **changes) -> None:
    """Change a JSON file as somebody would who knows its checksum; None removes an entry."""
    value = {k: v for k, v in (json.loads(path.read_text()) | changes).items() if v is not None}
    value["checksum"] = json_digest({k: v for k, v in value.items() if k != "checksum"})
    path.write_text(json.dumps(value))


def complaint(action, *args, **kwargs) -> str:
    with pytest.raises(UserError) as error:
        action(*args, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


# --- what goes in comes out


@FORMS
def test_float32_caches_give_back_every_number(tmp_path, form):
    fill(tmp_path, format=form)
    cache = open_cache(tmp_path, img_size=16, vae_sha256="ab" * 32)
    assert len(cache) == 10 and cache.classes == ["ant", "bee"]
    assert cache.latent_shape == (C, H, W) and cache.manifest["count"] == 10
    for i in range(10):
        for flip in (False, True):
            moments, label = cache[(i, flip)]
            assert moments.dtype == torch.float32 and label == LABELS[i]
            np.testing.assert_array_equal(moments.numpy(), MOMENTS[i, int(flip)])
    assert torch.equal(cache[3][0], cache[(3, False)][0])
    with pytest.raises(IndexError):
        cache[10]


@FORMS
@pytest.mark.parametrize("collate_fn", [None, as_one_batch])
@pytest.mark.parametrize("num_workers", [0, 1])
def test_batches_are_the_items_to_the_bit_in_the_stored_dtype(
    tmp_path, form, num_workers, collate_fn
):
    stored = torch.float16 if form == "npy" else torch.float32
    fill(tmp_path, format=form, dtype=str(stored).removeprefix("torch."))
    cache = open_cache(tmp_path)
    keys = list(MicroBatchSampler(Batches(3, 1, 10, seed=0), range(5), 0, 1))
    loader = DataLoader(cache, batch_sampler=keys, num_workers=num_workers, collate_fn=collate_fn)
    for (moments, labels), chosen in zip(loader, keys, strict=True):
        assert moments.dtype == stored and moments.shape == (3, 2 * C, H, W)
        assert labels.dtype == torch.int64 and labels.tolist() == [LABELS[i] for i, _ in chosen]
        expected = MOMENTS[[i for i, _ in chosen], [int(flip) for _, flip in chosen]]
        assert torch.equal(moments, torch.from_numpy(expected).to(stored))
        for view, label, key in zip(moments, labels, chosen, strict=True):
            assert torch.equal(view, cache[key][0]) and label == cache[key][1]


def test_float16_shards_are_rounded_and_half_as_large(tmp_path):
    fill(tmp_path, dtype="float16")
    stored = np.load(tmp_path / "shard-00001.npy", allow_pickle=False)
    assert stored.dtype == np.float16 and stored.shape == (4, 2, 2 * C, H, W)
    np.testing.assert_array_equal(stored, MOMENTS[4:8].astype(np.float16))
    moments, _ = open_cache(tmp_path)[(5, True)]
    np.testing.assert_allclose(moments.numpy(), MOMENTS[5, 1], rtol=1e-3, atol=1e-6)


def test_npz_files_are_of_the_published_form(tmp_path):
    fill(tmp_path, format="npz")
    with np.load(tmp_path / "bee" / "2.png.npz", allow_pickle=False) as file:
        assert set(file.files) == {"moments", "moments_flip"}
        assert file["moments"].dtype == np.float32
        np.testing.assert_array_equal(file["moments"], MOMENTS[7, 0])
        np.testing.assert_array_equal(file["moments_flip"], MOMENTS[7, 1])


def test_published_cache_without_manifest_is_read(tmp_path):
    for i in (7, 1):
        (tmp_path / NAMES[i]).parent.mkdir()
        views = {"moments": MOMENTS[i, 0], "moments_flip": MOMENTS[i, 1]}
        np.savez(tmp_path / f"{NAMES[i]}.npz", **views)
    cache = open_cache(tmp_path)
    assert cache.manifest is None and cache.classes == ["ant", "bee"]
    assert cache.latent_shape == (C, H, W) and len(cache) == 2
    moments, label = cache[(1, True)]
    assert label == 1
    np.testing.assert_array_equal(moments.numpy(), MOMENTS[7, 1])
    assert len(verify(tmp_path)) == 2


def test_pickled_for_a_worker_the_shards_stay_on_disk(tmp_path):
    fill(tmp_path)
    cache = open_cache(tmp_path)
    copy = pickle.loads(pickle.dumps(cache))
    assert len(pickle.dumps(cache)) < MOMENTS.nbytes / 2
    assert torch.equal(copy[(9, True)][0], cache[(9, True)][0])


@FORMS
def test_unreadable_images_are_left_out_and_named(tmp_path, form):
    bad = (0, 4, 5, 6, 7)  # the whole of shard 1
    fill(tmp_path, bad, format=form)
    cache = verify(tmp_path)
    assert cache.manifest["skipped"] == [NAMES[i] for i in bad]
    kept = [1, 2, 3, 8, 9]
    assert cache.labels.tolist() == [LABELS[i] for i in kept]
    for position, i in enumerate(kept):
        np.testing.assert_array_equal(cache[position][0].numpy(), MOMENTS[i, 0])


def test_a_cache_without_a_readable_image_is_refused(tmp_path):
    assert "none of the 10 images" in complaint(fill, tmp_path, tuple(range(10)))


@FORMS
def test_manifest_holds_scale_and_order_of_all_latents(tmp_path, form):
    fill(tmp_path, format=form)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    stats = LatentStats.of(torch.from_numpy(MOMENTS).flatten(0, 1))
    assert manifest["latent_scale"] == pytest.approx(stats.latent_scale())
    assert manifest["channel_order"] == stats.channel_order()
    assert manifest["channel_std"] == pytest.approx(stats.channel_std().tolist())
    assert manifest["latent_scale"] == manifest["measured_latent_scale"]


def test_kl16_gets_the_published_constants_beside_the_measured(tmp_path):
    wide = np.random.default_rng(1).normal(size=(10, 2, 32, 2, 2)).astype(np.float32)
    writer = writer_for(tmp_path, shard_size=10)
    writer.write_shard(0, [(list(range(10)), wide)])
    manifest = writer.write_manifest(published_constants=True)
    assert open_cache(tmp_path).manifest == manifest
    assert manifest["latent_scale"] == PUBLISHED_LATENT_SCALE
    assert manifest["channel_order"] == list(PUBLISHED_CHANNEL_ORDER)
    stats = LatentStats.of(torch.from_numpy(wide).flatten(0, 1))
    assert manifest["measured_latent_scale"] == pytest.approx(stats.latent_scale())
    assert manifest["measured_channel_order"] == stats.channel_order()


# --- going on


@FORMS
def test_only_what_is_missing_is_written_again_and_identically(tmp_path, form):
    assert fill(tmp_path, format=form) == list(range(10))
    before = contents(tmp_path)
    assert fill(tmp_path, format=form) == []

    (tmp_path / "manifest.json").unlink()
    (tmp_path / "shard-00001.json").unlink()  # killed before it was declared whole
    (tmp_path / "shard-00002.npy").unlink(missing_ok=True)
    (tmp_path / "bee" / "3.png.npz").unlink(missing_ok=True)
    (tmp_path / ".shard-00001.npy.123.tmp").write_bytes(b"half")
    expected = [4, 5, 6, 7, 8, 9] if form == "npy" else [8]  # complete npz files are kept
    assert fill(tmp_path, format=form) == expected
    assert contents(tmp_path) == before


def test_each_shard_stands_for_the_same_images_whoever_writes_it(tmp_path):
    for name, order in (("one", [0, 1, 2]), ("two", [2, 0, 1])):
        writer = writer_for(tmp_path / name)
        for shard in order:
            writer.write_shard(shard, batches(writer.missing(shard)))
        writer.write_manifest(published_constants=False)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


@pytest.mark.parametrize(
    "changes",
    [
        {"vae_sha256": "cd" * 32},
        {"image_size": 32},
        {"dtype": "float16"},
        {"shard_size": 5},
        {"images_sha256": "00"},
        {"format": "npz"},
    ],
)
def test_a_folder_of_other_settings_is_refused_unchanged(tmp_path, changes):
    fill(tmp_path)
    before = contents(tmp_path)
    message = complaint(writer_for, tmp_path, **changes)
    assert "--cached_path" in message and next(iter(changes)) in message
    assert contents(tmp_path) == before


def test_a_shard_of_another_cache_is_refused(tmp_path):
    fill(tmp_path / "mine")
    fill(tmp_path / "other", vae_sha256="cd" * 32)
    for suffix in ("json", "npy"):
        shutil.copy(tmp_path / "other" / f"shard-00001.{suffix}", tmp_path / "mine")
    assert "shard-00001.json" in complaint(writer_for(tmp_path / "mine").pending)
    assert "shard-00001.json" in complaint(open_cache, tmp_path / "mine")


def test_a_folder_with_other_files_is_not_touched(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    assert "thesis.tex" in complaint(writer_for, tmp_path)
    assert "cannot write into" in complaint(writer_for, tmp_path / "thesis.tex" / "cache")


def test_values_beyond_float16_are_refused_before_anything_is_written(tmp_path):
    writer = writer_for(tmp_path / "cache", dtype="float16")
    huge = np.full_like(MOMENTS[:4], 1e5)
    assert "--dtype float32" in complaint(writer.write_shard, 0, [([0, 1, 2, 3], huge)])
    assert not (tmp_path / "cache").exists()


@FORMS
def test_a_full_disk_leaves_nothing_half_written(tmp_path, form, monkeypatch):
    def full(file, *args, **kwargs):
        file.write(b"the first part")
        raise OSError(errno.ENOSPC, "No space left on device")

    writer = writer_for(tmp_path, format=form)
    writer.write_shard(0, batches(writer.missing(0)))
    before = contents(tmp_path)
    with monkeypatch.context() as patch:
        where = (cache_writer, "write_array") if form == "npy" else (cache_writer.np, "savez")
        patch.setattr(*where, full)
        assert "No space left" in complaint(writer.write_shard, 1, batches(writer.missing(1)))
    assert contents(tmp_path) == before
    assert fill(tmp_path, format=form) == [4, 5, 6, 7, 8, 9]


# --- as many shards as there may be


def test_more_shards_than_open_files_are_allowed_raise_the_limit(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    fill(tmp_path, shard_size=1)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (100, hard))
        assert len(open_cache(tmp_path)) == 10
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] >= 10 + 100
        with pytest.raises(ValueError, match="ulimit -n"):
            allow_open_files(hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
