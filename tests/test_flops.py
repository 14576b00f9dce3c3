"""The analytic counts are those of torch's counter on the modules themselves, part by part."""

import math
from collections import Counter

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from models.config import TokenBridgeConfig, preset
from models.layers import modulations_of
from models.masking import Mask, draw_mask_ratio, mask_schedule, masked_counts, random_orders
from models.sampler import sample_latents
from models.tokenbridge import TokenBridge
from models.tokenizers.kl16 import KL16, AutoencoderKL
from tests.conftest import tiny_model
from util import flops

VARIANTS = {
    "square": {},
    "other widths": dict(decoder_embed_dim=24, channel_embed_dim=8, encoder_depth=2, mlp_ratio=3.0),
    "patches": dict(img_size=32, vae_embed_dim=2, patch_size=2, channel_order=(1, 0)),
    "deep": dict(decoder_depth=3, channel_depth=1, quant_levels=16, buffer_size=5, img_size=24),
}


def count(compute) -> dict:
    """By operation, attention written out: the CPU's fused kernel has no formula."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        compute()
    return counter.get_flop_counts()["Global"]


def counted(compute) -> int:
    return sum(count(compute).values())


@pytest.fixture(params=VARIANTS)
def model(request) -> TokenBridge:
    return tiny_model(**VARIANTS[request.param])


def inputs(model: TokenBridge, masked: int, batch: int = 2) -> tuple:
    """values, class embeddings and mask of a batch."""
    config = model.config
    values = torch.randn(batch, config.seq_len, config.token_dim)
    classes = model.backbone.class_embedding(torch.zeros(batch, dtype=torch.long), batch)
    return values, classes, Mask.from_orders(random_orders(batch, config.seq_len, "cpu"), masked)


def head_inputs(model: TokenBridge, positions: int) -> tuple:
    config = model.config
    indices = torch.randint(config.quant_levels, (positions, config.token_dim))
    return torch.randn(positions, config.decoder_embed_dim, requires_grad=True), indices


def test_forward_of_each_part(model):
    config, masked = model.config, 11
    values, classes, mask = inputs(model, masked)
    encoded = model.backbone.encode(values, classes, mask)
    expected = flops.forward(config, masked)
    assert counted(lambda: model.backbone.encode(values, classes, mask)) == (
        2 * expected.encoder.total
    )
    found = counted(lambda: model.backbone.decode(encoded, mask, mask.masked[:, :5]))
    assert found == 2 * flops.decoder(config, config.seq_len - masked, predicted=5).total
    found = counted(lambda: model.backbone.decode(encoded, mask, mask.masked))
    assert found == 2 * expected.decoder.total
    head = flops.head(config, 2 * masked)
    assert counted(lambda: model.head(*head_inputs(model, 2 * masked))) == head.total
    assert head == 2 * expected.head


def test_attention_and_adaln_are_told_apart(model):
    """Attention is the batched products without a bias."""
    head, expected = model.head, flops.head(model.config, 11)
    found = count(lambda: head(*head_inputs(model, 11)))
    assert found[torch.ops.aten.bmm] == expected.attention
    conditions = torch.randn(11, model.config.token_dim, model.config.channel_embed_dim)
    parts = [*head.channel_blocks, head.channel_final]
    assert counted(lambda: modulations_of(conditions, parts)) == expected.adaln


@pytest.mark.parametrize("grad_checkpointing", [False, True])
@pytest.mark.parametrize("head_chunk", [0, 7])
def test_training_step(model, grad_checkpointing, head_chunk):
    """With dropout, whose masks are what a recomputation ends with.

    Not in attention, which a CPU then computes a second time: that is no part of the model.
    """
    model = TokenBridge(
        **model.config.to_dict() | dict(attn_dropout=0.0, proj_dropout=0.1),
        grad_checkpointing=grad_checkpointing,
        head_chunk=head_chunk,
    )
    config, batch = model.config, 3
    mask = torch.zeros(batch, config.seq_len, dtype=torch.bool)
    mask[:, :12] = True
    latents, labels = torch.randn(batch, *config.latent_shape), torch.zeros(batch).long()
    found = counted(lambda: model(latents, labels, mask).backward())
    assert found == batch * flops.training_step(config, 12, grad_checkpointing).total


@pytest.mark.parametrize("cfg", [1.0, 2.0])
@pytest.mark.parametrize("num_iter", [1, 5, 9])
def test_sampling(model, num_iter, cfg):
    labels = torch.tensor([0, 1])
    found = counted(lambda: sample_latents(model, labels, num_iter=num_iter, cfg=cfg))
    expected = flops.sampling(model.config, num_iter, guided=cfg != 1)
    assert found == 2 * expected.total


@pytest.mark.parametrize(
    "vae", [KL16 | {"ch": 32}, dict(embed_dim=3, ch_mult=(1, 2), ch=32, num_res_blocks=1)]
)
def test_vae(vae):
    model = AutoencoderKL(**vae).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        latents = model.encode(images).mean
        assert counted(lambda: model.encode(images)) == 2 * flops.vae_encode(vae, 32)
        assert counted(lambda: model.decode(latents)) == 2 * flops.vae_decode(vae, 32)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        dict(use_quant_conv=False, use_post_quant_conv=False),
        dict(block_out_channels=(8, 16, 16), layers_per_block=2, mid_block_add_attention=False),
    ],
)
def test_vae_of_diffusers(changes):
    diffusers = pytest.importorskip("diffusers")
    settings = dict(block_out_channels=(8, 16), latent_channels=3, norm_num_groups=4) | changes
    levels = len(settings["block_out_channels"])
    settings |= dict(down_block_types=("DownEncoderBlock2D",) * levels)
    settings |= dict(up_block_types=("UpDecoderBlock2D",) * levels, layers_per_block=1) | changes
    model = diffusers.AutoencoderKL(**settings)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        latents = model.encode(images).latent_dist.mean
        assert counted(lambda: model.encode(images)) == 2 * flops.vae_encode(settings, 32)
        assert counted(lambda: model.decode(latents)) == 2 * flops.vae_decode(settings, 32)
    with pytest.raises(ValueError, match="AttnDownEncoderBlock2D"):
        flops.vae_encode(settings | dict(down_block_types=("AttnDownEncoderBlock2D",)), 32)


def test_masked_counts_are_the_frequencies_of_the_draws():
    length, draws = 16, 20_000
    expected = masked_counts(length, 0.7)
    assert sum(p for _, p in expected) == pytest.approx(1)
    found = Counter(math.ceil(length * draw_mask_ratio(0.7)) for _ in range(draws))
    assert set(found) == {m for m, _ in expected}
    for m, p in expected:
        assert found[m] / draws == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / draws))


@pytest.mark.parametrize("minimum", [0.0, 0.5, 0.7, 1.0])
def test_masked_counts_have_the_mean_of_the_truncated_normal(minimum):
    """mu + sigma (phi(a) - phi(0)) / (Phi(0) - Phi(a)); rounding up adds half a position."""
    length = 4096
    mean = sum(m * p for m, p in masked_counts(length, minimum)) / length
    a = (minimum - 1) / 0.25
    phi = math.exp(-(a**2) / 2) / math.sqrt(2 * math.pi)
    mass = 0.5 * math.erf(-a / math.sqrt(2))
    closed = 1 + 0.25 * (phi - 1 / math.sqrt(2 * math.pi)) / mass if mass else 1.0
    assert mean == pytest.approx(closed + (0.5 / length if mass else 0), abs=1e-5)
    if minimum == 0.7:
        assert mean == pytest.approx(0.867, abs=5e-4)


def test_mean_step_is_the_mean_over_the_masks():
    config = tiny_model().config
    found = flops.training_step(config).total
    counts = masked_counts(config.seq_len, config.mask_ratio_min)
    assert found == pytest.approx(sum(p * flops.training_step(config, m).total for m, p in counts))


def test_large_model_spends_three_quarters_in_the_head():
    """About 2.1 TFLOP an image: 76 % head, a third of it adaLN; 18 % decoder, 6 % encoder."""
    step = flops.training_step(TokenBridgeConfig(**preset("tokenbridge_large")))
    assert step.total == pytest.approx(2.1e12, rel=0.05)
    assert step.head.total / step.total == pytest.approx(0.76, abs=0.01)
    assert step.decoder.total / step.total == pytest.approx(0.18, abs=0.01)
    assert step.encoder.total / step.total == pytest.approx(0.06, abs=0.01)
    assert step.head.adaln / step.head.total == pytest.approx(1 / 3, abs=0.02)


def test_sampling_passes_over_iterations_without_positions():
    config = tiny_model().config
    assert len(mask_schedule(config.seq_len, 100)) == 100
    busy = flops.sampling(config, config.seq_len, guided=False)
    assert flops.sampling(config, 100, guided=False).head == busy.head
