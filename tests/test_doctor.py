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
from PIL import Image

from models.quantizer import GaussianQuantizer
from tests.runs import CHANNELS, CLASSES, COMMON, call, flags, make_inputs, on_processes, train
from util import doctor
from util.data.cache_writer import write_json
from util.data.histogram import posterior_noise
from util.data.latent_cache import read_json
from util.doctor import FAILURE, OK, WARNING, Finding, Opened
from util.vae import load_vae, save_vae

GOOD = {
    **COMMON,
    **dict(model="tokenbridge_tiny", class_num=3, buffer_size=4, epochs=2, no_metrics=True),
    **dict(use_cached=True, cached_path="cache", vae_path="vae.ckpt", quant_bits=3),
}
IMAGES = {"use_cached": None, "cached_path": None, "data_path": "data"}
LATENTS = {"latent_scale": 1.0, "channel_order": "0,1,2,3"}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """Also out/, a checkpoint of a training on the cache."""
    folder = make_inputs(tmp_path_factory.mktemp("inputs"))
    train(folder, folder / "out", epochs=1, quant_bits=3)
    return folder


def opened(inputs: Path, **changes) -> Opened:
    argv = flags(inputs, GOOD, **{"output_dir": inputs / "new"} | changes)
    return Opened(doctor.make_parser().parse(argv), torch.device("cpu"))


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


def test_vae_is_compared_with_cache_and_checkpoint(inputs, own):
    vae = load_vae(own / "vae.ckpt")
    vae.quant_conv.bias.data += 1  # other numbers in the same layout
    save_vae(own / "vae.ckpt", vae)
    assert_found(check("inputs", own), FAILURE, "another VAE")
    other = check("inputs", own, **IMAGES, resume=own / "out")
    assert_found(other, WARNING, "was trained with another VAE file")


def test_vae_that_cannot_be_read_fails_unless_nothing_needs_it(own):
    (own / "vae.ckpt").write_bytes(b"damaged")
    assert_found(check("VAE", own), FAILURE, "--vae_path", "damaged")
    (own / "vae.ckpt").unlink()
    assert_found(check("VAE", own), OK, "no image has to be encoded")
    assert_found(check("VAE", own, online_eval=True), FAILURE, "no such file")


def photo(folder: Path) -> Path:
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (40, 50, 3), np.uint8)).save(folder / "photo.png")
    return folder / "photo.png"


def test_a_photograph_comes_back(inputs, tmp_path, monkeypatch):
    path = photo(tmp_path)
    assert_found(check("VAE", inputs, photo=path), WARNING, "not KL-16", "sha256", "below 18 dB")
    monkeypatch.setattr("models.tokenizers.kl16.AutoencoderKL.is_kl16", True)
    assert_found(check("VAE", inputs, photo=path), FAILURE, "not kl16.ckpt as published")
    monkeypatch.setattr(doctor, "psnr", lambda *_: torch.tensor([18.5]))
    assert_found(check("VAE", inputs, photo=path), OK, "photo.png 18.5 dB")
    assert_found(check("VAE", inputs, photo=tmp_path / "none.png"), FAILURE, "none.png")
    monkeypatch.undo()
    assert_found(check("VAE", inputs), WARNING, "china.jpg", "flower.jpg")
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert_found(check("VAE", inputs), WARNING, "pip install scikit-learn", "--photo")


def scaled_inputs(own: Path, factor: float) -> Path:
    """A cache whose manifest tells another scale."""
    manifest = read_json(own / "cache" / "manifest.json")
    manifest["latent_scale"] *= factor
    write_json(own / "cache" / "manifest.json", manifest)
    return own


def std_in(finding: Finding) -> float:
    return float(re.search(r"std ([\d.]+)", finding.text)[1])


def test_latents_have_unit_variance_and_use_their_levels(inputs, own):
    finding, twice = check("latents", inputs), check("latents", scaled_inputs(own, 2.0))
    assert_found(finding, OK, "of 24 images", "in bits, of 3", "% out of range 0.00 to")
    assert_found(twice, WARNING, "std is not near 1")
    assert [std_in(finding), std_in(twice)] == pytest.approx([1, 2], rel=0.03)
    narrow = check("latents", scaled_inputs(own, 0.0625))
    assert_found(narrow, WARNING, "less than half of the levels used", "--quantizer calibrated")
    assert "std far from 1, or mean from 0 in channels [0, 1, 2, 3]" in narrow.text
    wide = check("latents", inputs, quant_min=-1, quant_max=1)
    assert_found(wide, WARNING, "saturated in channels [0, 1, 2, 3]", "--quant_min")
    assert "out of range" not in check("latents", inputs, quantizer="calibrated").text
    images = check("latents", inputs, **IMAGES | LATENTS)
    assert std_in(images) == pytest.approx(std_in(check("latents", inputs, latent_scale=1.0)), 0.05)
    assert_found(check("inputs", inputs, **IMAGES), FAILURE, "--latent_scale and --channel_order")


def test_figures_are_those_of_the_latents(inputs):
    """Entropy, mean and std by channel, of posterior samples with other noise."""
    found = opened(inputs)
    moments = torch.stack([found.inputs.data.dataset[i][0] for i in range(24)])
    mean, logvar = moments.double().chunk(2, dim=1)
    noise = torch.stack([posterior_noise(m) for m in moments])
    samples = (mean + (logvar.clamp(-30, 20) / 2).exp() * noise) * found.inputs.config.latent_scale
    bits = []
    for channel in range(CHANNELS):
        counts = torch.bincount(GaussianQuantizer(8).encode(samples[:, channel]).flatten())
        p = counts[counts > 0] / counts.sum()
        bits.append(-(p * p.log2()).sum().item())
    said = doctor.latents(found).text.partition("by channel")[2]
    numbers = [float(x) for x in re.findall(r"-?\d+\.\d+", said.partition("%")[0])]
    channels = samples.movedim(1, 0).flatten(1)
    expected = [x.item() for v in (channels.std(1), channels.mean(1)) for x in (v.min(), v.max())]
    assert numbers == pytest.approx([*expected, min(bits), max(bits)], abs=0.1)


# --- data, cache, checkpoint


def test_data_fits_model_and_vae(inputs, own, tmp_path):
    evaluated = check("inputs", inputs, evaluate=True, use_cached=None, resume=inputs / "out")
    assert evaluated.state == OK and "images" not in evaluated.text
    for source in ({}, IMAGES | LATENTS):
        found = check("inputs", inputs, **source)
        assert_found(found, OK, "24 images in 3 classes", "1.0 M parameters", "4 scalars")
        assert_found(check("inputs", inputs, **source, class_num=5), WARNING, "never trained")
        assert_found(check("inputs", inputs, **source, class_num=2), FAILURE, "--class_num is 2")
    missing = IMAGES | {"data_path": "none"}
    assert_found(check("inputs", inputs, **missing), FAILURE, "--data_path")
    assert_found(check("inputs", inputs, patch_size=3), FAILURE, "img_size 16", "patch_size 3")
    published = tmp_path / "published"
    for name in CLASSES:
        (published / name).mkdir(parents=True)
        moments = np.zeros((2 * CHANNELS, 4, 4), np.float32)
        np.savez(published / name / "0.npz", moments=moments, moments_flip=moments)
    sizes = {"vae_stride": 4, "vae_embed_dim": CHANNELS} | LATENTS
    cache = check("inputs", inputs, cached_path=published, **sizes)
    assert_found(cache, WARNING, "published form does not say by which VAE")
    (own / "cache" / "manifest.json").write_text("{")
    broken = doctor.examine(opened(own), ("inputs", "latents", "disk space"))
    assert_found(broken[0], FAILURE, "manifest.json")
    assert [f.text for f in broken[1:]] == ["not checked: see inputs"] * 2


def test_checkpoint_is_whole_and_fits(inputs, own):
    assert_found(check("checkpoint", inputs), OK, "none yet")
    assert_found(check("checkpoint", inputs, evaluate=True), FAILURE, "--resume is missing")
    assert_found(check("checkpoint", inputs, resume=inputs / "out"), OK, "checksums agree")
    other = check("checkpoint", inputs, resume=inputs / "out", quant_bits=4)
    assert_found(other, FAILURE, "quant_levels 8, but the flags say 16")
    state = torch.load(own / "out" / "checkpoint-last.pth", weights_only=True)
    first = next(iter(state["model"]))
    state["model"][first] = state["model"][first][..., :0]
    torch.save(state, own / "damaged.pth")
    assert_found(check("checkpoint", own, resume=own / "damaged.pth"), FAILURE, first)
    for path in (own / "out").glob("*.pth"):
        path.unlink()
    (own / "out" / "checkpoint-step00000003.pth").write_bytes(b"damaged")
    before = sorted((own / "out").iterdir())
    found = check("checkpoint", own, resume="auto", output_dir=own / "out")
    assert_found(found, FAILURE, "damaged")
    assert sorted((own / "out").iterdir()) == before  # a training would set it aside


# --- evaluation and space


@pytest.mark.parametrize("files,state", [(100, OK), (5, WARNING), (2, FAILURE)])
def test_disk_space(inputs, monkeypatch, files, state):
    """Of a checkpoint: weights, average and two moments in fp32, as it is on the disk."""
    saved = (inputs / "out" / "checkpoint-last.pth").stat().st_size
    usage = SimpleNamespace(free=saved * files)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage)
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


def test_one_line_each_and_the_exit_code(inputs, tmp_path, capsys):
    argv = flags(inputs, GOOD, output_dir=inputs / "new", photo=photo(tmp_path))
    call(doctor.main, *argv)
    lines = capsys.readouterr().out.splitlines()
    assert [line[9:25].strip() for line in lines[:-1]] == list(doctor.CHECKS)
    assert lines[-1].endswith("0 failures") and not (inputs / "new").exists()


def test_json_on_two_processes(inputs, tmp_path):
    """Standard output is one object, whatever the processes have to say besides."""
    changes = {"photo": photo(tmp_path), "class_num": 2, "output_dir": inputs / "new"}
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
