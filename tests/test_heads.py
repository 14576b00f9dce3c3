"""What every head promises, and each one against its oracle."""

import math
from unittest import mock

import pytest
import torch
from torch import distributions as D
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F

from models.config import HEADS
from models.heads import inverse_cdf
from models.heads.channel import ChannelHead
from models.heads.masked import step_sizes
from models.masking import MaskRatios, training_mask
from models.sampler import sample_latents
from models.tokenbridge import TokenBridge
from tests.conftest import relative_error, tiny_model

SETTINGS = {
    "masked": {"head_steps": (1, 2, 3)},
    "mixture": {"mixture_components": 3},
    "diffusion": dict(diffloss_d=1, diffloss_w=16, num_sampling_steps=4, diffusion_batch_mul=2),
    "codebook": {"codebook_size": 8},
}
ALL = pytest.mark.parametrize("head", list(HEADS))


def model_of(head: str, **changes) -> TokenBridge:
    model = tiny_model(head=head, **SETTINGS.get(head, {}) | changes)
    if head == "codebook":
        model.quantizer.set_levels(F.normalize(torch.randn(8, 6), dim=1))
    return model


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(2, 6, 4, 4), torch.tensor([0, 2])


@ALL
def test_chunks_change_no_loss_and_no_gradient(head):
    model, (latents, labels) = model_of(head).train(), inputs()
    results = []
    for chunk, padded in ((0, False), (3, False), (5, True), (None, False)):
        model.zero_grad()
        model.head.chunk, model.head.padded = chunk, padded
        torch.manual_seed(1)
        loss = model(latents, labels)
        loss.backward()
        assert all(p.grad is not None for p in model.parameters())  # as DDP wants
        results.append([loss.detach(), *(p.grad.clone() for p in model.parameters())])
    for other in results[1:]:
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(results[0], other, strict=True))


@ALL
@pytest.mark.parametrize("options", [{}, {"cfg": 2.0}, {"token_cache": 2, "order": "raster"}])
def test_an_image_is_the_same_in_any_batch_and_in_any_chunks(head, options):
    model, labels = model_of(head), torch.tensor([0, 1, 2])
    how = dict(num_iter=4, temperature=0.9, seed=5, **options)
    whole = sample_latents(model, labels, image_ids=[4, 7, 9], **how)
    model.head.chunk = 2
    alone = sample_latents(model, labels[1:2], image_ids=[7], **how)
    assert relative_error(alone, whole[1:2]) < 1e-5
    other = sample_latents(model, labels, image_ids=[4, 7, 9], **how | {"seed": 6})
    assert whole.isfinite().all() and not torch.equal(whole, other)


@ALL
def test_one_batch_can_be_learnt_by_heart(head):
    model, batch = model_of(head, mask_ratio_min=1.0).train(), inputs()
    optimizer, losses = torch.optim.Adam(model.parameters(), lr=1e-2), []
    for _ in range(150):
        optimizer.zero_grad()
        losses.append(model(*batch))
        losses[-1].backward()
        optimizer.step()
    first, last = (sum(part).item() / 10 for part in (losses[:10], losses[-10:]))
    assert last < (first - 3 if head == "mixture" else 0.5 * first)


def test_settings_and_quantizers_of_another_head_are_refused():
    for wrong, message in (
        (dict(diffloss_d=2), "diffloss_d 2 is of the diffusion head, not of channel"),
        (dict(head="mixture", head_steps=2), "head_steps 2 is of the masked head"),
        (dict(head="diffusion", quantizer="published"), "'published' is not the diffusion head's"),
        (dict(head="codebook", quantizer="calibrated"), "codebook head's, which takes codebook"),
        (dict(head="masked", head_steps=[2, 3]), "do not sum to 16"),
        (dict(head="diffusion", num_sampling_steps="0"), "num_sampling_steps 0 is not positive"),
        (dict(head="mixture", mixture_components=2.5), "mixture_components 2.5 is not a whole"),
        (dict(head="givt"), "head 'givt' is not one of channel, parallel"),
        (dict(head=None), "head None is not one of"),
        (dict(head_share=0.0), "head_share 0.0"),
    ):
        with pytest.raises(ValueError, match=message):
            TokenBridge(**wrong)
    with pytest.raises(ValueError, match="order confidence"):
        sample_latents(model_of("diffusion"), torch.tensor([0]), order="confidence")


# --- channel: causality, its loss in chunks, the cache against recomputation, its draws

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


# --- mixture


def oracle(model: TokenBridge, z: torch.Tensor, temperature: float = 1.0) -> D.MixtureSameFamily:
    logits, means, scales = model.head.mixture(z)
    each = D.Independent(D.Normal(means, temperature * scales), 1)
    return D.MixtureSameFamily(D.Categorical(logits=logits), each)


def test_mixture_loss_and_samples_are_those_of_the_density_which_begins_as_one_gaussian():
    """The temperature scales the deviations."""
    model, z, x = model_of("mixture"), torch.randn(50, 16), torch.randn(50, 6) * 2
    loss = model.head(z, x)
    assert loss.shape == (50, 1)
    assert torch.allclose(loss[:, 0], -oracle(model, z).log_prob(x), atol=1e-4)
    fresh = TokenBridge(head="mixture", encoder_depth=1, decoder_depth=1)
    logits, means, scales = fresh.head.mixture(torch.randn(5, 1024))
    assert means.shape == (5, 16, 16) and not means.any() and not logits.any()
    assert torch.equal(scales, torch.ones_like(scales))

    z, uniforms = torch.randn(1, 16).expand(40000, -1), torch.rand(40000, 7)
    for temperature in (1.0, 0.5):
        values, log_probs = model.head.sample(z, uniforms, temperature)
        density = oracle(model, z[:1], temperature)
        assert torch.allclose(values.mean(dim=0), density.mean[0], atol=0.05)
        assert torch.allclose(values.var(dim=0), density.variance[0], atol=0.12)
        assert torch.allclose(log_probs[:, 0], oracle(model, z).log_prob(values), atol=1e-4)


# --- masked and parallel


def test_masked_head_fills_the_most_certain_first_and_never_changes_them():
    head, z, uniforms = model_of("masked").head, torch.randn(20, 16), torch.rand(20, 18)
    plain = head.logits
    with mock.patch.object(head, "logits", side_effect=plain) as logits:
        indices, log_probs = head.sample(z, uniforms)
    calls = [call.args[1:] for call in logits.call_args_list]
    assert [masked.sum(dim=1).unique().tolist() for _, masked in calls] == [[6], [5], [3]]
    first = uniforms.unflatten(1, (3, 6))[:, 0]
    everything = torch.ones(20, 6, dtype=torch.bool)
    drawn, sure = inverse_cdf(plain(z, torch.zeros(20, 6).long(), everything), first, 1.0)
    best = sure.argmax(dim=1, keepdim=True)
    assert torch.equal(indices.gather(1, best), drawn.gather(1, best))
    assert torch.equal(log_probs.gather(1, best), sure.gather(1, best))
    for before, masked in calls[1:]:
        assert torch.equal(before[~masked], indices[~masked])


def test_masked_head_sees_no_masked_channel_and_weighs_visible_ones_by_a_tenth():
    head, z, indices = model_of("masked").head, torch.randn(8, 16), torch.randint(8, (8, 6))
    masked = torch.rand(8, 6) < 0.5
    logits = head.logits(z, indices, masked)
    changed = torch.where(masked, (indices + 1) % 8, indices)
    assert torch.equal(logits, head.logits(z, changed, masked))
    losses = F.cross_entropy(logits.mT, indices, reduction="none")
    expected = torch.where(masked, losses, 0.1 * losses)
    assert torch.allclose(head(z, indices, masked), expected, atol=1e-6)
    shares = torch.cat([head.noise(torch.zeros(20000, 6))[0]]).float().mean(dim=1)
    assert shares.min() > 0 and 0.5 < shares.mean() < 0.65  # of 1 - sigmoid(0.8 n), rounded up


def test_step_sizes_are_the_published_ones_or_given_and_parallel_is_a_single_step():
    assert step_sizes(4, 16) == (2, 2, 5, 7) and step_sizes(1, 16) == (16,)
    assert step_sizes(16, 16) == (1,) * 16 and step_sizes((3, 5), 8) == (3, 5)
    assert sum(step_sizes(3, 8)) == 8 and step_sizes(9, 4) == (1, 1, 1, 1)
    model, z = model_of("parallel"), torch.randn(5, 16)
    uniforms = torch.rand(5, 6)
    everything = torch.ones(5, 6, dtype=torch.bool)
    logits = model.head.logits(z, torch.zeros(5, 6).long(), everything)
    indices, _ = model.head.sample(z, uniforms)
    assert torch.equal(indices, inverse_cdf(logits, uniforms, 1.0)[0])


# --- codebook


def test_codebook_tokens_are_the_nearest_codes():
    model, x = model_of("codebook"), torch.randn(2, 5, 6)
    indices = model.quantizer.encode(x)
    codes = model.quantizer.codebook
    assert torch.equal(indices[..., 0], torch.cdist(x, codes).argmin(dim=-1))
    assert torch.equal(model.quantizer.decode(indices), codes[indices[..., 0]])
    with torch.autocast("cpu", dtype=torch.bfloat16):  # as in a step of training
        close = F.normalize(codes[:1] + 1e-3 * torch.randn(500, 6), dim=1)
        model.quantizer.set_levels(torch.cat([codes[:1], close[:7]]))
        every = model.quantizer.codebook
        assert torch.equal(model.quantizer.encode(every)[:, 0], torch.arange(8))
    latents = sample_latents(model, torch.tensor([1]), num_iter=3)
    distances = torch.cdist(latents.flatten(2).mT[0], every).min(dim=1).values
    assert distances.max() < 1e-5


# --- head_share


def test_a_share_of_the_positions_is_a_random_subset_and_its_loss_unbiased():
    torch.manual_seed(3)
    whole, masked = training_mask(4, 16, MaskRatios("normal", 0.7), 1.0, "cpu")
    torch.manual_seed(3)
    visible, positions = training_mask(4, 16, MaskRatios("normal", 0.7), 0.25, "cpu")
    every = torch.cat([visible, masked], dim=1).sort(dim=1).values
    assert torch.equal(visible, whole) and torch.equal(every, torch.arange(16).expand(4, -1))
    assert positions.shape[1] == math.ceil(masked.shape[1] / 4)
    for row, allowed in zip(positions.tolist(), masked.tolist(), strict=True):
        assert set(row) <= set(allowed) and row == sorted(set(row))
    model, part = tiny_model(), tiny_model(head_share=0.25)
    with torch.no_grad():
        losses = torch.tensor([[m(*inputs()) for m in (model, part)] for _ in range(400)])
    mean, other = losses.mean(dim=0).tolist()
    assert mean == pytest.approx(other, rel=0.01)
