"""Fitted levels against closed forms, the published ones and awkward data; and in a training."""

from pathlib import Path

import pytest
import torch
from torch.special import ndtr

from models.calibration import fit_levels
from models.quantizer import SPAN, GaussianQuantizer
from tests.runs import CHANNELS, IMAGE_FLAGS, evaluate, load, train
from util.data.cache_writer import write_json
from util.data.histogram import BINS, LatentHistogram, posterior_noise
from util.data.latent_cache import open_cache, read_json


def normal_counts(bins: int = 8192, limit: float = 8.0) -> tuple[torch.Tensor, torch.Tensor]:
    """A histogram of N(0, 1) without noise. The counts need not be whole."""
    mass = ndtr(torch.linspace(-limit, limit, bins + 1, dtype=torch.float64)).diff()
    return 1e10 * mass[None], torch.tensor([2 * limit / bins]).double()


def fit(latents: torch.Tensor, levels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """latents: [C, N]."""
    histogram = LatentHistogram.of(latents.T[:, :, None, None])
    return fit_levels(histogram.counts, histogram.bin_widths(), levels)


def cost(x: torch.Tensor, values: torch.Tensor, p: torch.Tensor | None = None):
    """Mean squared error, and entropy in bits, of the nearest levels.

    x: [N], values: [K]. p: the probability of each x, if they are not all alike.
    """
    p = torch.full_like(x, 1 / len(x)) if p is None else p
    index = torch.bucketize(x.contiguous(), (values[1:] + values[:-1]) / 2)
    shares = torch.bincount(index, p, minlength=len(values))
    error = (p * (x - values[index]).square()).sum().item()
    return error, -torch.special.xlogy(shares, shares).sum().item() / 0.6931472


def published_values(levels: int, limit: float = 5.0) -> torch.Tensor:
    return GaussianQuantizer(levels).reconstruction_values.double() / SPAN * limit


def normal_cost(values: torch.Tensor) -> tuple[float, float]:
    """Under N(0, 1), whose distribution function says how much lies in each narrow bin."""
    edges = torch.linspace(-10, 10, (1 << 18) + 1, dtype=torch.float64)
    return cost((edges[1:] + edges[:-1]) / 2, values, ndtr(edges).diff())


@pytest.mark.parametrize("bits", [2, 4, 6, 9])
def test_on_normal_data_error_falls_and_entropy_rises_at_every_width(bits):
    """Where the published levels are all but the best: the hardest case there is."""
    boundaries, values = fit_levels(*normal_counts(), levels=2**bits)
    found, published = normal_cost(values[0]), normal_cost(published_values(2**bits))
    assert found[0] < published[0] and found[1] > published[1]
    assert torch.allclose(values, -values.flip(1), atol=1e-6)  # as symmetric as the data
    with pytest.raises(ValueError, match="without any latents"):
        fit_levels(torch.zeros(2, BINS), torch.ones(2), 4)


def test_an_exponent_of_one_third_has_the_least_error_and_higher_ones_more_even_use():
    """Max 1960, table I: least mean squared error of 2, 4 and 16 levels for N(0, 1)."""
    for levels, least in ((2, 0.3634), (4, 0.1175), (16, 0.009497)):
        _, values = fit_levels(*normal_counts(), levels, exponent=1 / 3)
        assert least * 0.9999 < normal_cost(values[0])[0] < least * 1.03
    found = [normal_cost(fit_levels(*normal_counts(), 64, a)[1][0]) for a in (1 / 3, 0.5, 0.8)]
    errors, entropies = zip(*found, strict=True)
    assert list(errors) == sorted(errors) and list(entropies) == sorted(entropies)


@pytest.mark.parametrize("bits", [2, 8])
def test_channels_of_other_shapes_gain_on_data_not_fitted_to(bits):
    """Narrow, wide, shifted, skewed and two-peaked channels: each gets a codebook of its own."""
    n = 40_000
    normal = torch.randn(5, n, dtype=torch.float64)
    peaks = normal[4] * 0.2 + torch.where(torch.rand(n) < 0.3, 2.0, -1.0)
    skewed = normal[3].exp().clamp(max=4.9)
    x = torch.stack([normal[0] * 0.3, normal[1] * 1.4, normal[2] * 0.5 + 2, skewed, peaks])
    x = x.clamp(-5, 5)
    _, values = fit(x[:, ::2], 2**bits)
    published = published_values(2**bits)
    found = torch.tensor([cost(*pair) for pair in zip(x[:, 1::2], values, strict=True)])
    published = torch.tensor([cost(channel, published) for channel in x[:, 1::2]])
    assert (found[:, 0] < published[:, 0]).all()  # error
    # A channel wider than the published codebook was made for gives evenness for error.
    assert (found[:, 1] > published[:, 1] - 0.25).all()
    (error, entropy), (published_error, published_entropy) = found.mean(0), published.mean(0)
    assert error < 0.8 * published_error and entropy > published_entropy + 0.3


def test_awkward_data_still_has_ascending_finite_levels():
    for x in (
        torch.full((1, 50), 1.25),  # a channel that says nothing
        torch.tensor([[0.0] * 99 + [1000.0]]),  # one value far out
        torch.tensor([[-3.0, 3.0] * 20]),  # nothing in between
        torch.zeros(1, 3),
        torch.randn(1, 5) * 1e-6,
    ):
        boundaries, values = fit(x, 512)
        for table in (boundaries, values):
            assert table.isfinite().all() and (table.diff(dim=1) >= 0).all()
        assert (values >= boundaries[:, :-1]).all() and (values <= boundaries[:, 1:]).all()
        assert boundaries[0, 0] <= x.min() and x.max() <= boundaries[0, -1]
        error, _ = cost(x[0].double(), values[0])
        assert error < 0.02 * x.abs().max().item() ** 2 + 1e-12


# --- from a cache's statistics into training, checkpoints and sampling

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
    name = "reconstruction_values"
    assert torch.equal(found["model"][name], state["model"][name])


def forget_histogram(cache: Path) -> None:
    """As a cache of an earlier version is."""
    path = cache / "manifest.json"
    write_json(path, read_json(path) | {"histogram": None})


def test_resumed_training_keeps_its_levels_and_draws_with_them(inputs, own, trained, tmp_path):
    """The cache need not say them again, nor need the flag."""
    assert len(evaluate(inputs, tmp_path / "drawn", trained, no_metrics=True)) == 12
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
