"""What a CPU computes in another way: dropout, and attention by its definition against torch's."""

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F

from models.cpu import Dropout, attend, attend_causal, dropout
from models.layers import Attention, split_heads


def test_dropout_drops_its_share_of_elements_on_their_own_and_keeps_the_mean():
    """Two elements share a random word, rows and columns share nothing."""
    x = torch.ones(1000, 1001)
    for p in (0.1, 0.5, 0.9):
        out = dropout(x, p)
        kept = out != 0
        spread = (p * (1 - p) / x.numel()) ** 0.5
        assert abs(kept.double().mean().item() - (1 - p)) < 5 * spread
        assert out[kept].unique().tolist() == [pytest.approx(1 / (1 - p))]
        flat = kept.flatten()
        for lag in (1, 2, 3, 64):
            both = (flat[:-lag] & flat[lag:]).double().mean().item()
            assert both == pytest.approx((1 - p) ** 2, abs=0.006)


def test_dropout_is_torchs_in_gradients_seeds_rounding_and_limits():
    """1 / 0.9 is no bf16 number: each product is rounded, not the scale."""
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        x = torch.arange(1.0, 232.0).view(33, 7).t().requires_grad_()
        out = dropout(x, 0.3)
        out.sum().backward()
        assert torch.equal(x.grad != 0, out != 0) and torch.allclose(out, x * x.grad)
        draws.append(out)
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    assert set(dropout(torch.full((50,), 9.0, dtype=torch.bfloat16), 0.1).tolist()) <= {0.0, 10.0}
    assert torch.equal(Dropout(0.5).eval()(x), x) and torch.equal(Dropout(0.0).train()(x), x)
    assert not dropout(x, 1.0).any() and dropout(torch.empty(0, 3), 0.5).shape == (0, 3)
    with pytest.raises(ValueError, match="probability"):
        dropout(x, 1.5)


def test_attention_by_its_definition_is_torchs():
    q, k, v = torch.randn(3, 2, 2, 5, 4)
    visible = torch.rand(2, 1, 1, 5) < 0.7
    visible[..., 0] = True
    for mask in (None, visible):
        expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        assert torch.allclose(attend(q, k, v, mask, 1e-9), expected, atol=1e-6)
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
    with torch.autocast("cpu", dtype=torch.bfloat16):
        attention.train()(x).sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in (attention.qkv.weight, attention.proj.weight))


def test_attention_dropout_keeps_no_weights_of_pairs_of_positions():
    """Where no fused kernel has dropout they are computed again, with the same draws."""
    attention = Attention(8, 2, attn_drop=0.5).train()
    x, sizes = torch.randn(3, 64, 8), []
    with saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        torch.manual_seed(0)
        attention(x).square().sum().backward()
    assert max(sizes) <= 3 * 64 * 8 * 3
    found = attention.qkv.weight.grad.clone()
    attention.zero_grad()
    torch.manual_seed(0)
    q, k, v = split_heads(attention.qkv(x), 3, 2)
    out = dropout((q @ k.mT / 2).softmax(dim=-1), 0.5) @ v  # heads of 4 channels
    attention.proj(out.transpose(1, 2).flatten(2)).square().sum().backward()
    assert torch.allclose(found, attention.qkv.weight.grad, rtol=1e-5)
