"""The channel head: causality, the cache against recomputation, and its draws."""

import pytest
import torch

from models.channel_head import ChannelHead, inverse_cdf
from models.layers import KVCache
from tests.conftest import tiny_model

ORDER = (3, 0, 5, 1, 4, 2)


@pytest.fixture
def head() -> ChannelHead:
    return tiny_model().head


def test_no_channel_sees_itself_or_a_later_one(head):
    """Changing a channel's index may change only the logits of channels after it in the order."""
    z, indices = torch.randn(5, 16), torch.randint(0, 8, (5, 6))
    logits = head(z, indices)
    for place, channel in enumerate(ORDER):
        changed = indices.clone()
        changed[:, channel] = (changed[:, channel] + 1) % 8
        differs = (head(z, changed) != logits).any(dim=2).any(dim=0)
        assert not differs[list(ORDER[: place + 1])].any()
        assert differs[list(ORDER[place + 1 :])].all()


def test_cached_steps_equal_the_teacher_forced_logits(head):
    z, indices = torch.randn(7, 16), torch.randint(0, 8, (7, 6))
    caches = [KVCache(6) for _ in head.channel_blocks]
    cond, ordered = head.condition_proj(z), indices[:, head.order]
    steps = [head.step(i, cond, ordered, caches, "trained") for i in range(6)]
    expected = head(z, indices)[:, head.order]
    assert torch.allclose(torch.stack(steps, dim=1), expected, atol=1e-5)


def test_the_published_input_adds_the_first_timestep_embedding(head):
    """Feeding the sum by hand through the trained path gives the published first step."""
    z = torch.randn(4, 16)
    cond = head.condition_proj(z)
    published = head.step(0, cond, None, [KVCache(6) for _ in head.channel_blocks], "published")
    with torch.no_grad():
        head.channel_embed[:, 0] += head.timesteps_embeddings[:, 0]
    by_hand = head.step(0, cond, None, [KVCache(6) for _ in head.channel_blocks], "trained")
    assert torch.allclose(published, by_hand, atol=1e-6)


def test_greedy_sampling_is_the_argmax_of_its_own_logits(head):
    z = torch.randn(9, 16)
    indices = head.sample(z, torch.rand(9, 6), temperature=0)
    assert torch.equal(indices, head(z, indices).argmax(dim=-1))


def test_no_prefix_is_recomputed(head, monkeypatch):
    """Each block runs once a channel, on one position: T calls with T = 1 each."""
    lengths = []
    attention = head.channel_blocks[0].attn
    attention.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    head.sample(torch.randn(3, 16), torch.rand(3, 6))
    assert lengths == [1] * 6


def test_draws_follow_the_joint_distribution_of_the_head():
    """Frequencies of the first two channels against the product of teacher-forced conditionals."""
    head = tiny_model(quant_levels=3).head
    n = 20_000
    z = torch.randn(1, 16).expand(n, -1)
    drawn = head.sample(z, torch.rand(n, 6))
    first, second = ORDER[:2]
    counts = torch.bincount(drawn[:, first] * 3 + drawn[:, second], minlength=9) / n
    probe = torch.zeros(3, 6, dtype=torch.int64)
    probe[:, first] = torch.arange(3)
    p = head(z[:3], probe).softmax(dim=-1)
    expected = (p[0, first][:, None] * p[:, second]).flatten()
    assert (counts - expected).abs().max() < 0.015


def test_inverse_cdf_draws_each_level_by_its_probability():
    p = torch.tensor([0.1, 0.0, 0.6, 0.3])
    uniforms = torch.tensor([0.0, 0.0999, 0.1001, 0.6999, 0.7001, 1 - 2**-24])
    drawn = inverse_cdf(p.log().expand(6, -1), uniforms, temperature=1.0)
    assert drawn.tolist() == [0, 0, 2, 2, 3, 3]


def test_temperature_sharpens_and_zero_takes_the_largest():
    logits = torch.tensor([[0.0, 1.0, 0.5]]).expand(2000, -1)
    uniforms = torch.rand(2000)
    shares = [(inverse_cdf(logits, uniforms, t) == 1).float().mean() for t in (2.0, 1.0, 0.5, 0.0)]
    assert shares == sorted(shares) and shares[-1] == 1
    expected = (logits[0] / 0.5).softmax(0)[1]
    assert shares[2] == pytest.approx(expected.item(), abs=0.04)
