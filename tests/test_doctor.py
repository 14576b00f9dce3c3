"""Every check in good health, in doubt and in failure, with tiny files; and none stops another."""

import json
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

from models.quantizer import GaussianQuantizer
from tests.conftest import ROOT
from tests.measures import PIXELS, save_random_inception
from tests.runs import (
    CHANNELS,
    CLASSES,
    COMMON,
    SIZE,
    call,
    flags,
    make_inputs,
    on_processes,
    train,
)
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


@pytest.fixture
def own(inputs, tmp_path) -> Path:
    """A copy to spoil."""
    return shutil.copytree(inputs, tmp_path / "own")


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


def test_device_and_precision(inputs, monkeypatch):
    assert_found(check("device", inputs), OK, torch.__version__, "cpu")
    assert_found(check("device", inputs, device="cuda"), WARNING, "--device cuda is not here")
    for name in ("fp32", "bf16"):
        assert_found(check("precision", inputs, precision=name), OK, name)
    broken = mock.patch.object(torch.Tensor, "__matmul__", lambda a, _b: a * torch.nan)
    # The exact product is computed outside of the context, by the right operator.
    chosen = SimpleNamespace(name="fp16", autocast=lambda _: broken)
    monkeypatch.setattr(doctor, "resolve_precision", lambda *_: chosen)
    assert_found(check("precision", inputs), FAILURE, "arithmetic is wrong")


def test_another_checkout_is_named(inputs, tmp_path, monkeypatch):
    """Where Python finds its models, and where pip has its editable installation."""
    assert str(tmp_path) not in check("code", inputs).text
    registered = tmp_path / "site-packages" / "tokenbridge-0.1.0.dist-info"
    for folder in (tmp_path / "first" / "models", tmp_path / "an editable" / "util", registered):
        folder.mkdir(parents=True)
        (folder / "__init__.py").touch()
    (registered / "METADATA").write_text("Name: tokenbridge\n")
    record = {"url": (tmp_path / "an editable").as_uri(), "dir_info": {"editable": True}}
    (registered / "direct_url.json").write_text(json.dumps(record))
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path / "first"), str(registered.parent)])
    places = str(tmp_path / "first"), str(tmp_path / "an editable")
    assert_found(check("code", inputs), WARNING, f"of {ROOT}", *places, "pip uninstall")


# --- tokenizer


def test_vae_is_compared_with_cache_and_checkpoint(inputs, own):
    assert_found(check("VAE", inputs, resume=inputs / "out"), OK, "not KL-16", "sha256")
    vae = load_vae(own / "vae.ckpt")
    vae.quant_conv.bias.data += 1  # other numbers in the same layout
    save_vae(own / "vae.ckpt", vae)
    assert_found(check("data", own), FAILURE, "another VAE")
    other = check("checkpoint", own, **IMAGES, resume=own / "out")
    assert_found(other, WARNING, "was trained with another VAE file")


def test_vae_that_cannot_be_read_fails_once_unless_nothing_needs_it(own):
    (own / "vae.ckpt").write_bytes(b"damaged")
    assert_found(check("VAE", own), FAILURE, "--vae_path", "damaged")
    (own / "vae.ckpt").unlink()
    assert_found(check("VAE", own), OK, "no image has to be encoded")
    both = doctor.examine(opened(own, online_eval=True), ("VAE", "photograph"))
    assert_found(both[0], FAILURE, "no such file")
    assert_found(both[1], WARNING, "not checked: see VAE")


def photo(folder: Path) -> Path:
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (40, 50, 3), np.uint8)).save(folder / "photo.png")
    return folder / "photo.png"


def test_a_photograph_comes_back(inputs, tmp_path, monkeypatch):
    path = photo(tmp_path)
    assert_found(check("photograph", inputs, photo=path), WARNING, "not KL-16", "below 18 dB")
    monkeypatch.setattr("models.tokenizers.kl16.AutoencoderKL.is_kl16", True)
    assert_found(check("photograph", inputs, photo=path), FAILURE, "not kl16.ckpt as published")
    monkeypatch.setattr(doctor, "psnr", lambda *_: torch.tensor([18.5]))
    assert_found(check("photograph", inputs, photo=path), OK, "photo.png 18.5 dB")
    missing = check("photograph", inputs, photo=tmp_path / "none.png")
    assert_found(missing, FAILURE, "none.png")
    monkeypatch.undo()
    assert_found(check("photograph", inputs), WARNING, "china.jpg", "flower.jpg")
    monkeypatch.setitem(sys.modules, "sklearn", None)
    assert_found(check("photograph", inputs), WARNING, "pip install scikit-learn", "--photo")


def scaled_inputs(own: Path, factor: float, channel: int | None = None) -> Path:
    """A cache whose manifest tells another scale, or one channel's bins another width."""
    manifest = read_json(own / "cache" / "manifest.json")
    if channel is None:
        manifest["latent_scale"] *= factor
    else:
        manifest["histogram"]["exponents"][channel] += int(np.log2(factor))
    write_json(own / "cache" / "manifest.json", manifest)
    return own


def std_in(finding: Finding) -> float:
    return float(re.search(r"std ([\d.]+)", finding.text)[1])


def test_latents_have_unit_variance(inputs, own):
    # The noise of the samples is drawn by the latents' bits: another processor, another draw.
    finding, twice = check("latents", inputs), check("latents", scaled_inputs(own, 2.0))
    assert_found(finding, OK, "std")
    assert_found(twice, WARNING, "std is not near 1")
    assert [std_in(finding), std_in(twice)] == pytest.approx([1, 2], rel=0.03)
    own = scaled_inputs(scaled_inputs(own, 0.5), 4, channel=2)
    assert_found(check("latents", own), WARNING, "std of channels [2]", "std is not near 1")


def test_latents_of_images_are_measured(inputs):
    cached = check("latents", inputs, latent_scale=1.0)
    finding = check("latents", inputs, **IMAGES | LATENTS)
    assert std_in(finding) == pytest.approx(std_in(cached), rel=0.05)
    assert_found(check("model", inputs, **IMAGES), FAILURE, "--latent_scale and --channel_order")


def test_quantizer_uses_its_levels(inputs, own):
    finding = check("quantizer", inputs)
    assert_found(finding, OK, "published", "of 3 bits", "out of range 0.00%")
    narrow = check("quantizer", scaled_inputs(own, 0.125))
    assert_found(narrow, WARNING, "use less than half of the levels", "--quantizer calibrated")
    wide = check("quantizer", inputs, quant_min=-1, quant_max=1)
    assert_found(wide, WARNING, "channels [0, 1, 2, 3] saturate", "--quant_min")
    calibrated = check("quantizer", inputs, quantizer="calibrated")
    assert_found(calibrated, OK, "calibrated", "out of range 0.00% to 0.00%")


def test_figures_are_those_of_the_latents(inputs):
    """Entropy, mean and std by channel, of the posterior samples themselves."""
    found = opened(inputs)
    moments = torch.stack(
        [found.inputs.data.dataset[(i, f)][0] for i in range(24) for f in (False, True)]
    )
    mean, logvar = moments.double().chunk(2, dim=1)
    noise = torch.stack([posterior_noise(m) for m in moments])
    samples = (mean + (logvar.clamp(-30, 20) / 2).exp() * noise) * found.inputs.config.latent_scale
    bits = []
    for channel in range(CHANNELS):
        counts = torch.bincount(GaussianQuantizer(8).encode(samples[:, channel]).flatten())
        p = counts[counts > 0] / counts.sum()
        bits.append(-(p * p.log2()).sum().item())
    finding = doctor.quantizer(found)
    assert f"entropy {min(bits):.2f} to {max(bits):.2f} of 3 bits" in finding.text
    assert finding.by_channel["entropy_bits"] == pytest.approx(bits, abs=0.02)
    by_channel = doctor.latents(found).by_channel
    expected = samples.movedim(1, 0).flatten(1)
    assert by_channel["std"] == pytest.approx(expected.std(dim=1), rel=1e-3)
    assert by_channel["mean"] == pytest.approx(expected.mean(dim=1), abs=1e-3)


# --- data, cache, checkpoint


def test_data_fits_model_and_vae(inputs, own, tmp_path):
    evaluated = dict(evaluate=True, use_cached=None, resume=inputs / "out")
    assert_found(check("data", inputs, **evaluated), OK, "not read")
    for source in ({}, IMAGES | LATENTS):
        assert_found(check("data", inputs, **source), OK, "24 images in 3 classes")
        assert_found(check("data", inputs, **source, class_num=5), WARNING, "never trained")
        assert_found(check("data", inputs, **source, class_num=2), FAILURE, "--class_num is 2")
    missing = IMAGES | {"data_path": "none"}
    assert_found(check("data", inputs, **missing), FAILURE, "--data_path")
    published = tmp_path / "published"
    for name in CLASSES:
        (published / name).mkdir(parents=True)
        moments = np.zeros((2 * CHANNELS, 4, 4), np.float32)
        np.savez(published / name / "0.npz", moments=moments, moments_flip=moments)
    sizes = {"vae_stride": 4, "vae_embed_dim": CHANNELS} | LATENTS
    cache = check("data", inputs, cached_path=published, **sizes)
    assert_found(cache, WARNING, "published form", "does not say by which VAE")
    (own / "cache" / "manifest.json").write_text("{")
    broken = doctor.examine(opened(own), ("data", "latents", "disk space"))
    assert_found(broken[0], FAILURE, "manifest.json")
    assert [f.text for f in broken[1:]] == ["not checked: see data"] * 2


def test_settings_agree(inputs):
    assert_found(check("model", inputs), OK, "1.0 M parameters", "16 positions of 4 scalars")
    assert_found(check("model", inputs, patch_size=3), FAILURE, "img_size 16", "patch_size 3")
    changes = dict(resume=inputs / "out", quant_bits=4)
    both = doctor.examine(opened(inputs, **changes), ("checkpoint", "model"))
    assert_found(both[0], FAILURE, "quant_levels 8, but the flags say 16")
    assert_found(both[1], WARNING, "not checked: see checkpoint")


def test_checkpoint_is_whole_and_fits(inputs, own):
    assert_found(check("checkpoint", inputs), OK, "none yet")
    assert_found(check("checkpoint", inputs, evaluate=True), FAILURE, "--resume is missing")
    assert_found(check("checkpoint", inputs, resume=inputs / "out"), OK, "checksums agree")
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


def test_fid_statistics_and_feature_weights(inputs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def found(name: str, **changes) -> Finding:
        return check(name, inputs, **{"no_metrics": None} | changes)

    def statistics(width: int, img_size: int = SIZE, **changes) -> Finding:
        facts = dict(img_size=img_size, count=9)
        np.savez(tmp_path / "stats.npz", mu=np.zeros(width), sigma=np.eye(width), **facts)
        return found("FID statistics", fid_stats=tmp_path / "stats.npz", **changes)

    weights = save_random_inception(tmp_path / "weights.pth")
    pixels = dict(feature_extractor=PIXELS)
    for name in ("FID statistics", "feature weights"):
        assert_found(found(name, no_metrics=True), OK, "not needed")
    assert_found(found("FID statistics"), WARNING, "FID cannot be computed", "--fid_stats")
    assert_found(statistics(2048), WARNING, "2048 features, sha256", "too large")
    assert_found(statistics(9), FAILURE, "2048 features")
    assert_found(statistics(9, **pixels), WARNING, "not checked", "--inception_weights")
    assert_found(found("feature weights", inception_weights=weights), OK, "2048", "sha256")
    assert_found(found("feature weights"), WARNING, "no Inception weights here", str(tmp_path))
    assert_found(found("feature weights", **pixels), OK, "an extractor that finds its own")
    torch.save({"a": torch.zeros(1)}, weights)
    other = found("feature weights", inception_weights=weights)
    assert_found(other, FAILURE, "not the weights of")
    pixels["inception_weights"] = weights
    assert_found(statistics(9, 2 * SIZE, **pixels), FAILURE, f"images of {2 * SIZE} px")


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
    result = on_processes(2, "-m", "util.doctor", *flags(inputs, GOOD, **changes), "--json")
    assert result.returncode == 1
    found = json.loads(result.stdout)
    states = {entry["name"]: entry for entry in found["checks"]}
    assert list(states) == list(doctor.CHECKS) and not found["ok"]
    assert states["data"]["state"] == FAILURE and "--class_num is 2" in states["data"]["text"]
    assert "2 by gloo" in states["processes"]["text"]


def test_what_another_process_finds_worse_is_said(inputs, monkeypatch):
    worse = [Finding(FAILURE, "full"), Finding(OK, "other")]
    fake = SimpleNamespace(beat=lambda doing: None, gather_objects=lambda own: [own, worse])
    monkeypatch.setattr(doctor, "dist", fake)
    space, device = doctor.examine(opened(inputs), ("disk space", "device"))
    assert space.text == "process 1: full" and not device.text.startswith("process")
