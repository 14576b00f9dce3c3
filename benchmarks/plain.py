"""The same mathematics the plain way: what the fast paths are compared with, in time and in value.

Everything here works on the weights of the project's own modules, in the shape in which the paper
and the published layout describe it: K distances a scalar, all masked tokens in one graph, one
modulation linear a block, masks as tensors, all positions in every block, prefixes computed again
for every channel, one pass for each half of guidance, loops over parameters. Nothing of the
published code is in it. `SWITCHES` puts these ways in the place of the fast ones, each alone or
all of them, so the gain of each is a row of one run; the tests use them as oracles.
Letters: B batch, L positions, M masked positions, T channels of a token, K levels, D width.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import engine_tokenbridge
from models import cpu, sampler
from models.backbone import Backbone
from models.heads import channel as channel_head
from models.heads.channel import ChannelHead, inverse_cdf
from models.layers import modulate
from models.masking import Mask
from models.quantizer import SPAN, GaussianQuantizer
from models.sampler import SamplingOptions
from models.tokenbridge import TokenBridge
from models.tokenizers import kl16 as vae
from util.ema import EMA


@dataclass(frozen=True)
class Parts:
    """Where the switches act; what a work does not use is None."""

    model: TokenBridge | None = None
    optimizer: torch.optim.AdamW | None = None
    ema: EMA | None = None


def nearest_levels(quantizer: GaussianQuantizer, x: Tensor) -> Tensor:
    """[...] scaled latents -> indices [...]: the smallest of K distances, a [..., K] tensor."""
    low, high = quantizer.low, quantizer.high
    unit = (x.float().clamp(low, high) - low) / (high - low) * (2 * SPAN) - SPAN
    distances = (unit[..., None] - quantizer.reconstruction_values).abs()
    return distances.argmin(dim=-1)


def attention(attn: nn.Module, x: Tensor, heads: int, dropout: float = 0.0, mask=None) -> Tensor:
    """x: [N, T, D] -> [N, T, D]; q and k normalised where the module has norms for them."""
    n, t, d = x.shape
    q, k, v = attn.qkv(x).reshape(n, t, 3, heads, d // heads).permute(2, 0, 3, 1, 4)
    if hasattr(attn, "q_norm"):
        q, k = attn.q_norm(q).to(v.dtype), attn.k_norm(k).to(v.dtype)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
    return attn.proj(out.transpose(1, 2).reshape(n, t, d))


def vit_block(block: nn.Module, x: Tensor, heads: int, attn_drop: float, drop: float) -> Tensor:
    """x: [N, T, D] -> [N, T, D], for all T positions."""
    x = x + F.dropout(attention(block.attn, block.norm1(x), heads, attn_drop), drop)
    hidden = F.dropout(F.gelu(block.mlp.fc1(block.norm2(x))), drop)
    return x + F.dropout(block.mlp.fc2(hidden), drop)


def run_blocks(blocks: nn.ModuleList, x: Tensor, heads: int, model: TokenBridge) -> Tensor:
    config, training = model.config, model.training
    attn_drop = config.attn_dropout if training else 0.0
    drop = config.proj_dropout if training else 0.0
    for block in blocks:
        x = vit_block(block, x, heads, attn_drop, drop)
    return x


def encode(model: TokenBridge, values: Tensor, classes: Tensor, mask: Mask) -> Tensor:
    """values: [B, L, C], classes: [B, D] -> [B, S + V, D]."""
    part: Backbone = model.backbone
    slots = classes[:, None].expand(-1, part.num_slots, -1)
    x = torch.cat([slots, part.z_proj(values)], dim=1) + part.encoder_pos_embed_learned
    x = part.z_proj_ln(x)
    seen = torch.cat([_all_slots(part, mask), mask.visible + part.num_slots], dim=1)
    x = x.gather(1, seen[..., None].expand(-1, -1, x.shape[-1]))
    return part.encoder_norm(
        run_blocks(part.encoder_blocks, x, model.config.encoder_num_heads, model)
    )


def _all_slots(part: Backbone, mask: Mask) -> Tensor:
    slots = torch.arange(part.num_slots, device=mask.visible.device)
    return slots.expand(len(mask.visible), -1)


def decode(model: TokenBridge, encoded: Tensor, mask: Mask, positions: Tensor) -> Tensor:
    """[B, S + V, D] -> z of the positions [B, n]: [B, n, D]; all blocks compute all positions."""
    part: Backbone = model.backbone
    x = part.decoder_embed(encoded)
    length = part.num_slots + part.output_pos_embed.shape[1]
    seen = torch.cat([_all_slots(part, mask), mask.visible + part.num_slots], dim=1)
    whole = part.mask_token.to(x.dtype).expand(len(x), length, -1)
    whole = whole.scatter(1, seen[..., None].expand_as(x), x) + part.decoder_pos_embed_learned
    x = run_blocks(part.decoder_blocks, whole, model.config.decoder_num_heads, model)
    z = part.decoder_norm(x)[:, part.num_slots :] + part.output_pos_embed
    return z.gather(1, positions[..., None].expand(-1, -1, z.shape[-1]))


def head_outputs(head: ChannelHead, inputs: Tensor, cond: Tensor) -> Tensor:
    """inputs: [M, t, D] of the first t channels in head order, cond: [M, D] -> [M, t, D]."""
    t = inputs.shape[1]
    c = cond[:, None] + head.timesteps_embeddings[:, :t]
    causal = head.channel_mask[:t, :t].bool()
    x = inputs
    for block in head.channel_blocks:
        modulations = block.adaLN_modulation(c).chunk(6, dim=-1)
        shift1, scale1, gate1, shift2, scale2, gate2 = modulations
        normed = modulate(block.norm1(x), shift1, scale1)
        x = x + gate1 * attention(block.attn, normed, block.attn.heads, mask=causal)
        x = x + gate2 * block.mlp(modulate(block.norm2(x), shift2, scale2))
    scale, shift = head.channel_final.adaLN_modulation(c).chunk(2, dim=-1)
    return modulate(head.channel_final.norm_final(head.channel_norm(x)), shift, scale)


def head_input(head: ChannelHead, cond: Tensor, indices: Tensor, i: int) -> Tensor:
    """The i-th input [M, D] in head order; indices: [M, T] in head order."""
    token = cond if i == 0 else head.token_embeddings[i - 1](indices[:, i - 1])
    return token + head.channel_embed[:, i]


def head_logits(head: ChannelHead, z: Tensor, indices: Tensor) -> Tensor:
    """Teacher-forced, all M positions at once: z [M, D], indices [M, T] -> logits [M, T, K]."""
    cond, ordered = head.condition_proj(z), indices[:, head.order]
    channels = range(len(head.order))
    inputs = torch.stack([head_input(head, cond, ordered, i) for i in channels], dim=1)
    outputs = head_outputs(head, inputs, cond)
    logits = torch.stack([head.channel_heads[i](outputs[:, i]) for i in channels], dim=1)
    return logits[:, head.inverse_order]


def head_loss(head: ChannelHead, z: Tensor, indices: Tensor, grad_scale=1.0) -> Tensor:
    """The mean cross-entropy as one graph; grad_scale is for those who go backward in forward."""
    logits = head_logits(head, z, indices)
    return F.cross_entropy(logits.flatten(0, 1).float(), indices.flatten())


@torch.no_grad()
def head_sample(
    head: ChannelHead,
    z: Tensor,
    uniforms: Tensor,
    temperature: float = 1.0,
    head_input_mode: str = "trained",
) -> tuple[Tensor, Tensor]:
    """As `ChannelHead.sample`, but each channel computes all of its prefix again."""
    cond, uniforms = head.condition_proj(z), uniforms[:, head.order]
    indices = torch.zeros(uniforms.shape, dtype=torch.int64, device=z.device)
    log_probs = torch.zeros(uniforms.shape, device=z.device)
    for i in range(len(head.order)):
        inputs = [head_input(head, cond, indices, j) for j in range(i + 1)]
        if head_input_mode == "published":
            inputs[0] = inputs[0] + head.timesteps_embeddings[:, 0]
        outputs = head_outputs(head, torch.stack(inputs, dim=1), cond)
        logits = head.channel_heads[i](outputs[:, i])
        drawn = inverse_cdf(logits, uniforms[:, i], temperature)
        indices[:, i], log_probs[:, i] = drawn
    return indices[:, head.inverse_order], log_probs[:, head.inverse_order]


class Conditions:
    """As the sampler's: guided z of the positions, but one pass with the class, one without."""

    def __init__(self, model: TokenBridge, labels: Tensor | None, options: SamplingOptions):
        assert not options.token_cache, "the plain way reuses nothing"
        self.backbone, self.labels, self.guided = model.backbone, labels, options.cfg != 1

    def __call__(
        self, values: Tensor, mask: Mask, positions: Tensor, filled: Tensor, scale: float
    ) -> Tensor:
        """values: [B, L, C], positions: [B, n] -> [B, n, D]."""

        def z_of(choice: Tensor | None) -> Tensor:
            classes = self.backbone.class_embedding(choice, len(values))
            return self.backbone(values, classes, mask, positions)

        if self.labels is None or not self.guided or scale == 1:
            return z_of(self.labels)
        uncond = z_of(None)
        return uncond + scale * (z_of(self.labels) - uncond)


@torch.no_grad()
def update_ema(ema: EMA, skipped: Tensor | float = 0.0) -> None:
    """One parameter after the other."""
    weight = (1 - ema.rate) * (1 - skipped)
    for average, parameter in zip(ema.averages, ema.parameters, strict=True):
        average.mul_(1 - weight).add_(parameter * weight)


def step_unless(optimizer: torch.optim.AdamW, skipped: Tensor) -> None:
    """The host waits to know whether the step is skipped."""
    if not bool(skipped):
        optimizer.step()


@contextmanager
def swapped(owner: object, name: str, value: object) -> Iterator[None]:
    """owner.name is this value for a while."""
    missing = object()
    before = vars(owner).get(name, missing)
    assert hasattr(owner, name), f"nothing to swap: {owner} has no {name}"
    setattr(owner, name, value)
    try:
        yield
    finally:
        if before is missing:
            delattr(owner, name)
        else:
            setattr(owner, name, before)


def _quantizer(parts: Parts) -> AbstractContextManager:
    quantizer = parts.model.quantizer
    return swapped(quantizer, "encode", partial(nearest_levels, quantizer))


def _head(parts: Parts) -> AbstractContextManager:
    return swapped(parts.model.head, "loss", partial(head_loss, parts.model.head))


def _chunks(parts: Parts) -> AbstractContextManager:
    return swapped(parts.model.head, "chunk", 0)


def joined_modulations(c: Tensor, parts: Sequence[nn.Module]) -> Sequence[Tensor]:
    """As `modulations_of`, from the weights of all parts put together."""
    linears = [part.adaLN_modulation[1] for part in parts]
    weight = torch.cat([linear.weight for linear in linears])
    bias = torch.cat([linear.bias for linear in linears])
    joined = F.linear(F.silu(c), weight, bias)
    return joined.split([linear.out_features for linear in linears], dim=-1)


def _modulations(parts: Parts) -> AbstractContextManager:
    return swapped(channel_head, "modulations_of", joined_modulations)


def _dropout(parts: Parts) -> AbstractContextManager:
    return swapped(cpu, "dropout", F.dropout)


@contextmanager
def _backbone(parts: Parts) -> Iterator[None]:
    model, backbone = parts.model, parts.model.backbone
    with (
        swapped(backbone, "encode", partial(encode, model)),
        swapped(backbone, "decode", partial(decode, model)),
    ):
        yield


def _sampling(parts: Parts) -> AbstractContextManager:
    return swapped(parts.model.head, "sample", partial(head_sample, parts.model.head))


def _guidance(parts: Parts) -> AbstractContextManager:
    return swapped(sampler, "_Conditions", Conditions)


def _ema(parts: Parts) -> AbstractContextManager:
    return swapped(parts.ema, "update", partial(update_ema, parts.ema))


@contextmanager
def _optimizer(parts: Parts) -> Iterator[None]:
    groups = parts.optimizer.param_groups
    before = [{name: group[name] for name in ("fused", "foreach")} for group in groups]
    for group in groups:
        group.update(fused=False, foreach=False)
    try:
        with swapped(engine_tokenbridge, "guarded_step", step_unless):
            yield
    finally:
        for group, values in zip(groups, before, strict=True):
            group.update(values)


@contextmanager
def _contiguous(parts: Parts) -> Iterator[None]:
    with swapped(vae, "fastest_layout", lambda x: x), swapped(vae, "silu", F.silu):
        yield


@dataclass(frozen=True)
class Switch:
    """text: what is computed the plain way while it is on."""

    text: str
    on: Callable[[Parts], AbstractContextManager]


SWITCHES = {
    "quantizer": Switch("quantizer by K distances a scalar", _quantizer),
    "chunks": Switch("head over all masked tokens at once", _chunks),
    "modulations": Switch("modulations of all blocks in one product", _modulations),
    "dropout": Switch("dropout by torch", _dropout),
    "head": Switch("head as one graph, with a mask", _head),
    "backbone": Switch("last decoder block computes all positions", _backbone),
    "sampling": Switch("head sampling recomputes all prefixes", _sampling),
    "guidance": Switch("guidance in two passes", _guidance),
    "ema": Switch("EMA as a loop over parameters", _ema),
    "optimizer": Switch("AdamW as a loop over parameters", _optimizer),
    "channels_last": Switch("VAE in contiguous memory", _contiguous),
}
TRAINING = ("quantizer", "head", "backbone", "ema", "optimizer")  # all that a training step has
SAMPLING = ("sampling", "guidance", "backbone")


@contextmanager
def plain(parts: Parts, *names: str) -> Iterator[None]:
    """These parts are computed the plain way for a while."""
    with ExitStack() as stack:
        for name in names:
            stack.enter_context(SWITCHES[name].on(parts))
        yield
