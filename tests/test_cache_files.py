"""What a cache's files say is checked before it is believed; no name leads out of the folder."""

import json
import os
import shutil

import numpy as np
import pytest
import torch

from tests.test_latent_cache import (
    FORMS,
    MOMENTS,
    batches,
    complaint,
    contents,
    fill,
    rewrite,
    writer_for,
)
from util.data.latent_cache import open_cache, verify
from util.errors import UserError


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
    monkeypatch.setattr("util.data.cache_files.MAX_NPZ_BYTES", 100)
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
    monkeypatch.setattr("util.data.cache_files.MAX_JSON_BYTES", 100)
    assert "larger than 100 bytes" in complaint(open_cache, tmp_path)


@pytest.mark.parametrize("name", ["manifest.json", "shard-00001.json", "shard-00001.npy"])
def test_a_pipe_in_place_of_a_file_is_not_waited_for(tmp_path, name):
    fill(tmp_path)
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)
    assert name in complaint(open_cache, tmp_path) and "regular file" in complaint(verify, tmp_path)
