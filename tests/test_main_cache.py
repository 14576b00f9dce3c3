"""main_cache.py as a user calls it: what it encodes, on how many processes, and what it refuses."""

import json
import resource
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import main_cache
from tests import runs
from util import stop
from util.args import CONFIG
from util.data.images import center_crop, read_image
from util.data.latent_cache import open_cache
from util.data.listing import list_images
from util.dist import run
from util.errors import EXIT_STOPPED
from util.vae import load_vae


def contents_of(folder: Path) -> dict[str, bytes]:
    """The files of a cache; how it was called is no part of it."""
    return runs.contents(folder, but=(CONFIG,))


def make(inputs: Path, cache: Path, **changes) -> None:
    """Of three shards of 24 images."""
    runs.use("cache", inputs, cached_path=cache, **dict(batch_size=2) | changes)


@torch.no_grad()
def test_moments_are_those_of_the_image_and_of_the_mirrored_image_in_both_forms(inputs, tmp_path):
    make(inputs, tmp_path / "npy", dtype="float32")
    make(inputs, tmp_path / "npz", format="npz")
    cache, other = open_cache(tmp_path / "npy", img_size=runs.SIZE), open_cache(tmp_path / "npz")
    vae = load_vae(inputs / "vae.ckpt", runs.CHANNELS)
    assert cache.classes == list(runs.CLASSES) and cache.latent_shape == (runs.CHANNELS, 4, 4)
    images = list_images(inputs / "data").samples
    for index in range(0, 24, 5):
        path, label = images[index]
        pixels = np.asarray(center_crop(read_image(path), runs.SIZE)) / 127.5 - 1
        for flip in (False, True):
            view = pixels[:, ::-1] if flip else pixels
            batch = torch.from_numpy(view.transpose(2, 0, 1)[None].astype(np.float32))
            moments, found = cache[(index, flip)]
            assert found == label
            torch.testing.assert_close(moments, vae.encode(batch).parameters[0], atol=1e-4, rtol=0)
            assert torch.equal(moments, other[(index, flip)][0])
    assert (cache[(0, True)][0] - cache[(0, False)][0].flip(-1)).abs().max() > 1e-2
    for key in ("latent_scale", "channel_order", "channel_std", "count", "histogram"):
        assert cache.manifest[key] == other.manifest[key]


def test_two_processes_write_the_bytes_of_one(inputs, tmp_path):
    """Killed, either goes on: tests/faults."""
    one, two = tmp_path / "one", tmp_path / "two"
    make(inputs, one)
    asked = runs.command("cache", inputs, cached_path=two, batch_size=2, num_workers=1)
    runs.on_processes(2, *asked)
    assert len(list(one.glob("*.npy"))) == 3
    assert contents_of(one) == contents_of(two)


def test_a_dry_run_writes_nothing_nor_does_a_whole_cache(inputs, tmp_path, monkeypatch, capsys):
    cache = tmp_path / "cache"

    def dry_run() -> dict:
        capsys.readouterr()
        make(inputs, cache, dry_run=True, json=True)
        return json.loads(capsys.readouterr().out)

    figures = dry_run()
    assert not cache.exists() and figures["images"] == figures["images_to_encode"] == 24
    assert figures["bytes_to_write"] == 24 * 2 * 8 * 4 * 4 * 2 < figures["bytes_free"]
    make(inputs, cache)
    assert dry_run()["images_to_encode"] == 0
    before, settings = contents_of(cache), (cache / CONFIG).read_text()
    monkeypatch.setattr(main_cache, "encode", None)
    make(inputs, cache, batch_size=1)
    assert "0 of 3 shards" in capsys.readouterr().out
    assert contents_of(cache) == before
    assert (cache / CONFIG).read_text() == settings  # those that it was made with
    argv = ["--verify", "--cached_path", str(cache)]
    runs.call(main_cache.main, *argv)
    assert "24 images in 3 classes, checksums agree" in capsys.readouterr().out
    path = cache / "shard-00002.npy"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    assert "shard-00002" in runs.refused(capsys, main_cache.main, *argv)


def test_skipped_images_are_named_counted_and_left_out(own, tmp_path, capsys):
    for number in (3, 4):
        (own / "data" / "train" / "ant" / f"{number}.png").write_bytes(b"broken")
    make(own, tmp_path / "cache", skip_bad_images=True, num_workers=1)
    manifest = open_cache(tmp_path / "cache").manifest
    assert manifest["count"] == 22 and manifest["skipped"] == ["ant/3.png", "ant/4.png"]
    assert "2 skipped" in capsys.readouterr().out


# --- stopped, and going on


def test_a_full_disk_or_a_signal_ends_it_and_the_same_command_goes_on(
    inputs, tmp_path, monkeypatch, capsys
):
    """A limit on file sizes stands for the disk; the settings still fit, no shard does."""
    asked = runs.command("cache", inputs, cached_path=tmp_path / "cache", batch_size=2)
    cache, before = tmp_path / "cache", resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
    try:
        line = runs.refused(capsys, main_cache.main, *asked[1:])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert f"--cached_path {cache}: cannot write" in line and "too large" in line
    assert set(contents_of(cache)) == {"settings.json"}

    encoded, encode = [], main_cache.encode

    def signalled(vae, images):
        if len(encoded) == 6:  # within the second shard, of five batches as well
            signal.raise_signal(signal.SIGTERM)
        encoded.append(images)
        return encode(vae, images)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(main_cache, "encode", signalled)
        patch.setattr(sys, "argv", asked)
        run(main_cache.main)
    assert end.value.code == EXIT_STOPPED and len(encoded) == 6
    assert "stopped by SIGTERM" in capsys.readouterr().err.splitlines()[-1]
    assert set(contents_of(cache)) == {"settings.json", "shard-00000.npy", "shard-00000.json"}
    stop.install()  # forgets the signal
    make(inputs, cache)
    make(inputs, tmp_path / "at_once")
    assert contents_of(cache) == contents_of(tmp_path / "at_once")
