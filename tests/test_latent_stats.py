"""Scale and channel order of latents whose spectra are known; histograms that add up exactly."""

import json
import math
from functools import reduce
from itertools import permutations

import numpy as np
import pytest
import torch

from util.data.histogram import BINS, LatentHistogram, posterior_noise
from util.data.statistics import LatentStats

SIDE = 8


def wave(cycles_y: int, cycles_x: int) -> torch.Tensor:
    """[h, w], one spatial frequency."""
    grid = torch.arange(SIDE, dtype=torch.float64) / SIDE
    return torch.cos(2 * math.pi * (cycles_y * grid[:, None] + cycles_x * grid))


def moments_of(means: torch.Tensor, std: float = 0.5) -> torch.Tensor:
    """means [N, C, h, w] -> [N, 2C, h, w] with the same posterior std everywhere."""
    return torch.cat([means, torch.full_like(means, 2 * math.log(std))], dim=1)


def random_moments(count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, 6, SIDE, SIDE + 2, generator=generator) + 1


def test_channels_are_ordered_by_low_frequencies_of_which_a_constant_is_none():
    high, low = wave(3, 3), wave(1, 0)
    channels = torch.stack([high, low, low + high, 3 * low + high, wave(2, 0), wave(2, 2)])
    stats = LatentStats.of(moments_of(channels[None]))
    # wave(2, 0) lies on the border, a quarter of the sampling frequency, and counts as low.
    expected = [0, 1, 1 / 2, 9 / 10, 1, 0]
    torch.testing.assert_close(stats.low_frequency_share(), torch.tensor(expected).double())
    assert stats.channel_order() == [1, 4, 3, 2, 0, 5]  # equal shares by number

    alternating = torch.tensor([1.0, -1.0]).double()[:, None, None].expand(2, SIDE, SIDE)
    high, silent = wave(3, 3).expand(2, SIDE, SIDE), torch.zeros(2, SIDE, SIDE)
    channels = torch.stack([100 + high, alternating + high, silent], dim=1)
    shares = LatentStats.of(moments_of(channels)).low_frequency_share()
    assert shares.tolist() == pytest.approx([0, 2 / 3, 0], abs=1e-9)


def test_scale_brings_posterior_samples_to_unit_variance():
    """The histogram is of samples, too: test_calibration.py."""
    moments = random_moments(400)
    means, logvar = moments.double().chunk(2, dim=1)
    noise = torch.randn(means.shape, generator=torch.Generator().manual_seed(1)).double()
    samples = means + (logvar / 2).exp() * noise
    stats = LatentStats.of(moments)
    assert (samples * stats.latent_scale()).std().item() == pytest.approx(1, rel=0.01)
    torch.testing.assert_close(stats.channel_mean(), means.mean(dim=(0, 2, 3)))
    torch.testing.assert_close(stats.channel_std(), samples.std(dim=(0, 2, 3)), rtol=0.02, atol=0)
    means = torch.stack([torch.full((SIDE, SIDE), value) for value in (3.0, -3.0)])[None]
    between = LatentStats.of(moments_of(means, std=4.0))  # the variance between channels counts
    assert between.latent_scale() == pytest.approx(1 / 5)


def test_merged_parts_equal_the_whole_in_any_order_and_survive_json():
    moments = random_moments(10)
    whole = LatentStats.of(moments)
    states = [json.dumps(LatentStats.of(part).to_dict()) for part in moments.split([1, 4, 5])]
    merged = reduce(lambda a, b: a + b, (LatentStats.from_dict(json.loads(s)) for s in states))
    assert merged.count == 10 and merged.latent_shape == whole.latent_shape
    torch.testing.assert_close(merged.sums, whole.sums, rtol=1e-12, atol=0)
    assert merged.channel_order() == whole.channel_order()
    assert_same(merged.histogram, whole.histogram)
    assert len(states[2]) < whole.histogram.counts.numel()  # of 8 bytes each
    # Also where one part's bins are so much wider that the other's fall into one of each sign.
    parts = [torch.randn(2, 3, 2, 2) * scale for scale in (1.0, 1e-6, 37.0, 0.0)]
    whole = LatentHistogram.of(torch.cat(parts))
    for order in permutations(parts):
        assert_same(reduce(lambda a, b: a + b, map(LatentHistogram.of, order)), whole)
    assert whole.counts.sum(dim=1).tolist() == [32] * 3


# --- histograms


def assert_same(found: LatentHistogram, expected: LatentHistogram) -> None:
    assert torch.equal(found.exponents, expected.exponents)
    assert torch.equal(found.counts, expected.counts)


def test_counts_are_numpys():
    latents = torch.randn(3, 2, 4, 5) * torch.tensor([1.0, 30.0])[:, None, None]
    histogram = LatentHistogram.of(latents)
    for channel in range(2):
        values = latents[:, channel].flatten().double().numpy()
        limit = 2.0 ** histogram.exponents[channel].item()
        assert limit / 2 <= np.abs(values).max() < limit
        edges = np.linspace(-limit, limit, BINS + 1)
        assert np.array_equal(histogram.counts[channel], np.histogram(values, edges)[0])
        assert histogram.bin_widths()[channel] == edges[1] - edges[0]
    assert histogram.bin_widths(0.5).tolist() == (histogram.bin_widths() / 2).tolist()
    for value in (math.inf, math.nan):
        with pytest.raises(ValueError, match="not finite"):
            LatentHistogram.of(torch.full((2, 1, 4, 4), value))
    on_edges = torch.tensor([-1.0, 0.0, 1.0, 1.5])[:, None, None, None]  # of the bin above
    bins = LatentHistogram.of(on_edges).counts[0].nonzero().flatten()
    assert bins.tolist() == [BINS // 4, BINS // 2, 3 * BINS // 4, 7 * BINS // 8]


def test_noise_is_standard_normal_and_each_latents_own():
    moments = torch.randn(40, 8, 16, 16)
    noise = torch.stack([posterior_noise(m) for m in moments])
    assert noise.shape == (40, 4, 16, 16)
    assert abs(noise.mean()) < 0.01 and abs(noise.std() - 1) < 0.01
    correlation = torch.corrcoef(noise.flatten(1)) - torch.eye(40)
    assert correlation.abs().max() < 0.2
    assert torch.equal(posterior_noise(moments[3]), noise[3])
