"""Scale and channel order of latents whose spectra are known by construction."""

import json
import math

import numpy as np
import pytest
import torch

from util.data.histogram import BINS
from util.data.statistics import LatentStats

SIDE = 8


def wave(cycles_y: int, cycles_x: int) -> torch.Tensor:
    """[h, w], one spatial frequency."""
    grid = torch.arange(SIDE, dtype=torch.float64) / SIDE
    return torch.cos(2 * math.pi * (cycles_y * grid[:, None] + cycles_x * grid))


def moments_of(means: torch.Tensor, std: float = 0.5) -> torch.Tensor:
    """means [N, C, h, w] -> [N, 2C, h, w] with the same posterior std everywhere."""
    return torch.cat([means, torch.full_like(means, 2 * math.log(std))], dim=1)


def random_moments(count: int, channels: int = 3, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 2 * channels, SIDE, SIDE + 2, generator=generator) + 1


def brute_force_shares(means: np.ndarray) -> np.ndarray:
    """[C], frequency by frequency, from means [N, C, h, w]."""
    means = means - means.mean(axis=(0, 2, 3), keepdims=True)
    _, channels, height, width = means.shape
    low, total = np.zeros(channels), np.zeros(channels)
    power = (np.abs(np.fft.fft2(means)) ** 2).sum(axis=0)  # [C, h, w]
    for y in range(height):
        for x in range(width):
            frequency = math.hypot(min(y, height - y) / height, min(x, width - x) / width)
            total += power[:, y, x]
            low += power[:, y, x] * (frequency <= 0.25)
    return low / total


def test_channels_are_ordered_by_their_low_frequencies():
    high, low = wave(3, 3), wave(1, 0)
    channels = torch.stack([high, low, low + high, 3 * low + high, wave(2, 0), wave(2, 2)])
    stats = LatentStats.of(moments_of(channels[None]))
    # wave(2, 0) lies on the border, a quarter of the sampling frequency, and counts as low.
    expected = [0, 1, 1 / 2, 9 / 10, 1, 0]
    torch.testing.assert_close(stats.low_frequency_share(), torch.tensor(expected).double())
    assert stats.channel_order() == [1, 4, 3, 2, 0, 5]  # equal shares by number


def test_shares_equal_brute_force():
    moments = random_moments(5)
    shares = LatentStats.of(moments).low_frequency_share()
    np.testing.assert_allclose(shares, brute_force_shares(moments[:, :3].double().numpy()))


def test_a_constant_says_nothing_but_one_that_varies_is_low():
    alternating = torch.tensor([1.0, -1.0]).double()[:, None, None].expand(2, SIDE, SIDE)
    high = wave(3, 3).expand(2, SIDE, SIDE)
    stats = LatentStats.of(moments_of(torch.stack([100 + high, alternating + high], dim=1)))
    torch.testing.assert_close(
        stats.low_frequency_share(),
        torch.tensor([0, 2 / 3], dtype=torch.float64),
        atol=1e-9,
        rtol=1e-9,
    )
    silent = LatentStats.of(moments_of(torch.zeros(2, 1, SIDE, SIDE)))
    assert silent.low_frequency_share().tolist() == [0]


def test_scale_brings_samples_to_unit_variance():
    moments = random_moments(400)
    means, logvar = moments.double().chunk(2, dim=1)
    noise = torch.randn(means.shape, generator=torch.Generator().manual_seed(1)).double()
    samples = means + (logvar / 2).exp() * noise
    stats = LatentStats.of(moments)
    assert (samples * stats.latent_scale()).std().item() == pytest.approx(1, rel=0.01)
    torch.testing.assert_close(stats.channel_mean(), means.mean(dim=(0, 2, 3)))
    torch.testing.assert_close(stats.channel_std(), samples.std(dim=(0, 2, 3)), rtol=0.02, atol=0)


def test_scale_counts_the_variance_between_channels():
    means = torch.stack([torch.full((SIDE, SIDE), value) for value in (3.0, -3.0)])[None]
    assert LatentStats.of(moments_of(means, std=4.0)).latent_scale() == pytest.approx(1 / 5)


def test_latents_without_a_scale_are_refused():
    for value in (math.inf, math.nan):
        with pytest.raises(ValueError, match="variance"):
            LatentStats.of(moments_of(torch.full((2, 1, 4, 4), value))).latent_scale()
    with pytest.raises(ValueError, match="variance"):
        LatentStats.empty((1, 4, 4)).latent_scale()


def test_merged_parts_equal_the_whole_and_survive_json():
    moments = random_moments(10)
    whole = LatentStats.of(moments)
    merged = LatentStats.empty((3, SIDE, SIDE + 2))
    for part in moments.split([1, 4, 5]):
        state = json.loads(json.dumps(LatentStats.of(part).to_dict()))
        merged = merged + LatentStats.from_dict(state)
    assert merged.count == 10 and merged.latent_shape == whole.latent_shape
    torch.testing.assert_close(merged.sums, whole.sums, rtol=1e-12, atol=0)
    assert merged.latent_scale() == pytest.approx(whole.latent_scale(), rel=1e-12)
    assert merged.channel_order() == whole.channel_order()
    assert torch.equal(merged.histogram.counts, whole.histogram.counts)
    assert torch.equal(merged.histogram.exponents, whole.histogram.exponents)
    with pytest.raises(ValueError, match="do not mix"):
        merged + LatentStats.empty((3, SIDE, SIDE))


def test_histogram_is_of_posterior_samples():
    """Mean and std of the histogram are those of the samples: mean's variance + posterior's."""
    stats = LatentStats.of(random_moments(400))
    widths = stats.histogram.bin_widths()[:, None]
    middles = (torch.arange(BINS) - BINS // 2 + 0.5) * widths
    p = stats.histogram.counts / stats.histogram.counts.sum(dim=1, keepdim=True)
    mean = (p * middles).sum(dim=1)
    std = (p * (middles - mean[:, None]).square()).sum(dim=1).sqrt()
    torch.testing.assert_close(mean, stats.channel_mean(), rtol=0.06, atol=0)
    torch.testing.assert_close(std, stats.channel_std(), rtol=0.02, atol=0)


def test_statistics_without_a_histogram_are_read_and_pass_it_on():
    """Caches of earlier versions have none; a sum with a part of them would be of another whole."""
    stats = LatentStats.of(random_moments(2))
    values = stats.to_dict()
    del values["histogram"]
    earlier = LatentStats.from_dict(values)
    assert earlier.histogram is None and "histogram" not in earlier.to_dict()
    assert (stats + earlier).histogram is None and (earlier + stats).histogram is None
    assert (stats + earlier).count == 4
