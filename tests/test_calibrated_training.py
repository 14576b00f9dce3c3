"""A calibrated quantizer from a cache's statistics into training, checkpoints and sampling."""

import shutil
from pathlib import Path

import pytest
import torch

import main_tokenbridge
from models.calibration import fit_levels
from tests.runs import (
    CHANNELS,
    EVALUATE_FLAGS,
    TRAIN_FLAGS,
    evaluate,
    flags,
    load,
    refused,
    train,
)
from util.data.cache_writer import write_json
from util.data.histogram import LatentHistogram, posterior_noise
from util.data.latent_cache import open_cache, read_json

BITS = 3
CALIBRATED = {"quantizer": "calibrated", "quant_bits": BITS}


@pytest.fixture(scope="module")
def trained(inputs, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("trained")
    train(inputs, output, **CALIBRATED)
    return output


def test_levels_are_those_of_the_caches_latents(inputs, trained):
    """Sampled and counted here once more, over all images and mirror images at once."""
    cache = open_cache(inputs / "cache")
    keys = [(i, flip) for i in range(len(cache)) for flip in (False, True)]
    moments = torch.stack([cache[key][0] for key in keys]).double()
    mean, logvar = moments.chunk(2, dim=1)
    noise = torch.stack([posterior_noise(m) for m in moments])
    samples = mean + (logvar.clamp(-30, 20) / 2).exp() * noise
    histogram = LatentHistogram.of(samples)
    scale = cache.manifest["latent_scale"]
    boundaries, values = fit_levels(histogram.counts, histogram.bin_widths(scale), 2**BITS)
    state = load(trained)
    assert state["config"]["quantizer"] == "calibrated"
    torch.testing.assert_close(state["model"]["reconstruction_values"], values.float())
    torch.testing.assert_close(state["model"]["boundaries"], boundaries.float())
    assert values.shape == (CHANNELS, 2**BITS)


def forget_histogram(cache: Path) -> None:
    """As a cache of an earlier version is."""
    path = cache / "manifest.json"
    write_json(path, read_json(path) | {"histogram": None})


def test_resumed_training_keeps_its_levels_and_draws_with_them(inputs, trained, tmp_path):
    """The cache need not say them again, nor need the flag."""
    for weights in ("ema", "model"):
        own = tmp_path / weights
        assert len(evaluate(inputs, own, trained, eval_weights=weights, no_metrics=True)) == 12
    own, output = shutil.copytree(inputs, tmp_path / "own"), tmp_path / "out"
    train(own, output, epochs=1, **CALIBRATED)
    forget_histogram(own / "cache")
    found, expected = train(own, output, resume=output), load(trained)
    assert found["epoch"] == expected["epoch"]
    for name in ("reconstruction_values", "boundaries"):
        assert torch.equal(found["model"][name], expected["model"][name])


ON_IMAGES = {"use_cached": None, "data_path": "data", "vae_path": "vae.ckpt"}
ON_IMAGES |= {"channel_order": "0,1,2,3", "epochs": 1}


def test_training_on_images_takes_the_levels_of_a_cache_of_the_same_vae(inputs, trained, tmp_path):
    scale = open_cache(inputs / "cache").manifest["latent_scale"]
    found = train(inputs, tmp_path, **CALIBRATED, **ON_IMAGES, latent_scale=scale)
    expected = load(trained)["model"]["reconstruction_values"]
    assert torch.equal(found["model"]["reconstruction_values"], expected)


def test_what_has_no_distribution_is_refused(inputs, tmp_path, capsys):
    def refusal(folder: Path, **changes) -> str:
        argv = flags(folder, TRAIN_FLAGS, output_dir=tmp_path / "out", **CALIBRATED | changes)
        line = refused(capsys, main_tokenbridge.main, *argv)
        assert not (tmp_path / "out").exists()
        return line

    own = shutil.copytree(inputs, tmp_path / "own")
    forget_histogram(own / "cache")
    line = refusal(own)
    assert "with a histogram" in line and f"(it is {own}/cache)" in line
    damaged = read_json(inputs / "cache" / "manifest.json")
    damaged["histogram"]["counts"] = "AAAA"
    write_json(own / "cache" / "manifest.json", damaged)
    assert "manifest.json is damaged" in refusal(own)
    line = refusal(inputs, **ON_IMAGES, cached_path=None, latent_scale=1)
    assert "--quantizer calibrated needs --cached_path" in line


def test_a_checkpoint_of_the_other_quantizer_is_refused(inputs, trained, tmp_path, capsys):
    published = tmp_path / "published"
    train(inputs, published, epochs=1, quant_bits=BITS)
    for resume, asked in ((trained, "published"), (published, "calibrated")):
        argv = flags(inputs, EVALUATE_FLAGS, output_dir=tmp_path / "out", resume=resume)
        line = refused(capsys, main_tokenbridge.main, *argv, "--quantizer", asked)
        assert f"but the flags say {asked}" in line
