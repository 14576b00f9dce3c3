"""A cache gives back what was put in, goes on where it stopped, and is never mixed or believed."""

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, default_convert

from models.config import PUBLISHED_CHANNEL_ORDER, PUBLISHED_LATENT_SCALE
from tests.conftest import complaint
from tests.runs import contents
from util.data import cache_writer
from util.data.batches import Batches, MicroBatchSampler
from util.data.cache_writer import CacheWriter, list_digest
from util.data.latent_cache import json_digest, open_cache, verify
from util.data.statistics import LatentStats

C, H, W = 3, 4, 5
NAMES = [f"{name}/{i}.png" for name in ("ant", "bee") for i in range(5)]
LABELS = [0] * 5 + [1] * 5
MOMENTS = np.random.default_rng(0).normal(size=(10, 2, 2 * C, H, W)).astype(np.float32)
SETTINGS = dict(
    format="npy",
    dtype="float32",
    shard_size=4,
    image_size=16,
    vae_sha256="ab" * 32,
    vae_config={"embed_dim": C, "ch_mult": (1, 1)},
    vae_stride=4,
    classes=["ant", "bee"],
    images_sha256=list_digest(NAMES, LABELS),
    format_version=2,
)
FORMS = pytest.mark.parametrize("form", ["npy", "npz"])


def writer_for(path: Path, **changes) -> CacheWriter:
    return CacheWriter(str(path), SETTINGS | changes, NAMES, LABELS)


def write(writer: CacheWriter, shard: int, bad=(), moments: np.ndarray = MOMENTS) -> list[int]:
    """What the encoder would hand over, in batches of three; the numbers of the images."""
    images = [i for i in writer.images(shard) if i not in bad]
    parts = [images[i : i + 3] for i in range(0, len(images), 3)]
    writer.write_shard(shard, images, [writer.stored(moments[part]) for part in parts])
    return images


def fill(path: Path, bad: tuple[int, ...] = (), **changes) -> list[int]:
    """Write what is missing, without the bad images; return the numbers of those encoded."""
    writer = writer_for(path, **changes)
    encoded = [i for shard in writer.pending() for i in write(writer, shard, bad)]
    writer.write_manifest(published_constants=False)
    return encoded


def rewrite(path: Path, **changes) -> None:
    """Change a JSON file as somebody would who knows its checksum."""
    value = json.loads(path.read_text()) | changes
    value["checksum"] = json_digest({k: v for k, v in value.items() if k != "checksum"})
    path.write_text(json.dumps(value))


# --- what goes in comes out


@FORMS
@pytest.mark.parametrize("num_workers", [0, 1])
def test_batches_are_what_was_put_in_to_the_bit_of_the_stored_dtype(tmp_path, form, num_workers):
    fill(tmp_path, format=form, dtype="float16" if form == "npy" else "float32")
    cache = open_cache(tmp_path, img_size=16, vae_sha256="ab" * 32)
    assert len(cache) == cache.manifest["count"] == 10 and cache.classes == ["ant", "bee"]
    assert cache.latent_shape == (C, H, W)
    keys = list(MicroBatchSampler(Batches(3, 1, 10, seed=0), range(5), 0, 1))
    how = {"num_workers": num_workers, "collate_fn": default_convert}
    loader = DataLoader(cache, batch_sampler=keys, **how)
    for batch, (moments, labels) in zip(keys, loader, strict=True):
        assert moments.dtype == cache.dtype and labels.dtype == torch.int64
        assert labels.tolist() == [LABELS[index] for index, _ in batch]
        expected = np.stack([MOMENTS[index, int(flip)] for index, flip in batch])
        np.testing.assert_array_equal(moments, expected.astype(moments.numpy().dtype))
    assert torch.equal(cache[3][0], cache[(3, False)][0])
    part = cache.subset([7, 2])
    assert len(part) == 2 and torch.equal(part[(0, True)][0], cache[(7, True)][0])
    pickled = pickle.dumps(part)  # for a worker; shards stay on the disk
    assert len(pickled) < MOMENTS.nbytes / 2 or form == "npz"
    assert torch.equal(pickle.loads(pickled)[1][0], cache[2][0])
    with pytest.raises(IndexError):
        cache[10]


def test_caches_of_the_published_form_need_nothing_beside(tmp_path):
    """A folder of links to a part of one is a cache, too."""
    fill(tmp_path / "all", format="npz")
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "bee").symlink_to(tmp_path / "all" / "bee")
    with np.load(tmp_path / "all" / "bee" / "3.png.npz") as file:
        assert file.files == ["moments", "moments_flip"]
        np.testing.assert_array_equal(file["moments_flip"], MOMENTS[8, 1])
    (tmp_path / "part" / ".hidden").mkdir()
    (tmp_path / "all" / "bee" / "._3.png.npz").write_bytes(b"of a file manager")
    cache = open_cache(tmp_path / "part")
    assert cache.manifest is None and cache.classes == ["bee"] and len(cache) == 5
    np.testing.assert_array_equal(cache[(4, True)][0].numpy(), MOMENTS[9, 1])
    np.savez(tmp_path / "all" / "bee" / "3.png.npz", moments=MOMENTS[0, 0, :, :2])
    assert "3.png.npz" in complaint(lambda: cache[3])


@FORMS
def test_unreadable_images_are_left_out_and_named(tmp_path, form):
    bad = (1, 4, 5, 6, 7)  # all of the second shard
    fill(tmp_path, bad, format=form)
    cache, kept = verify(tmp_path), [i for i in range(10) if i not in bad]
    assert cache.manifest["skipped"] == [NAMES[i] for i in bad]
    assert cache.labels.tolist() == [LABELS[i] for i in kept]
    for number, i in enumerate(kept):
        np.testing.assert_array_equal(cache[number][0].numpy(), MOMENTS[i, 0])
    assert "none of the 10" in complaint(fill, tmp_path / "none", tuple(range(10)), format=form)


@FORMS
@pytest.mark.parametrize("published", [False, True])
def test_manifest_holds_scale_and_order_of_all_latents(tmp_path, form, published):
    writer = writer_for(tmp_path, format=form)
    for shard in writer.pending():
        write(writer, shard)
    manifest = writer.write_manifest(published_constants=published)
    assert open_cache(tmp_path).manifest == manifest
    stats = LatentStats.of(torch.from_numpy(MOMENTS).flatten(0, 1))
    assert manifest["measured_latent_scale"] == pytest.approx(stats.latent_scale())
    assert manifest["measured_channel_order"] == stats.channel_order()
    assert manifest["channel_std"] == pytest.approx(stats.channel_std().tolist())
    assert manifest["histogram"] == stats.histogram.to_dict()
    names = ("latent_scale", "channel_order")
    expected = PUBLISHED_LATENT_SCALE, list(PUBLISHED_CHANNEL_ORDER)
    if not published:
        expected = tuple(manifest[f"measured_{name}"] for name in names)
    assert tuple(manifest[name] for name in names) == expected


# --- going on


@FORMS
def test_only_what_is_missing_is_written_again_and_identically(tmp_path, form, monkeypatch):
    """In whatever order, and however the statistics are divided."""
    monkeypatch.setattr(cache_writer, "STATS_IMAGES", 2)
    assert fill(tmp_path, format=form) == list(range(10))
    before = contents(tmp_path)
    assert fill(tmp_path, format=form) == []

    (tmp_path / "manifest.json").unlink()
    (tmp_path / "shard-00001.json").unlink()  # killed before it was declared whole
    (tmp_path / "shard-00002.npy").unlink(missing_ok=True)
    (tmp_path / "bee" / "3.png.npz").unlink(missing_ok=True)
    (tmp_path / ".shard-00001.npy.123.tmp").write_bytes(b"half")
    assert fill(tmp_path, format=form) == [4, 5, 6, 7, 8, 9]
    assert contents(tmp_path) == before


def test_a_folder_of_other_settings_shards_or_files_is_refused_and_unchanged(tmp_path):
    fill(tmp_path)
    before = contents(tmp_path)
    changes = dict(vae_sha256="cd" * 32, image_size=32, dtype="float16", shard_size=5, format="npz")
    for name, value in changes.items():
        message = complaint(writer_for, tmp_path, **{name: value})
        assert "--cached_path" in message and name in message
    assert "--img_size: image_size is 16, not 32" in complaint(open_cache, tmp_path, img_size=32)
    assert "--vae_path" in complaint(open_cache, tmp_path, vae_sha256="cd" * 32)
    assert contents(tmp_path) == before
    own, other = tmp_path / "shard-00001.json", tmp_path / "shard-00000.json"
    for changes in (dict(cache_id="of another"), json.loads(other.read_text())):
        rewrite(own, **changes)
        assert str(own) in complaint(writer_for(tmp_path).pending)
        assert str(own) in complaint(open_cache, tmp_path)
    for name in ("manifest.json", "settings.json"):
        (tmp_path / name).unlink()
        assert "not finished" in complaint(open_cache, tmp_path)
    assert "no folder" in complaint(open_cache, tmp_path / "none")
    (tmp_path / "images" / "ant").mkdir(parents=True)
    assert "ant" in complaint(open_cache, tmp_path / "images")


def test_nothing_is_written_beside_other_files_or_of_values_beyond_float16(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    assert "thesis.tex" in complaint(writer_for, tmp_path)
    assert "cannot write into" in complaint(writer_for, tmp_path / "thesis.tex" / "cache")
    writer = writer_for(tmp_path / "cache", dtype="float16")
    assert "--dtype float32" in complaint(write, writer, 0, moments=MOMENTS + 1e5)
    assert not (tmp_path / "cache").exists()


# --- what is refused


class Trap:
    """Runs code of its own when it is unpickled: an error that nobody takes for a damaged file."""

    def __reduce__(self):
        return exec, ("raise SystemExit('a pickle was executed')",)


@FORMS
def test_damaged_files_are_named_and_never_unpickled(tmp_path, form):
    fill(tmp_path, format=form)
    name = "shard-00001.npy" if form == "npy" else "bee/2.png.npz"
    path, trap = tmp_path / name, np.array([Trap()], dtype=object)
    whole = path.read_bytes()
    np.save(tmp_path / "trap.npy", trap, allow_pickle=True)
    other = tmp_path / "bee" / "1.png.npz"  # whose own checksum is right
    wrong = other.read_bytes() if form == "npz" else whole[:-1] + bytes([whole[-1] ^ 1])
    for content in (b"", whole[: len(whole) // 2], (tmp_path / "trap.npy").read_bytes(), wrong):
        path.write_bytes(content)
        assert name in complaint(lambda: open_cache(tmp_path).__getitems__([(1, 0), (7, True)]))
        assert name in complaint(verify, tmp_path)
    assert torch.equal(open_cache(tmp_path)[(8, True)][0], torch.from_numpy(MOMENTS[8, 1]))
    for array in (trap, MOMENTS[7, 0, :3], MOMENTS[7, 0].astype(int)):
        np.savez(tmp_path / "other.npz", moments=array)
        shutil.copy(tmp_path / "other.npz", path)
        assert name in complaint(lambda: open_cache(tmp_path)[7])
    path.unlink()
    assert name in complaint(lambda: open_cache(tmp_path)[7])


def test_json_files_of_other_names_versions_or_content_are_refused(tmp_path):
    fill(tmp_path, format="npz")
    manifest, sidecar = tmp_path / "manifest.json", tmp_path / "shard-00000.json"

    def pending(path: Path) -> list[int]:
        return writer_for(path, format="npz").pending()

    whole, known = manifest.read_text(), sidecar.read_text()
    names = json.loads(known)["names"]
    for name in ("../../etc/passwd", "/etc/passwd", "ant/../../x"):
        rewrite(sidecar, names=[name, *names[1:]])
        for action in (open_cache, pending):
            assert "leads out of the folder" in complaint(action, tmp_path)
    sidecar.write_text(known)
    for text in ("", "[]", whole + "x", whole.replace("0.", "1.", 1)):
        manifest.write_text(text)
        assert "manifest.json" in complaint(open_cache, tmp_path)
    manifest.write_text(json.dumps(json.loads(whole)))  # spaced in another way
    assert len(open_cache(tmp_path)) == 10
    rewrite(sidecar, labels=[1, 1, 1, 1])
    assert "does not fit the manifest" in complaint(open_cache, tmp_path)
    for name in ("manifest.json", "settings.json"):
        rewrite(tmp_path / name, format_version=1)
    for action in (open_cache, pending):
        assert "format_version" in complaint(action, tmp_path)
