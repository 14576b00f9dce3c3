"""Dropout on a CPU, and attention by its definition against torch's."""

import pytest
import torch
from torch.nn import functional as F

from models.cpu import Dropout, attend_by_definition, attend_causal, dropout
from models.layers import Attention


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_drops_its_share_and_keeps_the_mean(p):
    torch.manual_seed(0)
    x = torch.ones(1000, 1001)
    out = dropout(x, p)
    kept = out != 0
    spread = (p * (1 - p) / x.numel()) ** 0.5
    assert abs(kept.double().mean().item() - (1 - p)) < 5 * spread
    assert out[kept].unique().tolist() == [pytest.approx(1 / (1 - p))]


def test_dropout_draws_each_element_on_its_own():
    """Two elements share a random word, rows and columns share nothing."""
    torch.manual_seed(0)
    kept = (dropout(torch.ones(200_000), 0.5) != 0).double()
    for lag in (1, 2, 3, 64):
        both = (kept[:-lag] * kept[lag:]).mean().item()
        assert both == pytest.approx(0.25, abs=0.006)


def test_gradients_pass_where_values_did():
    x = torch.randn(7, 33, requires_grad=True)
    out = dropout(x, 0.3)
    out.sum().backward()
    assert torch.equal(x.grad != 0, out != 0)
    assert torch.allclose(out, x * x.grad)


def test_the_seed_decides_what_is_dropped():
    x = torch.ones(3, 5, 7)
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(dropout(x, 0.5))
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def test_half_precision_is_scaled_without_bias():
    """1 / 0.9 is no bf16 number: each product is rounded, not the scale."""
    out = dropout(torch.full((50,), 9.0, dtype=torch.bfloat16), 0.1)
    assert set(out.tolist()) <= {0.0, 10.0}


def test_views_and_no_elements():
    x = torch.randn(6, 4).t()
    out = dropout(x, 0.5)
    assert torch.allclose(out[out != 0], 2 * x[out != 0])
    assert dropout(torch.empty(0, 3), 0.5).shape == (0, 3)


def test_dropout_is_for_training_alone():
    x = torch.randn(100)
    assert torch.equal(Dropout(0.5).eval()(x), x)
    assert torch.equal(Dropout(0.0).train()(x), x)


def test_attention_by_its_definition_is_torchs():
    q, k, v = torch.randn(3, 2, 2, 5, 4)
    seen = torch.rand(2, 1, 1, 5) < 0.7
    seen[..., 0] = True
    for mask in (None, seen):
        expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        assert torch.allclose(attend_by_definition(q, k, v, mask, drop=0.0), expected, atol=1e-6)
    causal = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert torch.allclose(attend_causal(q, k, v, None), causal, atol=1e-6)


@pytest.mark.parametrize("length", [7, 600])
def test_half_precision_attends_as_full_precision_does(length):
    """On a CPU a long sequence takes torch's kernel, a short one the definition."""
    attention = Attention(8, 2).eval()
    x = torch.randn(2, length, 8)
    with torch.no_grad():
        expected = attention(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = attention(x)
    assert (found - expected).abs().max() < 0.03 * expected.abs().max()


def test_no_gradients_are_lost_where_nothing_is_dropped():
    attention = Attention(8, 2, attn_drop=0.0).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        attention(torch.randn(2, 7, 8)).sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in (attention.qkv.weight, attention.proj.weight))


def test_dropout_of_everything_and_of_no_probability_is_torchs():
    x = torch.randn(5)
    assert torch.equal(dropout(x, 1.0), torch.zeros(5))
    for p in (-0.1, 1.5):
        with pytest.raises(ValueError, match="probability"):
            dropout(x, p)
