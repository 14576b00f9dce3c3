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
from models.tokenizers.kl16 import AutoencoderKL
from tests.conftest import ROOT
from tests.measures import PIXELS, save_random_inception
from tests.runs import (
    CHANNELS,
    CLASSES,
    COMMON,
    SIZE,
    flags,
    make_inputs,
    on_processes,
    run_together,
    train,
)
from util import doctor, doctor_checks
from util.data.cache_writer import write_json
from util.data.histogram import posterior_noise
from util.data.latent_cache import read_json
from util.doctor_patient import FAILURE, OK, WARNING, Finding, Patient
from util.vae import load_vae, save_vae

GOOD = {
    **COMMON,
    **dict(model="tokenbridge_tiny", class_num=3, buffer_size=4, epochs=2, no_metrics=True),
    **dict(use_cached=True, cached_path="cache", vae_path="vae.ckpt", quant_bits=3),
}


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


def patient(inputs: Path, **changes) -> Patient:
    changes = {"output_dir": inputs / "new"} | changes
    argv = flags(inputs, GOOD, **changes)
    return Patient(doctor.make_parser().parse(argv), torch.device("cpu"))


def check(name: str, inputs: Path, **changes) -> Finding:
    return doctor.attempt(name, doctor.CHECKS[name], patient(inputs, **changes))


def assert_found(finding: Finding, state: str, *fragments: str) -> None:
    assert finding.state == state, finding
    for fragment in fragments:
        assert fragment in f"{finding.text}; {finding.remedy}", finding


# --- machine


def test_device(inputs):
    assert_found(check("device", inputs), OK, torch.__version__, "cpu")
    assert_found(check("device", inputs, device="cuda"), WARNING, "--device cuda is not here")


@pytest.mark.parametrize("name", ["fp32", "bf16"])
def test_precision(inputs, name):
    assert_found(check("precision", inputs, precision=name), OK, name)


def test_wrong_arithmetic_fails(inputs, monkeypatch):
    class Broken:
        name = "fp16"

        def autocast(self, device):
            return mock.patch.object(torch.Tensor, "__matmul__", lambda a, b: a * torch.nan)

    with mock.patch.object(doctor_checks, "resolve_precision", lambda *_: Broken()):
        # The exact product is computed outside of the context, by the right operator.
        assert_found(check("precision", inputs), FAILURE, "arithmetic is wrong")


def test_one_process_has_nothing_to_sum(inputs):
    assert_found(check("processes", inputs), OK, "one process")


def test_a_wrong_sum_fails(inputs, monkeypatch):
    fake = SimpleNamespace(
        world_size=lambda: 3,
        rank=lambda: 0,
        backend=lambda: "gloo",
        all_reduce_sum=lambda tensor: tensor,
    )
    monkeypatch.setattr(doctor_checks, "dist", fake)
    assert_found(check("processes", inputs), FAILURE, "their sum is 1", "it should be 6")


def test_another_checkout_is_named(inputs, tmp_path, monkeypatch):
    """Where Python finds its models, and where pip has its editable installation."""
    assert str(tmp_path) not in check("code", inputs).text
    registered = tmp_path / "site-packages" / "tokenbridge-0.1.0.dist-info"
    for folder in (tmp_path / "first" / "models", tmp_path / "an editable" / "util", registered):
        folder.mkdir(parents=True)
        (folder / "__init__.py").touch()
    (registered / "METADATA").write_text("Name: tokenbridge\n")
    url = (tmp_path / "an editable").as_uri()
    (registered / "direct_url.json").write_text(
        json.dumps({"url": url, "dir_info": {"editable": True}})
    )
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path / "first"), str(registered.parent)])
    places = str(tmp_path / "first"), str(tmp_path / "an editable")
    assert_found(check("code", inputs), WARNING, f"of {ROOT}", *places, "pip uninstall")


def test_two_checkouts_are_not_mixed(tmp_path):
    (tmp_path / "models").mkdir()
    command = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import util"
    (tmp_path / "models" / "__init__.py").touch()
    ((code, _, stderr),) = run_together(["-c", command])
    assert code == 1 and f"util comes from {ROOT} and models from {tmp_path}" in stderr


# --- tokenizer


def test_vae_is_compared_with_cache_and_checkpoint(inputs, own):
    assert_found(check("VAE", inputs, resume=inputs / "out"), OK, "not KL-16", "sha256")
    vae = load_vae(own / "vae.ckpt")
    with torch.no_grad():
        vae.quant_conv.bias += 1
    save_vae(own / "vae.ckpt", vae)
    finding = check("VAE", own, resume=own / "out")
    assert_found(finding, FAILURE, "--cached_path was made with", "--resume was made with")


def test_vae_that_cannot_be_read_fails_unless_nothing_needs_it(inputs, own):
    (own / "vae.ckpt").write_bytes(b"damaged")
    assert_found(check("VAE", own), FAILURE, "--vae_path", "damaged")
    (own / "vae.ckpt").unlink()
    assert_found(check("VAE", own), OK, "cached latents do without it")
    assert_found(check("VAE", own, online_eval=True), FAILURE, "no such file")
    assert_found(check("photograph", own), WARNING, "not checked", "needs the VAE")


def photo(folder: Path) -> Path:
    path = folder / "photo.png"
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (40, 50, 3), np.uint8)).save(path)
    return path


def test_a_photograph_comes_back(inputs, tmp_path, monkeypatch):
    path = photo(tmp_path)
    assert_found(check("photograph", inputs, photo=path), WARNING, "not KL-16", "below 18 dB")
    monkeypatch.setattr("models.tokenizers.kl16.AutoencoderKL.is_kl16", True)
    assert_found(check("photograph", inputs, photo=path), FAILURE, "not kl16.ckpt as published")
    monkeypatch.setattr(doctor_checks, "psnr", lambda *_: torch.tensor([18.5]))
    assert_found(check("photograph", inputs, photo=path), OK, "photo.png 18.5 dB")
    missing = check("photograph", inputs, photo=tmp_path / "none.png")
    assert_found(missing, FAILURE, "none.png")


def test_photographs_of_scikit_learn_or_a_word_where_they_are(inputs, monkeypatch):
    assert_found(check("photograph", inputs), WARNING, "china.jpg", "flower.jpg")
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
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


def test_latents_have_unit_variance(inputs, own):
    finding, twice = check("latents", inputs), check("latents", scaled_inputs(own, 2.0))
    assert_found(finding, OK, "24 cached images")
    assert_found(twice, WARNING, "std is not near 1")
    # The noise of the samples is drawn by the latents' bits: another processor, another draw.
    for found, expected in ((finding, 1), (twice, 2)):
        std = float(re.search(r"std ([\d.]+)", found.text)[1])
        assert std == pytest.approx(expected, rel=0.03)


def test_a_channel_of_its_own_is_named(own):
    finding = check("latents", scaled_inputs(own, 4, channel=2))
    assert_found(finding, WARNING, "std of channels [2]", "std is not near 1")


def test_latents_of_images_are_measured(inputs):
    scale = {"latent_scale": 1.0, "channel_order": "0,1,2,3"}
    changes = {"use_cached": None, "cached_path": None, "data_path": "data"} | scale
    cached = check("latents", inputs, latent_scale=1.0)
    finding = check("latents", inputs, **changes)
    assert "24 images of --data_path" in finding.text

    def std(text: str) -> float:
        return float(text.split("std ")[1].split(",")[0])

    assert std(finding.text) == pytest.approx(std(cached.text), rel=0.05)
    finding = check("latents", inputs, **changes | {"latent_scale": None})
    assert_found(finding, WARNING, "not checked", "the model's settings")
    assert_found(check("model", inputs, **changes | {"latent_scale": None}), FAILURE, "--latent_sc")


def test_quantizer_uses_its_levels(inputs, own):
    finding = check("quantizer", inputs)
    assert_found(finding, OK, "published", "of 3 bits", "out of range 0.00%")
    narrow = check("quantizer", scaled_inputs(own, 0.125))
    assert_found(narrow, WARNING, "use less than half of the levels", "--quantizer calibrated")
    wide = check("quantizer", inputs, quant_min=-1, quant_max=1)
    assert_found(wide, WARNING, "channels [0, 1, 2, 3] saturate", "--quant_min")
    calibrated = check("quantizer", inputs, quantizer="calibrated")
    assert_found(calibrated, OK, "calibrated", "out of range 0.00% to 0.00%")


def test_quantizer_figures_are_those_of_the_latents(inputs):
    """Entropy by channel, of the posterior samples themselves."""
    person = patient(inputs)
    finding = doctor_checks.quantizer(person)
    moments = torch.stack([person.cache[(i, f)][0] for i in range(24) for f in (False, True)])
    mean, logvar = moments.double().chunk(2, dim=1)
    noise = torch.stack([posterior_noise(m) for m in moments])
    samples = (mean + (logvar.clamp(-30, 20) / 2).exp() * noise) * person.config.latent_scale
    bits = []
    for channel in range(CHANNELS):
        counts = torch.bincount(GaussianQuantizer(8).encode(samples[:, channel]).flatten())
        p = counts[counts > 0] / counts.sum()
        bits.append(-(p * p.log2()).sum().item())
    assert f"entropy {min(bits):.2f} to {max(bits):.2f} of 3 bits" in finding.text
    assert finding.by_channel["entropy_bits"] == pytest.approx(bits, abs=0.02)
    found = doctor_checks.latents(person).by_channel
    assert found["std"] == pytest.approx(samples.movedim(1, 0).flatten(1).std(dim=1), rel=1e-3)
    assert found["mean"] == pytest.approx(samples.mean(dim=(0, 2, 3)), abs=1e-3)


# --- data, cache, checkpoint


def test_data_has_the_models_classes(inputs):
    images = {"use_cached": None, "cached_path": None, "data_path": "data"}
    assert_found(check("data", inputs), OK, "not read")
    assert_found(check("data", inputs, evaluate=True, use_cached=None), OK, "not read")
    assert_found(check("data", inputs, **images), OK, "24 images in 3 classes")
    assert_found(check("data", inputs, **images | {"class_num": 5}), WARNING, "--class_num 3")
    more = check("data", inputs, **images | {"class_num": 2})
    assert_found(more, FAILURE, "more classes than the model has", "--class_num 3")
    assert_found(check("data", inputs, **images | {"data_path": "none"}), FAILURE, "--data_path")


def test_cache_fits_vae_and_settings(inputs, own, tmp_path):
    assert_found(check("cache", inputs), OK, "24 images in 3 classes")
    assert_found(check("cache", inputs, use_cached=None, cached_path=None), OK, "none")
    assert_found(check("cache", inputs, cached_path=None), FAILURE, "--use_cached needs")
    assert_found(check("cache", inputs, img_size=32), FAILURE, "made for images of 16 px")
    assert_found(check("cache", inputs, class_num=2), FAILURE, "more classes")
    vae = load_vae(own / "vae.ckpt")
    with torch.no_grad():
        vae.quant_conv.bias += 1
    save_vae(own / "vae.ckpt", vae)
    assert_found(check("cache", own), FAILURE, "another VAE")
    published = tmp_path / "published"
    for name in CLASSES:
        (published / name).mkdir(parents=True)
        moments = np.zeros((2 * CHANNELS, 4, 4), np.float32)
        np.savez(published / name / "0.npz", moments=moments, moments_flip=moments)
    sizes = {"vae_stride": 4, "vae_embed_dim": CHANNELS}
    sizes |= {"latent_scale": 1.0, "channel_order": "0,1,2,3"}
    found = check("cache", inputs, cached_path=published, **sizes)
    assert_found(found, WARNING, "published form", "does not say by which VAE")
    (own / "cache" / "manifest.json").write_text("{")
    assert_found(check("cache", own), FAILURE, "manifest.json")
    assert_found(check("latents", own), WARNING, "not checked", "needs the cache")


def test_settings_agree(inputs, own):
    assert_found(check("model", inputs), OK, "1.0 M parameters", "16 positions of 4 scalars")
    assert_found(check("model", inputs, patch_size=3), FAILURE, "img_size 16", "patch_size 3")
    other = AutoencoderKL(6, (1, 1, 1), ch=32, num_res_blocks=1)
    save_vae(own / "vae.ckpt", other)
    assert_found(check("model", own), FAILURE, "6 channels", "--vae_embed_dim")


def test_checkpoint_is_whole_and_fits(inputs, own):
    assert_found(check("checkpoint", inputs), OK, "none yet")
    assert_found(check("checkpoint", inputs, evaluate=True), FAILURE, "--evaluate needs --resume")
    assert_found(check("checkpoint", inputs, resume=inputs / "out"), OK, "checksums agree")
    wrong = check("checkpoint", inputs, resume=inputs / "out", quant_bits=4)
    assert_found(wrong, WARNING, "not checked: it needs the model's settings")
    wrong = check("model", inputs, resume=inputs / "out", quant_bits=4)
    assert_found(wrong, FAILURE, "quant_levels 8, but the flags say 16")
    state = torch.load(own / "out" / "checkpoint-last.pth", weights_only=True)
    first = next(iter(state["model"]))
    state["model"][first] = state["model"][first][..., :0]
    torch.save(state, own / "damaged.pth")
    assert_found(check("checkpoint", own, resume=own / "damaged.pth"), FAILURE, first)
    (own / "damaged.pth").write_bytes(b"damaged")
    assert_found(check("checkpoint", own, resume=own / "damaged.pth"), FAILURE, "damaged")


def test_looking_for_the_newest_checkpoint_sets_nothing_aside(own):
    for path in (own / "out").glob("*.pth"):
        path.unlink()
    (own / "out" / "checkpoint-step00000003.pth").write_bytes(b"damaged")
    before = sorted((own / "out").iterdir())
    finding = check("checkpoint", own, resume="auto", output_dir=own / "out")
    assert_found(finding, FAILURE, "damaged")
    assert sorted((own / "out").iterdir()) == before


# --- evaluation and space


def test_fid_statistics(inputs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    wanted = {"no_metrics": None}
    assert_found(check("FID statistics", inputs), OK, "not wanted")
    found = check("FID statistics", inputs, **wanted)
    assert_found(found, WARNING, "FID cannot be computed", "--fid_stats")
    np.savez(tmp_path / "stats.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    found = check("FID statistics", inputs, fid_stats=tmp_path / "stats.npz", **wanted)
    assert_found(found, OK, "2048 features", "sha256")
    np.savez(tmp_path / "stats.npz", mu=np.zeros(9), sigma=np.eye(9))
    found = check("FID statistics", inputs, fid_stats=tmp_path / "stats.npz", **wanted)
    assert_found(found, FAILURE, "2048 features")


def test_fid_statistics_are_of_the_named_extractor_and_the_size(inputs, tmp_path):
    wanted = dict(no_metrics=None, feature_extractor=PIXELS, fid_stats=tmp_path / "stats.npz")
    np.savez(tmp_path / "stats.npz", mu=np.zeros(9), sigma=np.eye(9), img_size=SIZE, count=9)
    assert_found(check("FID statistics", inputs, **wanted), WARNING, "not checked", "weights")
    torch.save({}, tmp_path / "weights.pth")
    wanted["inception_weights"] = tmp_path / "weights.pth"
    found = check("FID statistics", inputs, **wanted)
    assert_found(found, WARNING, "9 features, sha256", "9 images, not more than the 9 features")
    np.savez(tmp_path / "stats.npz", mu=np.zeros(9), sigma=np.eye(9), img_size=2 * SIZE)
    found = check("FID statistics", inputs, **wanted)
    assert_found(found, FAILURE, f"images of {2 * SIZE} px", "util.fid_stats")


def test_feature_weights(inputs, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    wanted = {"no_metrics": None}
    assert_found(check("feature weights", inputs), OK, "not wanted")
    found = check("feature weights", inputs, **wanted)
    assert_found(found, WARNING, "no Inception weights here", str(tmp_path))
    found = check("feature weights", inputs, feature_extractor=PIXELS, **wanted)
    assert_found(found, OK, "pixels finds its own weights")
    weights = save_random_inception(tmp_path / "weights.pth")
    found = check("feature weights", inputs, inception_weights=weights, **wanted)
    assert_found(found, OK, "2048", "sha256")
    torch.save({"a": torch.zeros(1)}, weights)
    found = check("feature weights", inputs, inception_weights=weights, **wanted)
    assert_found(found, FAILURE, "not the weights of")


@pytest.mark.parametrize("files,state", [(100, OK), (5, WARNING), (2, FAILURE)])
def test_disk_space(inputs, monkeypatch, files, state):
    """Of a checkpoint: weights, average and two moments in fp32, as it is on the disk."""
    saved = (inputs / "out" / "checkpoint-last.pth").stat().st_size
    usage = SimpleNamespace(free=saved * files)
    monkeypatch.setattr(doctor_checks.shutil, "disk_usage", lambda path: usage)
    found = check("disk space", inputs, epochs=8, save_every=8, keep_checkpoints=1)
    assert_found(found, state, "3 checkpoints of")
    assert_found(check("disk space", inputs, evaluate=True), OK, "not needed")


# --- all of them


def test_no_check_stops_another(inputs, monkeypatch):
    for name in doctor.CHECKS:
        broken = mock.Mock(side_effect=RuntimeError("no\nsuch luck"))
        finding = doctor.attempt(name, broken, patient(inputs))
        assert_found(finding, FAILURE, "unexpected RuntimeError: no such luck")
        assert finding.name == name


def run_doctor(inputs: Path, *more: str, processes: int, **changes):
    argv = flags(inputs, GOOD, output_dir=inputs / "new", **changes)
    return on_processes(processes, "-m", "util.doctor", *argv, *more)


def test_one_line_each_and_the_exit_code(inputs, tmp_path):
    result = run_doctor(inputs, processes=1, photo=photo(tmp_path))
    assert result.returncode == 0, result.stderr + result.stdout
    lines = result.stdout.splitlines()
    assert [line[9:25].strip() for line in lines[:-1]] == list(doctor.CHECKS)
    assert lines[-1].endswith("0 failures") and not (inputs / "new").exists()


def test_json_on_two_processes(inputs, tmp_path):
    """Standard output is one object, whatever the processes have to say besides."""
    changes = {"photo": photo(tmp_path), "class_num": 2}
    result = run_doctor(inputs, "--json", processes=2, **changes)
    assert result.returncode == 1
    found = json.loads(result.stdout)
    states = {entry["name"]: entry for entry in found["checks"]}
    assert list(states) == list(doctor.CHECKS) and not found["ok"]
    assert states["cache"]["state"] == FAILURE and "--class_num 3" in states["cache"]["remedy"]
    assert "2 processes by gloo, their sum is 3" in states["processes"]["text"]


def test_what_another_process_finds_worse_is_told(inputs, monkeypatch):
    fake = SimpleNamespace(beat=lambda doing: None, gather_objects=lambda own: [own, worse(own)])
    monkeypatch.setattr(doctor, "dist", fake)

    def worse(own: list[Finding]) -> list[Finding]:
        return [Finding(FAILURE, "full", name=f.name) if f.name == "disk space" else f for f in own]

    found = {f.name: f for f in doctor.examine(patient(inputs, photo="none.png"))}
    assert found["disk space"].text == "process 1: full"
    assert not found["device"].text.startswith("process")
