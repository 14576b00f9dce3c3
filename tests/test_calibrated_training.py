"""A calibrated quantizer from a cache's statistics into training, checkpoints and sampling."""

from pathlib import Path

import pytest
import torch

from models.calibration import fit_levels
from tests.runs import CHANNELS, IMAGE_FLAGS, evaluate, load, train
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


def test_levels_are_those_of_the_caches_latents_on_images_too(inputs, trained, tmp_path):
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
    images = IMAGE_FLAGS | dict(cached_path="cache", latent_scale=scale, epochs=1)
    found = train(inputs, tmp_path, **CALIBRATED, **images)
    assert torch.equal(
        found["model"]["reconstruction_values"], state["model"]["reconstruction_values"]
    )


def forget_histogram(cache: Path) -> None:
    """As a cache of an earlier version is."""
    path = cache / "manifest.json"
    write_json(path, read_json(path) | {"histogram": None})


def test_resumed_training_keeps_its_levels_and_draws_with_them(inputs, own, trained, tmp_path):
    """The cache need not say them again, nor need the flag."""
    for weights in ("ema", "model"):
        settings = dict(eval_weights=weights, no_metrics=True)
        assert len(evaluate(inputs, tmp_path / weights, trained, **settings)) == 12
    output = tmp_path / "out"
    train(own, output, epochs=1, **CALIBRATED)
    forget_histogram(own / "cache")
    found, expected = train(own, output, resume=output), load(trained)
    assert found["epoch"] == expected["epoch"]
    for name in ("reconstruction_values", "boundaries"):
        assert torch.equal(found["model"][name], expected["model"][name])


def test_what_has_no_distribution_is_refused(inputs, own, refusal):
    forget_histogram(own / "cache")
    line = refusal("train", own, **CALIBRATED)
    assert "main_cache.py's, with a histogram" in line and f"(it is {own}/cache)" in line
    damaged = read_json(inputs / "cache" / "manifest.json")
    damaged["histogram"]["counts"] = "AAAA"
    write_json(own / "cache" / "manifest.json", damaged)
    assert "manifest.json is damaged" in refusal("train", own, **CALIBRATED)
    line = refusal("images", inputs, **CALIBRATED)
    assert "--quantizer calibrated needs --cached_path" in line
