"""The channel head: causality, its loss in chunks, the cache against recomputation, its draws."""

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F

from models.heads.channel import ChannelHead, inverse_cdf
from tests.conftest import tiny_model

ORDER = (3, 0, 5, 1, 4, 2)


@pytest.fixture
def head() -> ChannelHead:
    return tiny_model().head


def test_no_channel_sees_itself_or_a_later_one(head):
    """Changing a channel's index may change only the logits of channels after it in the order."""
    z, indices = torch.randn(5, 16), torch.randint(0, 8, (5, 6))
    logits = head.logits(z, indices)
    for place, changed_channel in enumerate(ORDER):
        changed = indices.clone()
        changed[:, changed_channel] = (changed[:, changed_channel] + 1) % 8
        differs = (head.logits(z, changed) != logits).any(dim=2).any(dim=0)
        assert not differs[list(ORDER[: place + 1])].any()
        assert differs[list(ORDER[place + 1 :])].all()
    head = tiny_model(vae_embed_dim=1, channel_order=(0,)).head  # of one channel
    assert head(torch.randn(3, 16), torch.zeros(3, 1, dtype=torch.int64)).shape == (3, 1)
    assert head.sample(torch.randn(3, 16), torch.rand(3, 1))[0].shape == (3, 1)


def test_the_loss_and_its_gradients_equal_the_plain_ones(head):
    """Beside another loss on the same z, too. In chunks of any size: test_heads.py."""
    head.chunk = 4
    z, indices = torch.randn(11, 16, requires_grad=True), torch.randint(0, 8, (11, 6))
    inputs = [z, *head.parameters()]
    auxiliary = z.square().mean()
    each = F.cross_entropy(head.logits(z, indices).mT, indices, reduction="none")
    expected = torch.autograd.grad(3 * each.mean() + auxiliary, inputs, retain_graph=True)
    loss = head.loss(z, indices, grad_scale=128.0)
    found = torch.autograd.grad(3 * loss + z.square().mean(), inputs)
    assert torch.allclose(loss, each.mean(), rtol=1e-6)
    for ours, plain in zip(found, expected, strict=True):
        assert torch.allclose(ours, plain, rtol=1e-4, atol=1e-7)
    with torch.no_grad():
        assert torch.allclose(head.loss(z, indices), loss, rtol=1e-6)
    assert torch.allclose(head.losses(z, indices), each, atol=1e-6)


def test_what_chunks_keep_does_not_grow(head):
    """Bytes saved for backward, by hooks; the plain loss keeps more for each position. A hook of a
    parameter sees the whole gradient, once."""

    def kept(positions: int, chunk: int) -> int:
        head.chunk, sizes = chunk, []
        z = torch.randn(positions, 16, requires_grad=True)
        with saved_tensors_hooks(lambda x: sizes.append(x.nbytes) or x, lambda x: x):
            head.loss(z, torch.randint(0, 8, (positions, 6)))
        return sum(sizes)

    assert kept(64, chunk=4) == kept(8, chunk=4)
    assert kept(64, chunk=0) > 4 * kept(8, chunk=0)

    head.chunk, sizes, gradients = 4, [], []
    head.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    weight = head.condition_proj.weight
    weight.register_hook(lambda gradient: gradients.append(gradient.clone()))
    loss = head.loss(torch.randn(9, 16), torch.randint(0, 8, (9, 6)))
    assert sizes == [4, 4, 1] and not gradients
    loss.backward(retain_graph=True)
    assert len(gradients) == 1 and torch.equal(gradients[0], weight.grad)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_a_scaled_half_precision_gradient_does_not_underflow(head):
    """In fp16 the loss of many positions has gradients below the smallest number."""
    z, indices = torch.randn(512, 16, requires_grad=True), torch.randint(0, 8, (512, 6))
    head.half()
    gradients = []
    for scale in (1e-4, 1.0, 2.0**13):
        loss = head.loss(z.half(), indices, grad_scale=scale)
        (gradient,) = torch.autograd.grad(loss, head.condition_proj.weight)
        gradients.append((gradient == 0).float().mean())
    assert gradients[0] > gradients[1] >= gradients[2]


@pytest.mark.parametrize("temperature", [0, 0.7, 1.0])
def test_draws_are_of_the_teacher_forced_logits_in_one_pass_a_channel(head, temperature):
    """Each block runs once a channel, on one position."""
    z, uniforms, lengths = torch.randn(9, 16), torch.rand(9, 6), []
    attention = head.channel_blocks[0].attn
    attention.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    indices, log_probs = head.sample(z, uniforms, temperature)
    assert lengths == [1] * 6
    logits = head.logits(z, indices)
    expected = (logits / (temperature or 1)).log_softmax(dim=-1)
    assert torch.allclose(log_probs, expected.gather(-1, indices[..., None])[..., 0], atol=1e-5)
    if temperature == 0:
        assert torch.equal(indices, logits.argmax(dim=-1))


def test_levels_are_drawn_by_their_probability_and_no_temperature_is_too_low():
    p = torch.tensor([0.1, 0.0, 0.6, 0.3])
    uniforms = torch.tensor([0.0, 0.0999, 0.1001, 0.6999, 0.7001, 1 - 2**-24])
    drawn, _ = inverse_cdf(p.log().expand(6, -1), uniforms, temperature=1.0)
    assert drawn.tolist() == [0, 0, 2, 2, 3, 3]
    logits = torch.tensor([[0.0, 1.0, 0.5]]).expand(2000, -1)
    uniforms = torch.rand(2000)
    share = (inverse_cdf(logits, uniforms, 0.5)[0] == 1).float().mean()
    assert share == pytest.approx((logits[0] / 0.5).softmax(0)[1].item(), abs=0.04)
    drawn, log_probs = inverse_cdf(logits, uniforms, temperature=1e-40)
    assert (drawn == 1).all() and torch.equal(log_probs, torch.zeros(2000))
