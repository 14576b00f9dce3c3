"""Masks, orders and schedules against brute force."""

import math

import pytest
import torch
from scipy.stats import ks_2samp, kstest, truncnorm

from models.masking import MaskRatios, mask_schedule, split_mask, training_mask

PUBLISHED = MaskRatios("normal", 0.7)
SHARES = {"cosine": lambda t: math.cos(math.pi / 2 * t), "exp": lambda t: 1 - math.exp(5 * t - 5)}


def test_positions_of_the_loss_are_uniform_and_a_boolean_mask_is_split_into_ascending_ones():
    orders = torch.rand(4, 20).argsort(dim=1)
    visible, masked = split_mask(torch.zeros(4, 20).scatter(1, orders[:, :13], 1.0))
    assert torch.equal(masked, orders[:, :13].sort(dim=1).values)
    assert torch.equal(visible, orders[:, 13:].sort(dim=1).values)
    with pytest.raises(ValueError, match=r"\[2, 1\]"):
        split_mask(torch.tensor([[1, 1, 0], [1, 0, 0]]))
    _, positions = training_mask(6000, 6, MaskRatios("normal", 1.0), 1 / 6, "cpu")
    first = torch.bincount(positions[:, 0], minlength=6) / 6000
    assert (first - 1 / 6).abs().max() < 0.025


def test_mask_ratio_follows_the_truncated_normal_or_an_exponential_of_uniform_draws():
    """Kolmogorov-Smirnov against scipy's normal(1.0, 0.25) truncated to [0.7, 1.0].

    Of the exponential a fifth is the least, and as often as all draws below it.
    """
    ratios = [PUBLISHED.draw() for _ in range(3000)]
    expected = truncnorm((0.7 - 1.0) / 0.25, 0, loc=1.0, scale=0.25)
    assert min(ratios) >= 0.7 and max(ratios) <= 1.0
    assert kstest(ratios, expected.cdf).pvalue > 1e-4
    assert MaskRatios("normal", 1.0).draw() == 1.0
    masked = {training_mask(2, 16, PUBLISHED, 1.0, "cpu")[1].shape[1] for _ in range(50)}
    assert masked == set(range(math.ceil(16 * 0.7), 17))
    ratios = MaskRatios("exp", 0.2)
    drawn = torch.tensor([ratios.draw() for _ in range(3000)])
    expected = (1 - torch.exp(-5 * torch.rand(3000))).clamp(min=0.2)
    assert ks_2samp(drawn.numpy(), expected.numpy()).pvalue > 1e-4


@pytest.mark.parametrize("name", SHARES)
@pytest.mark.parametrize("length,num_iter", [(16, 1), (16, 5), (16, 16), (16, 50), (256, 64)])
def test_schedule_follows_its_curve_and_uncovers_every_position_once(length, num_iter, name):
    schedule = mask_schedule(length, num_iter, name)
    assert len(schedule) == num_iter
    assert schedule[0][0] == length and schedule[-1][1] == 0
    for (before, after, _), (next_before, _, _) in zip(schedule, schedule[1:], strict=False):
        assert next_before == after <= before
    assert sum(before - after for before, after, _ in schedule) == length
    for step, (before, after, m) in enumerate(schedule[:-1]):
        left = math.floor(length * SHARES[name]((step + 1) / num_iter))
        assert after == m == max(1, min(before - 1, left))
