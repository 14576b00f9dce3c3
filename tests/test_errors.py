"""Bad input gets one clear line and exit code 2, and nothing is half-written."""

import gzip
import io
import os
import pickle
import shutil
import sys
import tarfile
import zipfile
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import main_tokenbridge
import reconstruction
from models.tokenizers.kl16 import AutoencoderKL
from tests.conftest import assert_user_error, run_script
from tests.faults.harness import Job
from tests.measures import PIXELS
from tests.runs import (
    EVALUATE_FLAGS,
    TRAIN_FLAGS,
    call,
    flags,
    fork_together,
    free_port,
    load,
    make_inputs,
    ranks,
    refused,
    train,
)
from tests.test_lock import holder
from util.checkpoint import LAST
from util.dist import run
from util.errors import UserError, as_user_error
from util.files import load_tensors
from util.vae import save_vae


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """Also out/, a checkpoint, and other.ckpt, a VAE with other channels."""
    folder = make_inputs(tmp_path_factory.mktemp("inputs"))
    train(folder, folder / "out", epochs=1)
    save_vae(folder / "other.ckpt", AutoencoderKL(6, (1, 1, 1), ch=32, num_res_blocks=1))
    return folder


@pytest.fixture(autouse=True)
def no_network(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path_factory.mktemp("torch")))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")


@pytest.fixture
def own(inputs, tmp_path) -> Path:
    """A copy of the inputs to spoil, without the checkpoint."""
    return shutil.copytree(inputs, tmp_path / "own", ignore=shutil.ignore_patterns("out"))


class Script:
    """Calls a script with small inputs and expects it to refuse."""

    def __init__(self, capsys, output: Path):
        self.capsys, self.output = capsys, output

    def __call__(self, main: Callable, inputs: Path, *groups: dict, **changes) -> str:
        argv = flags(inputs, *groups, **{"output_dir": self.output} | changes)
        line = refused(self.capsys, main, *argv)
        assert not self.output.exists()
        return line

    def train(self, inputs: Path, **changes) -> str:
        return self(main_tokenbridge.main, inputs, TRAIN_FLAGS, **changes)

    def train_on_images(self, inputs: Path, **changes) -> str:
        return self.train(inputs, **IMAGE_FLAGS | changes)

    def evaluate(self, inputs: Path, **changes) -> str:
        changes = {"resume": inputs / "out"} | changes
        return self(main_tokenbridge.main, inputs, EVALUATE_FLAGS, **changes)

    def reconstruct(self, inputs: Path, **changes) -> str:
        return self(reconstruction.main, inputs, RECONSTRUCTION_FLAGS, **changes)


IMAGE_FLAGS = dict(use_cached=False, cached_path=None, data_path="data", vae_path="vae.ckpt")
IMAGE_FLAGS |= dict(latent_scale=1.0, channel_order="0,1,2,3")
RECONSTRUCTION_FLAGS = dict(image_dir="data", vae_path="vae.ckpt", img_size=16, device="cpu")
RECONSTRUCTION_FLAGS |= dict(num_workers=0, latent_scale=1.0, bits=[-1, 4])


@pytest.fixture
def script(capsys, tmp_path) -> Script:
    return Script(capsys, tmp_path / "new" / "output")


def has(line: str, *fragments) -> bool:
    return all(str(fragment) in line for fragment in fragments)


# --- flags that name what is not there, or what does not fit


@pytest.mark.parametrize(
    ("changes", "fragments"),
    [
        ({"batch_sizes": 2}, ["--batch_sizes"]),
        ({"precision": "fp8"}, ["--precision", "'fp8'", "bf16"]),
        ({"model": "tokenbridge_giant"}, ["--model", "tokenbridge_giant"]),
        ({"epochs": 0}, ["--epochs", "0"]),
        ({"batch_size": 16}, ["24 samples", "32", "--batch_size"]),
        ({"cached_path": None}, ["--use_cached", "--cached_path"]),
        ({"cached_path": "/nowhere"}, ["--cached_path", "/nowhere"]),
        ({"cached_path": "data"}, ["--cached_path", "data"]),
        ({"resume": "/nowhere"}, ["--resume", "/nowhere", "does not exist"]),
        ({"resume": os.curdir}, ["--resume", "checkpoint-last.pth"]),
        ({"class_num": 2}, ["3 classes", "--class_num", "2"]),
        ({"img_size": 32}, ["--img_size 32", "16"]),
        ({"vae_stride": 8}, ["--cached_path", "(4, 4, 4)", "--vae_stride"]),
        ({"vae_embed_dim": 16}, ["16", "vae_embed_dim"]),
        ({"patch_size": 3}, ["patch_size", "3"]),
        ({"buffer_size": 0}, ["--buffer_size", "0"]),
        ({"quant_min": 6}, ["quant_min", "6"]),
        ({"quant_bits": 12}, ["--quant_bits", "12"]),
        ({"channel_order": "0,1,1,3"}, ["channel_order", "(0, 1, 1, 3)"]),
        ({"latent_scale": -1}, ["latent_scale", "-1"]),
        ({"device": "tpu"}, ["--device", "tpu"]),
        ({"dist_on_itp": True}, ["--dist_on_itp", "OMPI_COMM_WORLD_RANK"]),
        ({"vae_path": "other.ckpt"}, ["--cached_path", "another VAE", "--vae_path"]),
        ({"online_eval": True, "num_images": 6}, ["--vae_path", "kl16.ckpt"]),
    ],
)
def test_training_refuses_wrong_flags(inputs, script, changes, fragments):
    assert has(script.train(inputs, **changes), *fragments)


@pytest.mark.parametrize(
    ("changes", "fragments"),
    [
        ({"data_path": "/nowhere"}, ["--data_path", "/nowhere"]),
        ({"data_path": "cache"}, ["--data_path", "cache", "train"]),
        ({"vae_path": "/nowhere.ckpt"}, ["--vae_path", "/nowhere.ckpt", "no such file"]),
        ({"vae_path": "data"}, ["--vae_path", "data"]),
        ({"vae_path": "out/checkpoint-last.pth"}, ["--vae_path", "checkpoint-last.pth"]),
        ({"vae_embed_dim": 16}, ["--vae_embed_dim 16", "4 channels"]),
        ({"vae_stride": 8}, ["--vae_stride", "8"]),
        ({"img_size": 18}, ["--img_size 18", "4"]),
        ({"latent_scale": None}, ["--latent_scale", "main_cache.py"]),
        ({"latent_scale": None, "channel_order": None}, ["--latent_scale and --channel_order"]),
    ],
)
def test_training_on_images_refuses_wrong_flags(inputs, script, changes, fragments):
    assert has(script.train_on_images(inputs, **changes), *fragments)


@pytest.mark.parametrize(
    ("changes", "fragments"),
    [
        ({"resume": None}, ["--evaluate", "--resume"]),
        ({"resume": "/nowhere"}, ["--resume", "/nowhere"]),
        ({"resume": os.curdir}, ["--resume", "checkpoint-last.pth"]),
        ({"num_images": 0}, ["--num_images", "0"]),
        ({"vae_path": "/nowhere.ckpt"}, ["--vae_path", "/nowhere.ckpt"]),
        ({"vae_path": "other.ckpt"}, ["--vae_path", "other.ckpt", "6 channels"]),
        ({"img_size": 32}, ["--resume", "img_size 16", "32"]),
        ({"class_num": 1000}, ["--resume", "class_num 3", "1000"]),
        ({"quant_bits": 4}, ["--resume", "quant_levels 64", "16"]),
        ({"model": "tokenbridge_base"}, ["--resume", "128", "768"]),
        ({"buffer_size": 64}, ["--resume", "buffer_size 4", "64"]),
        ({"latent_scale": 0.2325}, ["--resume", "latent_scale", "0.2325"]),
        ({"channel_order": "3,2,1,0"}, ["--resume", "channel_order", "(3, 2, 1, 0)"]),
        ({"cfg_schedule": "cosine"}, ["--cfg_schedule", "'cosine'"]),
        ({"temperature": -1}, ["--temperature", "-1"]),
        ({"fid_stats": "/nowhere.npz"}, ["--fid_stats", "/nowhere.npz"]),
        ({"inception_weights": "/nowhere.pth"}, ["--inception_weights", "/nowhere.pth"]),
    ],
)
def test_evaluation_refuses_wrong_flags(inputs, script, changes, fragments):
    assert has(script.evaluate(inputs, **changes), *fragments)


@pytest.mark.parametrize(
    ("changes", "fragments"),
    [
        ({"image_dir": "/nowhere"}, ["--image_dir", "/nowhere"]),
        ({"image_dir": "out"}, ["--image_dir", "out"]),
        ({"vae_path": "/nowhere.ckpt"}, ["--vae_path", "/nowhere.ckpt"]),
        ({"bits": [0]}, ["--bits", "0"]),
        ({"bits": [10]}, ["--bits", "10"]),
        ({"range": 0}, ["--range", "0"]),
        ({"range": "inf"}, ["--range", "inf"]),
        ({"latent_scale": None}, ["--vae_path", "--latent_scale"]),
        ({"latent_scale": 0}, ["--latent_scale", "0"]),
        ({"img_size": 18}, ["--img_size 18", "4"]),
        ({"posterior": "mean"}, ["--posterior", "'mean'"]),
    ],
)
def test_reconstruction_refuses_wrong_flags(inputs, script, changes, fragments):
    assert has(script.reconstruct(inputs, **changes), *fragments)


@pytest.mark.parametrize("use", [Script.train, Script.evaluate, Script.reconstruct])
def test_output_that_is_a_file_is_refused(inputs, script, tmp_path, use):
    file = tmp_path / "file"
    file.write_text("mine")
    assert has(use(script, inputs, output_dir=file), "--output_dir", file)
    assert has(use(script, inputs, output_dir=file / "below"), "--output_dir", file)
    assert file.read_text() == "mine"


# --- damaged files


class Payload:
    """Runs a command when it is unpickled."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("what", ["checkpoint", "vae", "inception"])
def test_code_in_a_file_is_never_run(inputs, script, tmp_path, what, legacy):
    marker = tmp_path / "marker"
    content = {"model": {}, "model_ema": Payload(marker)}
    path = tmp_path / "evil.pth"
    if legacy:
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path)
    flag = {"checkpoint": "resume", "vae": "vae_path", "inception": "inception_weights"}[what]
    assert has(script.evaluate(inputs, **{flag: path}), f"--{flag}", path)
    assert not marker.exists()
    pickle.loads(pickle.dumps(content))  # the trap works
    assert marker.exists()


@pytest.mark.parametrize("kept", [0, 100, 0.5, 0.999])
@pytest.mark.parametrize("use", [Script.train, Script.evaluate])
def test_truncated_checkpoint_is_refused(inputs, script, tmp_path, use, kept):
    content = (inputs / "out" / "checkpoint-last.pth").read_bytes()
    path = tmp_path / "checkpoint-last.pth"
    path.write_bytes(content[: int(kept * len(content)) if kept < 1 else kept])
    assert has(use(script, inputs, resume=tmp_path), "--resume", path, "damaged")


def test_truncated_vae_is_refused(own, script):
    path = own / "vae.ckpt"
    path.write_bytes(path.read_bytes()[:-100])
    assert has(script.train_on_images(own), "--vae_path", path, "damaged")


def test_checkpoint_that_is_no_dict_is_refused(inputs, script, tmp_path):
    torch.save([1, 2], tmp_path / "list.pth")
    assert has(script.evaluate(inputs, resume=tmp_path / "list.pth"), "--resume", "list")


@pytest.mark.parametrize(
    ("changes", "fragment"),
    [
        ({"buffer_size": 5}, "encoder_pos_embed_learned is (1, 20, 128), not (1, 21, 128)"),
        ({"model": "tokenbridge_base"}, "missing"),
        ({"quant_bits": 5}, "token_embeddings"),
    ],
)
def test_checkpoint_of_another_architecture_is_refused(inputs, script, tmp_path, changes, fragment):
    """One of the published code, which holds no settings that flags could be compared with."""
    saved = {"model_ema": load(inputs / "out")["model_ema"]}
    torch.save(saved, tmp_path / "published.pth")
    own_flags = dict(class_num=3, img_size=16, buffer_size=4, model="tokenbridge_tiny")
    settings = own_flags | {"resume": tmp_path / "published.pth"} | changes
    assert has(script.evaluate(inputs, **settings), "--resume", fragment)


def test_empty_class_folder_is_refused(own, script):
    (own / "data" / "train" / "dog").mkdir()
    assert has(script.train_on_images(own), "--data_path", "dog")
    assert has(script.reconstruct(own), "--image_dir", "dog")


def test_cache_of_other_latents_is_refused(own, script):
    """A published cache says nothing but its files."""
    shutil.rmtree(own / "cache")
    for name in ("ant", "bee"):
        (own / "cache" / name).mkdir(parents=True)
        for i in range(8):
            moments = np.zeros((32, 2, 2), np.float32)
            np.savez(own / "cache" / name / f"{i}.npz", moments=moments, moments_flip=moments)
    geometry = dict(vae_embed_dim=4, vae_stride=4)
    assert has(script.train(own, **geometry), "--cached_path", "(16, 2, 2)", "(4, 4, 4)")


def test_training_refuses_a_flag_that_contradicts_its_checkpoint(inputs, script):
    line = script.train(inputs, resume=inputs / "out", class_num=5)
    assert has(line, "--resume", "class_num 3", "5")


def test_unfinished_cache_is_refused(own, script):
    (own / "cache" / "manifest.json").unlink()
    assert has(script.train(own), "--cached_path", "not finished")


@pytest.mark.parametrize("num_workers", [0, 1])
def test_corrupt_image_is_named(own, script, num_workers):
    spoil_images(own / "data")
    line = script.train_on_images(own, num_workers=num_workers)
    assert has(line, "cannot read image", ".png", "--skip_bad_images")


def test_corrupt_image_is_named_by_reconstruction(own, tmp_path, capsys):
    """Its folders are there by then, but no file except the settings, to go on from."""
    spoil_images(own / "data")
    argv = flags(own, RECONSTRUCTION_FLAGS, output_dir=tmp_path / "new", no_metrics=True)
    with pytest.raises(UserError, match="cannot read image .*png .*--skip_bad_images"):
        call(reconstruction.main, *argv)
    files = {path.name for path in (tmp_path / "new").rglob("*") if path.is_file()}
    assert files == {"settings.json", "config.yaml"}


def spoil_images(data: Path, count: int | None = None) -> None:
    for path in sorted((data / "train").glob("*/*.png"))[:count]:
        path.write_bytes(path.read_bytes()[:60])


def test_nothing_but_corrupt_images_is_refused_even_when_skipping(own, tmp_path, capsys):
    spoil_images(own / "data")
    argv = flags(own, TRAIN_FLAGS, IMAGE_FLAGS, output_dir=tmp_path / "new", skip_bad_images=True)
    with pytest.raises(SystemExit), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["main_tokenbridge.py", *argv])
        run(main_tokenbridge.main)
    errors = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert len(errors) == 1 and "none of the 24 images" in errors[0]
    assert not (tmp_path / "new").exists()


def test_loss_that_is_not_finite_stops_before_the_checkpoint(inputs, tmp_path, capsys):
    settings = dict(output_dir=tmp_path / "new", blr=1e30, grad_clip=1e30, max_skipped=2)
    line = refused(capsys, main_tokenbridge.main, *flags(inputs, TRAIN_FLAGS, **settings))
    assert has(line, "2 steps in a row", "--debug_dump", "--blr", "--precision")
    assert not list((tmp_path / "new").glob("checkpoint-*"))


def test_second_training_in_one_folder_is_refused(inputs, tmp_path, capsys):
    """As a job that is queued again while it still runs: they would prune each other's files."""
    argv = flags(inputs, TRAIN_FLAGS, output_dir=tmp_path / "new", epochs=50_000, log_freq=1)
    with Job("main_tokenbridge.py", *argv, log=tmp_path / "log") as first:
        first.wait_for(lambda: "step 1/" in first.printed())
        second = refused(capsys, main_tokenbridge.main, *argv, "--resume", "auto")
    assert f"--output_dir {tmp_path / 'new'} is in use by another job" in second


def test_a_folder_in_use_is_refused_before_its_checkpoints_are_read(inputs, tmp_path, capsys):
    """What another job replaces and removes meanwhile is not called damaged, nor set aside."""
    (tmp_path / LAST).write_bytes(b"being written")
    argv = flags(inputs, TRAIN_FLAGS, output_dir=tmp_path, resume="auto")
    with holder(tmp_path):
        line = refused(capsys, main_tokenbridge.main, *argv)
        assert f"--output_dir {tmp_path} is in use by another job" in line
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", LAST]


# --- as a user sees it


def test_process_says_it_in_one_line(inputs, tmp_path):
    argv = flags(inputs, TRAIN_FLAGS, output_dir=tmp_path / "new", resume="/nowhere", device="cpu")
    assert_user_error(run_script("main_tokenbridge.py", *argv), "--resume /nowhere")
    assert not (tmp_path / "new").exists()


def test_torchrun_ends_and_the_line_is_there(own, tmp_path):
    """An image that one of two processes meets; the other must not wait for it."""
    spoil_images(own / "data", 23)
    argv = flags(own, TRAIN_FLAGS, IMAGE_FLAGS, output_dir=tmp_path / "new", accum_iter=1)
    launch = ("torchrun", "--nproc_per_node=2", f"--master_port={free_port()}")
    result = run_script(*launch, "main_tokenbridge.py", *argv, timeout=100)
    assert result.returncode != 0
    lines = [line for line in result.stderr.splitlines() if ": error: cannot read image" in line]
    assert lines and all("--skip_bad_images" in line for line in lines)
    assert not (tmp_path / "new").exists()


def test_process_whose_peer_was_refused_says_so(own, tmp_path):
    """Without torchrun nobody ends it: it must notice by itself."""
    shutil.copytree(own / "data", own / "spoiled")
    spoil_images(own / "spoiled")
    settings = dict(output_dir=tmp_path / "new", accum_iter=1)
    commands = [
        ["main_tokenbridge.py", *flags(own, TRAIN_FLAGS, IMAGE_FLAGS, data_path=data, **settings)]
        for data in ("data", "spoiled")
    ]
    (first, _, first_err), (second, _, second_err) = fork_together(*commands, env=ranks(2))
    assert (first, second) == (1, 2)
    assert "Traceback" not in first_err and "stopped: process 1 (pid " in first_err
    assert "cannot read image" in first_err  # it says why the other has ended
    assert "cannot read image" in second_err


# --- the pieces


def test_only_user_errors_lose_their_traceback():
    with pytest.raises(ZeroDivisionError):
        run(lambda: 1 / 0)
    with pytest.raises(SystemExit) as stop:
        run(lambda: None)
    assert stop.value.code == 0


def test_library_errors_become_one_line_with_their_context():
    with pytest.raises(UserError, match="^--flag x: two lines$"), as_user_error("--flag x"):
        raise ValueError("two\n  lines")
    with pytest.raises(KeyError), as_user_error("--flag x"):
        raise KeyError("y")


def packed(kind: str) -> bytes:
    """An archive of one file."""
    file = io.BytesIO()
    if kind == "tar":
        with tarfile.open(fileobj=file, mode="w") as archive:
            archive.addfile(tarfile.TarInfo("vae.ckpt"))
    elif kind == "npz":
        np.savez(file, a=np.zeros(1))
    elif kind == "zip":
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("vae.ckpt", b"x" * 100)
    return file.getvalue()


def saved(value) -> bytes:
    file = io.BytesIO()
    torch.save({"model": {}, "more": value}, file)
    return file.getvalue()


LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 265\n"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "damaged (it is empty"),
        (bytes(1000), "damaged ("),
        (saved(1)[:-90], "damaged (its end is missing"),
        (LFS_POINTER, "git lfs pull"),
        (b"\n<!DOCTYPE html><html>Virus scan warning", "a web page"),
        (b'{"error": "Repository not found"}', 'text, not tensors (\'{"error"'),
        (gzip.compress(saved(1)), "a packed archive; unpack it"),
        (packed("tar"), "a tar archive"),
        (packed("zip"), "a zip archive of vae.ckpt; unpack it"),
        (packed("npz"), "an npz file of NumPy"),
        (pickle.dumps({"model": 1}), "a pickle that torch.save did not write"),
        (saved(Decimal(1)), "holds decimal.Decimal, which is not read"),
        (saved(torch.nn.Linear(1, 1)), "holds torch.nn.modules.linear.Linear"),
    ],
)
def test_a_file_of_another_kind_is_called_what_it_is(inputs, script, tmp_path, content, said):
    path = tmp_path / "file.pth"
    path.write_bytes(content)
    line = script.evaluate(inputs, vae_path=path)
    assert has(line, f"--vae_path {path}: ", said) and len(line) < 500 and "\x1b" not in line


@pytest.mark.parametrize(
    ("flag", "ending"),
    [
        *(("resume", "pt"), ("inception_weights", "pt"), ("fid_stats", "pt")),
        *(("fid_stats", "npz"), ("fid_reference", "npz"), ("vae_path", "safetensors")),
    ],
)
def test_every_flag_that_names_a_file_says_so(inputs, script, tmp_path, flag, ending):
    path = tmp_path / f"file.{ending}"
    path.write_bytes(LFS_POINTER)
    stand_in = {"feature_extractor": PIXELS} if flag.startswith("fid_") else {}
    assert has(script.evaluate(inputs, **{flag: path}, **stand_in), f"--{flag} {path}", "git lfs")


def test_what_another_library_reads_after_us_is_held_to_less(inputs, script, tmp_path):
    """torch-fidelity unpickles its weights without restriction, once they were found harmless."""
    save_file({"a": torch.ones(1)}, tmp_path / "x.safetensors")
    line = script.evaluate(inputs, inception_weights=tmp_path / "x.safetensors")
    assert "a file of safetensors; here one of torch.save is read" in line


def test_a_folder_or_nothing_is_no_file(tmp_path):
    for path, said in ((tmp_path, "a folder, not a file"), (tmp_path / "x", "no such file")):
        with pytest.raises(UserError, match=f"--flag {path}: {said}"):
            load_tensors(path, "--flag")


@pytest.mark.parametrize("flag", ["resume", "finetune", "cached_path", "output_dir", "vae_path"])
def test_an_empty_value_is_told_from_a_flag_that_is_left_out(inputs, capsys, flag):
    """As --resume "${OUTPUT_DIR}" gives it where the variable is not set."""
    for words in ([f"--{flag}", ""], [f"--{flag}="]):
        argv = flags(inputs, TRAIN_FLAGS | {flag: None})
        line = refused(capsys, main_tokenbridge.main, *argv, *words)
        assert f"the value of --{flag} is empty: set the shell variable" in line
