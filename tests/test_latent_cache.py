"""A cache gives back what was put in, goes on where it stopped, and is never mixed or believed."""

import errno
import json
import os
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
from util import cache_writer
from util.arrays import allow_open_files
from util.cache_files import json_digest
from util.cache_writer import CacheSettings, CacheWriter, list_digest
from util.data import MicroBatchSampler
from util.errors import UserError
from util.latent_cache import as_one_batch, open_cache, verify
from util.latent_stats import LatentStats

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
    keys = list(MicroBatchSampler(10, 3, 1, 0, 1, seed=0, first_step=0, num_steps=5))
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


# --- what is not believed


def test_missing_and_unfinished_caches_are_refused(tmp_path):
    assert "not a folder" in complaint(open_cache, tmp_path / "none")
    (tmp_path / "empty").mkdir()
    assert "no cache" in complaint(open_cache, tmp_path / "empty")
    (tmp_path / "images" / "ant").mkdir(parents=True)
    assert "ant" in complaint(open_cache, tmp_path / "images")
    for form in ("npy", "npz"):
        fill(tmp_path / form, format=form)
        (tmp_path / form / "manifest.json").unlink()
        assert "not finished" in complaint(open_cache, tmp_path / form)
        (tmp_path / form / "settings.json").unlink()
        assert "not finished" in complaint(open_cache, tmp_path / form)


def test_a_cache_for_another_vae_or_image_size_is_refused(tmp_path):
    fill(tmp_path)
    assert "--img_size 32" in complaint(open_cache, tmp_path, img_size=32)
    assert "--vae_path" in complaint(open_cache, tmp_path, vae_sha256="cd" * 32)


@pytest.mark.parametrize("name", ["shard-00001.npy", "shard-00002.json"])
def test_verify_names_a_shard_with_one_wrong_byte(tmp_path, name):
    fill(tmp_path)
    verify(tmp_path)
    content = bytearray((tmp_path / name).read_bytes())
    position = len(content) - 20 if name.endswith("npy") else content.index(b"bee/3") + 4
    content[position] ^= 1
    (tmp_path / name).write_bytes(content)
    assert name.split(".")[0] in complaint(verify, tmp_path)


def test_verify_names_a_damaged_or_exchanged_npz(tmp_path):
    fill(tmp_path, format="npz")
    verify(tmp_path)
    file, other = tmp_path / "bee" / "1.png.npz", tmp_path / "bee" / "2.png.npz"
    content = file.read_bytes()
    shutil.copy(other, file)
    assert "shard-00001" in complaint(verify, tmp_path)
    file.write_bytes(content[:200] + bytes([content[200] ^ 1]) + content[201:])
    assert "1.png.npz" in complaint(verify, tmp_path)


def test_damaged_shards_are_named_when_the_cache_is_opened(tmp_path):
    fill(tmp_path)
    path = tmp_path / "shard-00001.npy"
    whole = path.read_bytes()
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    pickled = (tmp_path / "objects.npy").read_bytes()
    (tmp_path / "objects.npy").unlink()
    for content in (b"", whole[:50], whole[:-1], pickled, b"\x00" * 4096):
        path.write_bytes(content)
        assert "shard-00001.npy" in complaint(open_cache, tmp_path)
    path.unlink()
    assert "shard-00001.npy" in complaint(open_cache, tmp_path)
    np.save(path, MOMENTS[4:8, :, :, :2])
    assert "unlike the manifest" in complaint(open_cache, tmp_path)


class Trap:
    """Runs code of its own when it is unpickled."""

    def __reduce__(self):
        return (pytest.exit, ("a pickle was executed",))


def test_damaged_npz_files_are_named_and_never_unpickled(tmp_path, monkeypatch):
    fill(tmp_path, format="npz")
    path = tmp_path / "ant" / "3.png.npz"
    cache = open_cache(tmp_path)
    whole = path.read_bytes()
    trap = np.array([Trap()], dtype=object)
    path.write_bytes(whole[: len(whole) // 2])
    assert "3.png.npz" in complaint(lambda: cache[3])
    for arrays in (
        {"moments": trap, "moments_flip": trap},
        {"something_else": MOMENTS[0, 0]},
        {"moments": MOMENTS[0, 0, :, :2]},
        {"moments": MOMENTS[0, 0, :3]},
        {"moments": MOMENTS[0, 0].astype(int)},
    ):
        np.savez(path, **arrays)
        assert "3.png.npz" in complaint(lambda: cache[3])
    path.write_bytes(whole)
    monkeypatch.setattr("util.cache_files.MAX_NPZ_BYTES", 100)
    assert "unpacks to more than 100 bytes" in complaint(lambda: cache[3])


def test_names_that_lead_out_of_the_folder_are_refused(tmp_path):
    fill(tmp_path, format="npz")
    sidecar = tmp_path / "shard-00000.json"
    names = json.loads(sidecar.read_text())["names"]
    for name in ("../../etc/passwd", "/etc/passwd", "ant/../../x", "..", "a\0b", "", "../" * 9999):
        rewrite(sidecar, names=[name, *names[1:]])
        assert "leads out of the folder" in complaint(open_cache, tmp_path)
        assert "leads out of the folder" in complaint(writer_for(tmp_path, format="npz").pending)


def test_links_that_lead_out_of_the_folder_are_not_followed(tmp_path):
    cache, outside = tmp_path / "cache", tmp_path / "outside"
    fill(cache, format="npz")
    (cache / "bee" / "0.png.npz").rename(tmp_path / "0.npz")
    (cache / "bee" / "0.png.npz").symlink_to(tmp_path / "0.npz")
    assert "symbolic link" in complaint(lambda: open_cache(cache)[5])
    assert "symbolic link" in complaint(verify, cache)
    (cache / "ant").rename(outside)
    (cache / "ant").symlink_to(outside)
    assert "a link on the way to 'ant/" in complaint(open_cache, cache)


def test_nothing_is_written_through_a_link_that_leads_out(tmp_path):
    cache, outside = tmp_path / "cache", tmp_path / "outside"
    writer = writer_for(cache, format="npz")
    cache.mkdir()
    outside.mkdir()
    (cache / "ant").symlink_to(outside)
    assert "a link on the way" in complaint(writer.write_shard, 0, batches([0, 1, 2, 3]))
    assert contents(outside) == {}


def test_links_in_a_published_cache_are_its_users_own(tmp_path):
    fill(tmp_path / "all", format="npz")
    (tmp_path / "subset").mkdir()
    (tmp_path / "subset" / "bee").symlink_to(tmp_path / "all" / "bee")
    cache = open_cache(tmp_path / "subset")
    assert cache.classes == ["bee"] and len(cache) == 5
    np.testing.assert_array_equal(cache[4][0].numpy(), MOMENTS[9, 0])


@FORMS
def test_a_wrong_bit_is_named_when_it_is_read(tmp_path, form):
    fill(tmp_path, format=form)
    cache = open_cache(tmp_path)
    name = "shard-00001.npy" if form == "npy" else "bee/2.png.npz"
    content = bytearray((tmp_path / name).read_bytes())
    if form == "npy":
        content[-1] ^= 1  # of image 7's mirror image
        (tmp_path / name).write_bytes(content)
    else:  # another file, whose own checksum is right
        shutil.copy(tmp_path / "bee" / "1.png.npz", tmp_path / name)
    assert name in complaint(lambda: open_cache(tmp_path)[(7, True)])
    assert name in complaint(lambda: cache.__getitems__([(1, False), (7, True)]))
    assert torch.equal(cache[(8, True)][0], torch.from_numpy(MOMENTS[8, 1]))


def test_no_character_of_the_json_files_can_change(tmp_path):
    fill(tmp_path)
    cache = open_cache(tmp_path)
    rng = np.random.default_rng(0)
    for name in ("manifest.json", "shard-00002.json"):
        whole = (tmp_path / name).read_bytes()
        for position in rng.choice(len(whole), 150, replace=False):
            content = bytearray(whole)
            content[position] ^= 1 << int(rng.integers(8))
            (tmp_path / name).write_bytes(content)
            try:
                found = open_cache(tmp_path)
            except UserError:
                continue
            # Another white space, say; what is said must be the same.
            assert found.manifest == cache.manifest and (found.crcs == cache.crcs).all()
        (tmp_path / name).write_bytes(whole)


def test_shards_of_one_cache_cannot_change_places(tmp_path):
    fill(tmp_path)
    first, second = tmp_path / "shard-00000.json", tmp_path / "shard-00001.json"
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)
    assert "belongs to another place" in complaint(open_cache, tmp_path)


def test_another_format_version_is_named(tmp_path):
    fill(tmp_path)
    for name in ("manifest.json", "settings.json"):
        rewrite(tmp_path / name, format_version=1)
    for action in (open_cache, writer_for):
        message = complaint(action, tmp_path)
        assert "format version 1, this program reads 2" in message


def test_lost_settings_are_no_hindrance_to_go_on(tmp_path):
    fill(tmp_path)
    before = contents(tmp_path)
    (tmp_path / "settings.json").write_bytes(b"")
    assert "settings.json" in complaint(writer_for, tmp_path)
    (tmp_path / "settings.json").unlink()
    assert "other settings" in complaint(writer_for(tmp_path, image_size=32).pending)
    (tmp_path / "shard-00001.json").unlink()
    assert fill(tmp_path) == [4, 5, 6, 7]
    assert contents(tmp_path) == before


def test_a_senseless_manifest_is_refused_in_one_line(tmp_path):
    fill(tmp_path)
    path = tmp_path / "manifest.json"
    whole = path.read_text()
    manifest = json.loads(whole)
    needed = ("format", "dtype", "classes", "latent_shape", "latent_scale", "channel_order")
    for key in (*needed, "shards", "count", "format_version", "cache_id", "image_size"):
        for value in (None, -1, "x", [], {}, [1.5], True, 10**30, [10**30] * 3, [{}]):
            path.write_text(whole)
            rewrite(path, **{key: value})
            complaint(open_cache, tmp_path)
    for text in ("", "{", "[]", "[" * 100_000, "\udcff", '{"count": NaN}', whole + "x"):
        path.write_bytes(text.encode(errors="surrogateescape"))
        assert "manifest.json" in complaint(open_cache, tmp_path)
    path.write_text(json.dumps(manifest))  # spaced in another way
    assert len(open_cache(tmp_path)) == 10


def test_json_that_would_fill_memory_is_refused(tmp_path, monkeypatch):
    fill(tmp_path)
    monkeypatch.setattr("util.cache_files.MAX_JSON_BYTES", 100)
    assert "larger than 100 bytes" in complaint(open_cache, tmp_path)


@pytest.mark.parametrize("name", ["manifest.json", "shard-00001.json", "shard-00001.npy"])
def test_a_pipe_in_place_of_a_file_is_not_waited_for(tmp_path, name):
    fill(tmp_path)
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)
    assert name in complaint(open_cache, tmp_path) and "regular file" in complaint(verify, tmp_path)


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
