"""Every check in good health, in doubt and in failure, with tiny files; and none stops another."""

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch

from models.quantizer import GaussianQuantizer
from models.tokenizers.tokenizer import Tokenizer
from tests.runs import CHANNELS, TRAIN_FLAGS, call, flags, load, on_processes
from util import doctor
from util.data.latent_cache import open_cache
from util.doctor import FAILURE, OK, WARNING, Finding, Opened
from util.vae import load_vae, save_vae
from util.validation import read_latents

CPU, PHOTO = torch.device("cpu"), "data/train/ant/0.png"
GOOD = TRAIN_FLAGS | dict(vae_path="vae.ckpt", epochs=3, no_metrics=True)
IMAGES = {"use_cached": None, "cached_path": None, "data_path": "data"}
LATENTS = {"latent_scale": 1.0, "channel_order": "0,1,2,3"}


def opened(inputs: Path, **changes) -> Opened:
    argv = flags(inputs, GOOD, **{"output_dir": inputs / "new"} | changes)
    return Opened(doctor.make_parser().parse(argv), CPU)


def check(name: str, inputs: Path, **changes) -> Finding:
    return doctor.attempt(name, opened(inputs, **changes))


def assert_found(finding: Finding, state: str, *fragments: str) -> None:
    assert finding.state == state, finding
    for fragment in fragments:
        assert fragment in f"{finding.text}; {finding.remedy}", finding


# --- machine


def test_device_and_precision(inputs):
    assert_found(check("device", inputs), OK, torch.__version__, "cpu, --precision fp32")
    assert_found(check("device", inputs, device="cuda"), WARNING, "--device cuda is not here")


# --- tokenizer


def test_vae_is_compared_with_cache_and_checkpoint(trained, own):
    vae = load_vae(own / "vae.ckpt")
    vae.quant_conv.bias.data += 1  # other numbers in the same layout
    save_vae(own / "vae.ckpt", vae)
    assert_found(check("inputs", own), FAILURE, "another VAE")
    other = check("inputs", own, **IMAGES, resume=trained)
    assert_found(other, WARNING, "was trained with another VAE file")


def test_vae_that_cannot_be_read_fails_unless_nothing_needs_it(own):
    (own / "vae.ckpt").write_bytes(b"damaged")
    assert_found(check("VAE", own), FAILURE, "--vae_path", "damaged")
    (own / "vae.ckpt").unlink()
    assert_found(check("VAE", own), OK, "no image has to be encoded")
    assert_found(check("VAE", own, online_eval=True), FAILURE, "no such file")


def test_a_photograph_comes_back(inputs, monkeypatch):
    path = inputs / PHOTO
    assert_found(check("VAE", inputs, photo=path), WARNING, "not KL-16", "sha256", "below 18 dB")
    monkeypatch.setattr("models.tokenizers.kl16.AutoencoderKL.is_kl16", True)
    assert_found(check("VAE", inputs, photo=path), FAILURE, "not kl16.ckpt as published")
    monkeypatch.setattr(doctor, "psnr", lambda *_: torch.tensor([18.5]))
    assert_found(check("VAE", inputs, photo=path), OK, "0.png 18.5 dB")
    assert_found(check("VAE", inputs, photo="/none.png"), FAILURE, "/none.png")
    monkeypatch.undo()
    assert_found(check("VAE", inputs), WARNING, "china.jpg", "flower.jpg")
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert_found(check("VAE", inputs), WARNING, "pip install scikit-learn", "--photo")


def std_in(finding: Finding) -> float:
    return float(re.search(r"std ([\d.]+)", finding.text)[1])


def test_latents_have_unit_variance_and_use_their_levels(inputs):
    scale = open_cache(inputs / "cache").manifest["latent_scale"]
    finding, twice = check("latents", inputs), check("latents", inputs, latent_scale=2 * scale)
    assert_found(finding, OK, "of 24 images", "in bits, of 6", "% out of range 0.00 to")
    assert_found(twice, WARNING, "std is not near 1")
    assert [std_in(finding), std_in(twice)] == pytest.approx([1, 2], rel=0.03)
    narrow = check("latents", inputs, latent_scale=scale / 8)
    assert_found(narrow, WARNING, "less than half of the levels used", "--quantizer calibrated")
    assert "std far from 1, or mean from 0 in channels [0, 1, 2, 3]" in narrow.text
    wide = check("latents", inputs, quant_min=-1, quant_max=1)
    assert_found(wide, WARNING, "saturated in channels [0, 1, 2, 3]", "--quant_min")
    assert "out of range" not in check("latents", inputs, quantizer="calibrated").text
    images = check("latents", inputs, **IMAGES | LATENTS)
    assert std_in(images) == pytest.approx(std_in(check("latents", inputs, latent_scale=1.0)), 0.05)
    assert_found(check("inputs", inputs, **IMAGES), FAILURE, "--latent_scale and --channel_order")


def test_figures_are_those_of_the_latents(inputs):
    """Std, mean and entropy by channel."""
    found = opened(inputs)
    tokenizer = Tokenizer(None, found.inputs.config.latent_scale)
    latents, _ = read_latents(found.inputs.data.dataset, range(24), tokenizer, CPU)
    channels, bits = latents.movedim(1, 0).flatten(1), []
    for x in channels:
        p = GaussianQuantizer(64).encode(x).unique(return_counts=True)[1] / x.numel()
        bits.append(-(p * p.log2()).sum())
    said = doctor.latents(found).text.partition("by channel")[2]
    numbers = [float(x) for x in re.findall(r"-?\d+\.\d+", said.partition("%")[0])]
    figures = channels.std(1), channels.mean(1), torch.stack(bits)
    expected = [x.item() for values in figures for x in (values.min(), values.max())]
    assert numbers == pytest.approx(expected, abs=0.006)


# --- data, cache, checkpoint


def test_data_fits_model_and_vae(inputs, trained, own, tmp_path):
    evaluated = check("inputs", inputs, evaluate=True, use_cached=None, resume=trained)
    assert evaluated.state == OK and "images" not in evaluated.text
    for source in ({}, IMAGES | LATENTS):
        found = check("inputs", inputs, **source)
        assert_found(found, OK, "24 images in 3 classes", "1.0 M parameters", "4 scalars")
        assert_found(check("inputs", inputs, **source, class_num=5), WARNING, "never trained")
        assert_found(check("inputs", inputs, **source, class_num=2), FAILURE, "--class_num is 2")
    missing = IMAGES | {"data_path": "none"}
    assert_found(check("inputs", inputs, **missing), FAILURE, "--data_path")
    assert_found(check("inputs", inputs, patch_size=3), FAILURE, "img_size 16", "patch_size 3")
    moments = np.zeros((2 * CHANNELS, 4, 4), np.float32)
    (tmp_path / "published" / "ant").mkdir(parents=True)
    np.savez(tmp_path / "published" / "ant" / "0.npz", moments=moments, moments_flip=moments)
    sizes = {"vae_stride": 4, "vae_embed_dim": CHANNELS} | LATENTS
    cache = check("inputs", inputs, cached_path=tmp_path / "published", **sizes)
    assert_found(cache, WARNING, "published form does not say by which VAE")
    (own / "cache" / "manifest.json").write_text("{")
    broken = doctor.examine(opened(own), ("inputs", "latents", "disk space"))
    assert_found(broken[0], FAILURE, "manifest.json")
    assert [f.text for f in broken[1:]] == ["not checked: see inputs"] * 2


def test_checkpoint_is_whole_and_fits(inputs, trained, tmp_path):
    assert_found(check("checkpoint", inputs), OK, "none yet")
    assert_found(check("checkpoint", inputs, evaluate=True), FAILURE, "--resume is missing")
    assert_found(check("checkpoint", inputs, resume=trained), OK, "checksums agree")
    other = check("checkpoint", inputs, resume=trained, quant_bits=4)
    assert_found(other, FAILURE, "quant_levels 64, but the flags say 16")
    state = load(trained)
    first = next(iter(state["model"]))
    state["model"][first] = state["model"][first][..., :0]
    torch.save(state, tmp_path / "damaged.pth")
    assert_found(check("checkpoint", inputs, resume=tmp_path / "damaged.pth"), FAILURE, first)
    (tmp_path / "checkpoint-step00000003.pth").write_bytes(b"damaged")
    before = sorted(tmp_path.iterdir())
    found = check("checkpoint", inputs, resume="auto", output_dir=tmp_path)
    assert_found(found, FAILURE, "damaged")
    assert sorted(tmp_path.iterdir()) == before  # a training would set it aside


# --- evaluation and space


def test_disk_space(inputs, trained, monkeypatch):
    """Of a checkpoint: weights, average and two moments in fp32, as it is on the disk."""
    saved = (trained / "checkpoint-last.pth").stat().st_size
    for files, state in ((100, OK), (5, WARNING), (2, FAILURE)):
        usage = SimpleNamespace(free=saved * files)
        monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path, usage=usage: usage)
        found = check("disk space", inputs, epochs=8, save_every=8, keep_checkpoints=1)
        assert_found(found, state, "3 checkpoints of")
    assert_found(check("disk space", inputs, evaluate=True), OK, "not needed")


# --- all of them


def test_no_check_stops_another(inputs, monkeypatch, capsys):
    """And what is printed on the way joins the finding; only notes and warnings are doubts."""
    checks = {
        "broken": mock.Mock(side_effect=RuntimeError("no\nsuch luck")),
        "noted": lambda _: print("note: odd") or Finding(OK, "here"),
        "chatty": lambda _: print("read") or Finding(OK, "here"),
    }
    monkeypatch.setattr(doctor, "CHECKS", checks)
    assert [(f.state, f.text) for f in doctor.examine(opened(inputs), tuple(checks))] == [
        (FAILURE, "unexpected RuntimeError: no such luck"),
        (WARNING, "here; note: odd"),
        (OK, "here; read"),
    ]
    assert capsys.readouterr().out == ""


def test_one_line_each_and_the_exit_code(inputs, capsys):
    argv = flags(inputs, GOOD, output_dir=inputs / "new", photo=inputs / PHOTO)
    call(doctor.main, *argv)
    lines = capsys.readouterr().out.splitlines()
    assert [line[9:25].strip() for line in lines[:-1]] == list(doctor.CHECKS)
    assert lines[-1].endswith("0 failures") and not (inputs / "new").exists()


def test_json_on_two_processes(inputs):
    """Standard output is one object, whatever the processes have to say besides."""
    changes = {"photo": inputs / PHOTO, "class_num": 2, "output_dir": inputs / "new"}
    argv = [*flags(inputs, GOOD, **changes), "--json"]
    result = on_processes(2, "-m", "util.doctor", *argv, code=1)
    found = json.loads(result.stdout)
    states = {entry["name"]: entry for entry in found["checks"]}
    assert list(states) == list(doctor.CHECKS) and not found["ok"]
    assert states["inputs"]["state"] == FAILURE and "--class_num is 2" in states["inputs"]["text"]
    assert "2 by gloo" in states["processes"]["text"]


def test_what_another_process_finds_worse_is_said(inputs, monkeypatch):
    worse = [Finding(FAILURE, "full"), Finding(OK, "other")]
    fake = SimpleNamespace(beat=lambda doing: None, gather_objects=lambda own: [own, worse])
    monkeypatch.setattr(doctor, "dist", fake)
    space, device = doctor.examine(opened(inputs), ("disk space", "device"))
    assert space.text == "process 1: full" and not device.text.startswith("process")
