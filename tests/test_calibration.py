"""Fitted levels against closed forms, against the published ones, and on awkward data."""

import pytest
import torch
from torch.special import ndtr

from models.calibration import fit_levels
from models.quantizer import SPAN, GaussianQuantizer
from util.data.histogram import BINS, LatentHistogram


def normal_counts(bins: int = 8192, limit: float = 8.0) -> tuple[torch.Tensor, torch.Tensor]:
    """A histogram of N(0, 1) without noise. The counts need not be whole."""
    mass = ndtr(torch.linspace(-limit, limit, bins + 1, dtype=torch.float64)).diff()
    return 1e10 * mass[None], torch.tensor([2 * limit / bins]).double()


def fit(latents: torch.Tensor, levels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """latents: [C, N]."""
    histogram = LatentHistogram.of(latents.T[:, :, None, None])
    return fit_levels(histogram.counts, histogram.bin_widths(), levels)


def cost(x: torch.Tensor, values: torch.Tensor) -> tuple[float, float]:
    """Brute force over all levels. x: [N], values: [K] -> mean squared error, entropy in bits."""
    distance, index = (x[:, None] - values).abs().min(dim=1)
    p = torch.bincount(index, minlength=len(values)) / len(x)
    return distance.square().mean().item(), -torch.special.xlogy(p, p).sum().item() / 0.6931472


def published_values(levels: int, limit: float = 5.0) -> torch.Tensor:
    return GaussianQuantizer(levels).reconstruction_values.double() / SPAN * limit


def normal_cost(values: torch.Tensor) -> tuple[float, float]:
    """Under N(0, 1), by its distribution function; error cell by cell, entropy from its masses."""
    inner = (values[1:] + values[:-1]) / 2
    edges = torch.cat([torch.tensor([-40.0]), inner, torch.tensor([40.0])]).double()
    density = torch.exp(-edges.square() / 2) / (2 * torch.pi) ** 0.5
    mass = torch.where(edges[:-1] > 0, ndtr(-edges[:-1]) - ndtr(-edges[1:]), ndtr(edges).diff())
    first = -density.diff()
    second = mass - (edges * density).diff()
    error = (second - 2 * values * first + values.square() * mass).sum().item()
    return error, -torch.special.xlogy(mass, mass).sum().item() / 0.6931472


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
