"""Bad input gets one clear line and exit code 2, and nothing is half-written."""

import gzip
import io
import pickle
import shutil
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest
import torch

from models.tokenizers.kl16 import AutoencoderKL
from tests import runs
from tests.measures import PIXELS
from tests.test_latent_cache import Trap
from tests.test_lock import holder
from util.checkpoint import LAST
from util.dist import run
from util.errors import UserError, as_user_error
from util.vae import save_vae


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """Also out/, a checkpoint, published.pth and other.ckpt, a VAE with other channels."""
    folder = runs.make_inputs(tmp_path_factory.mktemp("inputs"))
    runs.train(folder, folder / "out", epochs=1)
    runs.save_published(folder / "out", folder / "published.pth")
    save_vae(folder / "other.ckpt", AutoencoderKL(6, (1, 1, 1), ch=32, num_res_blocks=1))
    return folder


RUN = {"resume": "out"}
# It holds no settings that flags could be compared with.
PUBLISHED = dict(resume="published.pth", class_num=3, img_size=16, buffer_size=4)
PUBLISHED |= {"model": "tokenbridge_tiny"}


def has(line: str, *fragments) -> bool:
    return all(str(fragment) in line for fragment in fragments)


# --- flags that name what is not there, or what does not fit


@pytest.mark.parametrize(
    ("use", "changes", "fragments"),
    [
        ("train", {"resume": "/nowhere"}, "--resume /nowhere"),
        ("train", {"cached_path": None}, "--use_cached --cached_path"),
        ("train", {"cached_path": "/nowhere"}, "--cached_path /nowhere"),
        ("train", {"img_size": 32}, "--img_size 32 16"),
        ("train", {"vae_stride": 8}, "--cached_path 4) --vae_stride"),
        ("train", {"online_eval": True, "num_images": 6}, "--vae_path kl16.ckpt"),
        ("images", {"vae_path": "out/checkpoint-last.pth"}, "--vae_path checkpoint-last.pth"),
        ("images", {"img_size": 18}, "--img_size 18 4"),
        ("images", {"latent_scale": None}, "--latent_scale main_cache.py"),
        ("evaluate", {"resume": None}, "--evaluate --resume"),
        ("evaluate", {"vae_path": "other.ckpt"}, "--vae_path other.ckpt 6 channels"),
        ("evaluate", {"quantizer": "calibrated"}, "--resume published flags calibrated"),
        ("evaluate", PUBLISHED | {"buffer_size": 5}, "encoder_pos_embed_learned 20, 21,"),
        ("evaluate", PUBLISHED | {"channel_depth": 4}, "--resume missing"),
        ("evaluate", PUBLISHED | {"quant_bits": 5}, "--resume token_embeddings"),
        ("evaluate", {"fid_stats": "/nowhere.npz"}, "--fid_stats /nowhere.npz"),
        ("evaluate", {"inception_weights": "/nowhere.pth"}, "--inception_weights /nowhere.pth"),
        ("reconstruct", {"image_dir": "/nowhere"}, "--image_dir /nowhere"),
        ("reconstruct", {"bits": [10]}, "--bits 10"),
        ("reconstruct", {"latent_scale": None}, "--vae_path --latent_scale"),
        ("cache", {"cached_path": None}, "--cached_path"),
        ("cache", {"vae_path": "/nowhere/vae.pt"}, "--vae_path /nowhere/vae.pt"),
        ("cache", {"vae_embed_dim": 16}, "--vae_embed_dim 16"),
        ("cache", {"img_size": 15}, "--img_size 15"),
        ("cache", {"format": "npz", "dtype": "float16"}, "--dtype float16"),
        ("cache", {"shard_size": 0}, "--shard_size"),
    ],
)
def test_wrong_flags_are_refused(inputs, refusal, use, changes, fragments):
    changes = RUN | changes if use == "evaluate" else changes
    assert has(refusal(use, inputs, **changes), *fragments.split())


def test_output_that_is_a_file_is_refused(inputs, refusal, tmp_path):
    (tmp_path / "file").write_text("mine")
    for use in ("train", "reconstruct"):
        line = refusal(use, inputs, output_dir=tmp_path / "file" / "below")
        assert has(line, "--output_dir", tmp_path / "file")


# --- damaged files, and files of another kind


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("flag", ["resume", "vae_path", "inception_weights"])
def test_code_in_a_file_is_never_run(inputs, refusal, tmp_path, flag, legacy):
    path = tmp_path / "evil.pth"
    content = {"model": {}, "model_ema": Trap()}
    torch.save(content, path)
    if legacy:
        path.write_bytes(pickle.dumps(content, protocol=2))
    assert has(refusal("evaluate", inputs, **RUN | {flag: path}), f"--{flag}", path)
    with pytest.raises(SystemExit, match="executed"):  # the trap works
        pickle.loads(pickle.dumps(content))


def saved(value) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


DAMAGED = "damaged, or not written by torch.save ("
LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 265\n"


def test_a_file_of_another_kind_is_called_what_it_is(inputs, refusal, tmp_path):
    path = tmp_path / "file.pth"
    np.savez(tmp_path / "packed.npz", x=1)
    for content, kind in (
        (b"", DAMAGED),
        (bytes(1000), DAMAGED),
        (saved({"model": {}})[:-90], DAMAGED),
        (saved([1, 2]), "holds a list, not a dict"),
        (LFS_POINTER, "git lfs pull"),
        (b"\n<!DOCTYPE html><html>Virus scan warning", "a web page"),
        (b'{"error": "Repository not found"}', DAMAGED),
        (gzip.compress(b"x", mtime=0), "a packed archive; unpack it"),
        ((tmp_path / "packed.npz").read_bytes(), DAMAGED),
        (pickle.dumps({"model": 1}), DAMAGED),
        (saved({"model": Decimal(1)}), "holds decimal.Decimal, which is not read"),
    ):
        path.write_bytes(content)
        line = refusal("evaluate", inputs, **RUN, vae_path=path)
        assert has(line, f"--vae_path {path}: ", kind) and len(line) < 500 and "\x1b" not in line
    for flag in ("resume", "inception_weights", "fid_stats", "fid_reference"):
        path = tmp_path / f"file.{'npz' if flag.startswith('fid_') else 'pt'}"
        path.write_bytes(LFS_POINTER)
        changes = {"feature_extractor": PIXELS} if flag.startswith("fid_") else {}
        line = refusal("evaluate", inputs, **RUN | changes | {flag: path})
        assert has(line, f"--{flag} {path}", "lfs")


# --- folders that do not fit, and runs that go wrong


def test_folders_that_do_not_fit_are_refused(own, refusal):
    (own / "data" / "train" / "dog").mkdir()
    assert has(refusal("images", own), "--data_path", "dog")
    assert has(refusal("reconstruct", own), "--image_dir", "dog")
    shutil.rmtree(own / "cache")  # a published cache says nothing but its files
    (own / "cache" / "ant").mkdir(parents=True)
    moments = np.zeros((32, 2, 2), np.float32)
    for i in range(8):
        np.savez(own / "cache" / "ant" / f"{i}.npz", moments=moments, moments_flip=moments)
    line = refusal("train", own, vae_embed_dim=4, vae_stride=4)
    assert has(line, "--cached_path", "(16, 2, 2)", "(4, 4, 4)")


def spoil_images(data: Path) -> None:
    for path in (data / "train").glob("*/*.png"):
        path.write_bytes(path.read_bytes()[:60])


def test_corrupt_images_are_named(own, refusal):
    spoil_images(own / "data")
    line = refusal("images", own, num_workers=1)
    assert has(line, "cannot read image", ".png", "--skip_bad_images")


def test_a_folder_in_use_is_refused_before_its_checkpoints_are_read(inputs, tmp_path, refusal):
    """What another job replaces and removes meanwhile is not called damaged, nor set aside."""
    (tmp_path / LAST).write_bytes(b"being written")
    with holder(tmp_path) as (first, _):
        line = refusal("train", inputs, output_dir=tmp_path, resume="auto")
        assert f"--output_dir {tmp_path} is in use by another job" in line
        assert f"process {first.pid} on" in line
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", LAST]
    with holder(tmp_path / "cache"):
        line = refusal("cache", inputs, cached_path=tmp_path / "cache")
        assert f"--cached_path {tmp_path / 'cache'} is in use by another job" in line


# --- as a user sees it


def test_process_whose_peer_was_refused_says_so(own, tmp_path):
    """Without torchrun nobody ends it: it must notice by itself."""
    shutil.copytree(own / "data", own / "spoiled")
    spoil_images(own / "spoiled")
    settings = dict(output_dir=tmp_path / "new", accum_iter=1)
    data = "data", "spoiled"
    commands = [runs.command("images", own, **settings, data_path=path) for path in data]
    ended = runs.fork_together(*commands, env=runs.ranks(2))
    (first, _, first_err), (second, _, second_err) = ended
    assert (first, second) == (1, 2)
    assert "Traceback" not in first_err and "stopped: process 1 (pid " in first_err
    assert "cannot read image" in first_err  # it says why the other has ended
    assert "cannot read image" in second_err


def test_only_user_errors_lose_their_traceback():
    with pytest.raises(ZeroDivisionError):
        run(lambda: 1 / 0)
    with pytest.raises(SystemExit) as stop:
        run(lambda: None)
    assert stop.value.code == 0
    with pytest.raises(UserError, match="^--flag x: two lines$"), as_user_error("--flag x"):
        raise ValueError("two\n  lines")
    with pytest.raises(KeyError), as_user_error("--flag x"):
        raise KeyError("y")
