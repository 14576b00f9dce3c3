"""Histograms of latents: right bins, exact sums in any order, nothing lost on the way to JSON."""

import json
from functools import reduce
from itertools import permutations

import numpy as np
import pytest
import torch

from util.data.histogram import BINS, MIN_EXPONENT, LatentHistogram, posterior_noise


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


def test_parts_of_any_range_add_up_to_the_whole_in_any_order():
    """Also where one part's bins are so much wider that the other's fall into one of each sign."""
    parts = [torch.randn(2, 3, 2, 2) * scale for scale in (1.0, 1e-6, 37.0, 0.0)]
    whole = LatentHistogram.of(torch.cat(parts))
    for order in permutations(parts):
        summed = reduce(lambda a, b: a + b, map(LatentHistogram.of, order))
        assert_same(summed, whole)
        assert_same(LatentHistogram.empty(3) + summed, whole)
    assert whole.counts.sum(dim=1).tolist() == [32] * 3


def test_a_value_on_an_edge_belongs_to_the_bin_above_it():
    values = torch.tensor([-1.0, 0.0, 1.0, 1.5])[:, None, None, None]
    bins = LatentHistogram.of(values).counts[0].nonzero().flatten()
    assert bins.tolist() == [BINS // 4, BINS // 2, 3 * BINS // 4, 7 * BINS // 8]


def test_a_channel_of_zeros_has_the_narrowest_bins():
    histogram = LatentHistogram.of(torch.zeros(2, 1, 1, 1))
    assert histogram.exponents.tolist() == [MIN_EXPONENT]
    assert histogram.counts[0, BINS // 2] == 2


def test_what_is_not_finite_or_of_other_channels_is_refused():
    for value in (torch.inf, torch.nan):
        with pytest.raises(ValueError, match="not finite"):
            LatentHistogram.of(torch.full((1, 1, 1, 1), value))
    with pytest.raises(ValueError, match="2 and 3 channels"):
        LatentHistogram.empty(2) + LatentHistogram.empty(3)


def test_json_keeps_every_count_in_little_space():
    histogram = LatentHistogram.of(torch.randn(50, 4, 8, 8))
    text = json.dumps(histogram.to_dict())
    assert_same(LatentHistogram.from_dict(json.loads(text)), histogram)
    assert len(text) < histogram.counts.numel()  # of 8 bytes each


@pytest.mark.parametrize(
    "spoil",
    [
        {"counts": "no base64!"},
        {"counts": "AAAA"},
        {"exponents": [1, 2]},
        {"exponents": ["one"]},
        {"exponents": [5000]},
        {"counts": None},
    ],
)
def test_damage_is_refused(spoil):
    with pytest.raises(ValueError, match="no histogram"):
        LatentHistogram.from_dict(LatentHistogram.empty(1).to_dict() | spoil)
    with pytest.raises(ValueError, match="no histogram"):
        LatentHistogram.from_dict({})


def test_noise_is_standard_normal_and_each_latents_own():
    moments = torch.randn(40, 8, 16, 16)
    noise = torch.stack([posterior_noise(m) for m in moments])
    assert noise.shape == (40, 4, 16, 16)
    assert abs(noise.mean()) < 0.01 and abs(noise.std() - 1) < 0.01
    correlation = torch.corrcoef(noise.flatten(1)) - torch.eye(40)
    assert correlation.abs().max() < 0.2
    assert torch.equal(posterior_noise(moments[3]), noise[3])
    assert not torch.equal(posterior_noise(moments[3] + 1e-3), noise[3])
