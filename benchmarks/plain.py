"""The same mathematics the plain way: what the fast paths are compared with, in time and in value.

It works on the weights of the project's own modules, as the paper describes it. `SWITCHES` puts
these ways in the place of the fast ones, each alone or together; tests/test_benchmarks.py holds
both to the same values. `token_cache` alone is no plain way, but an approximation.
Letters: B batch, L positions, S class slots, V visible, M masked positions, T channels of a token,
K levels, D width.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from types import SimpleNamespace
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models import sampler
from models.backbone import Backbone, unpatchify
from models.heads.channel import ChannelHead, inverse_cdf
from models.layers import modulate, take
from models.masking import Mask, mask_schedule
from models.quantizer import SPAN, GaussianQuantizer
from models.tokenbridge import TokenBridge
from models.tokenizers import kl16
from util.optim import EMA


def nearest_levels(quantizer: GaussianQuantizer, x: Tensor) -> Tensor:
    """[...] scaled latents -> indices [...]: the smallest of K distances, a [..., K] tensor."""
    low, high = quantizer.low, quantizer.high
    unit = (x.float().clamp(low, high) - low) / (high - low) * (2 * SPAN) - SPAN
    distances = (unit[..., None] - quantizer.reconstruction_values).abs()
    return distances.argmin(dim=-1)


def attention(attn: nn.Module, x: Tensor, dropout: float = 0.0, mask=None) -> Tensor:
    """x: [N, T, D] -> [N, T, D]; q and k normalised where the module has norms for them."""
    q, k, v = attn.qkv(x).unflatten(-1, (3, attn.heads, -1)).permute(2, 0, 3, 1, 4)
    if hasattr(attn, "q_norm"):
        q, k = attn.q_norm(q).to(v.dtype), attn.k_norm(k).to(v.dtype)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
    return attn.proj(out.transpose(1, 2).flatten(2))


def run_blocks(model: TokenBridge, blocks: nn.ModuleList, x: Tensor) -> Tensor:
    """x: [N, T, D] -> [N, T, D], for all T positions."""
    attn_drop, drop = model.config.attn_dropout, model.config.proj_dropout
    attn_drop, drop = (attn_drop, drop) if model.training else (0.0, 0.0)
    for block in blocks:
        x = x + F.dropout(attention(block.attn, block.norm1(x), attn_drop), drop)
        hidden = F.dropout(F.gelu(block.mlp.fc1(block.norm2(x))), drop)
        x = x + F.dropout(block.mlp.fc2(hidden), drop)
    return x


def conditions(
    model: TokenBridge, values: Tensor, classes: Tensor, mask: Mask, positions: Tensor
) -> Tensor:
    """values: [B, L, C], classes: [B, D] -> z of the positions [B, n]: [B, n, D].

    All blocks of the decoder compute all positions.
    """
    part: Backbone = model.backbone
    slots = classes[:, None].expand(-1, part.num_slots, -1)
    x = torch.cat([slots, part.z_proj(values)], dim=1) + part.encoder_pos_embed_learned
    slots = torch.arange(part.num_slots, device=x.device).expand(len(x), -1)
    places = torch.cat([slots, mask.visible + part.num_slots], dim=1)  # [B, S + V]
    x = run_blocks(model, part.encoder_blocks, take(part.z_proj_ln(x), places))
    x = part.decoder_embed(part.encoder_norm(x))
    whole = part.mask_token.to(x.dtype).expand(len(x), part.num_slots + values.shape[1], -1)
    whole = whole.scatter(1, places[..., None].expand_as(x), x) + part.decoder_pos_embed_learned
    x = run_blocks(model, part.decoder_blocks, whole)
    z = part.decoder_norm(x)[:, part.num_slots :] + part.output_pos_embed
    return take(z, positions)


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
        x = x + gate1 * attention(block.attn, normed, mask=causal)
        x = x + gate2 * block.mlp(modulate(block.norm2(x), shift2, scale2))
    scale, shift = head.channel_final.adaLN_modulation(c).chunk(2, dim=-1)
    return modulate(head.channel_final.norm_final(head.channel_norm(x)), shift, scale)


def channel_input(head: ChannelHead, cond: Tensor, indices: Tensor, i: int) -> Tensor:
    """The i-th input [M, D] in head order; indices: [M, T] in head order."""
    token = cond if i == 0 else head.token_embeddings[i - 1](indices[:, i - 1])
    return token + head.channel_embed[:, i]


def head_loss(head: ChannelHead, z: Tensor, indices: Tensor, *_) -> Tensor:
    """z: [M, D], indices: [M, T] -> mean cross-entropy, teacher-forced, all M positions at once."""
    cond, indices = head.condition_proj(z), indices[:, head.order]
    channels = range(len(head.order))
    inputs = torch.stack([channel_input(head, cond, indices, i) for i in channels], dim=1)
    outputs = head_outputs(head, inputs, cond)
    logits = torch.stack([head.channel_heads[i](outputs[:, i]) for i in channels], dim=1)
    return F.cross_entropy(logits.flatten(0, 1).float(), indices.flatten())


@torch.no_grad()
def head_sample(
    head: ChannelHead,
    z: Tensor,
    uniforms: Tensor,
    temperature: float = 1.0,
    head_input: str = "trained",
) -> tuple[Tensor, Tensor]:
    """As `ChannelHead.sample`, but each channel computes all of its prefix again."""
    cond, uniforms = head.condition_proj(z), uniforms[:, head.order]
    indices = torch.zeros(uniforms.shape, dtype=torch.int64, device=z.device)
    log_probs = torch.zeros(uniforms.shape, device=z.device)
    for i in range(len(head.order)):
        inputs = [channel_input(head, cond, indices, j) for j in range(i + 1)]
        if head_input == "published":
            inputs[0] = inputs[0] + head.timesteps_embeddings[:, 0]
        outputs = head_outputs(head, torch.stack(inputs, dim=1), cond)
        logits = head.channel_heads[i](outputs[:, i])
        indices[:, i], log_probs[:, i] = inverse_cdf(logits, uniforms[:, i], temperature)
    return indices[:, head.inverse_order], log_probs[:, head.inverse_order]


@torch.no_grad()
def sample_latents(
    model: TokenBridge, labels: Tensor, num_iter: int, cfg: float = 1.0, seed: int = 0
) -> Tensor:
    """As the sampler's of that name, but one pass with the class and one without: [B, C, H, W]."""
    config, batch = model.config, len(labels)
    drawn = sampler.image_randomness(seed, range(batch), config.seq_len, config.token_dim)
    orders, uniforms = (tensor.to(labels.device) for tensor in drawn)
    values = torch.zeros_like(uniforms)
    for before, after, m in mask_schedule(config.seq_len, num_iter):
        if before == after:
            continue
        mask, positions = Mask.from_orders(orders, before), orders[:, after:before]
        z, uncond = (
            model.backbone(values, model.backbone.class_embedding(which, batch), mask, positions)
            for which in (labels, None)
        )
        z = uncond + (1 + (cfg - 1) * (config.seq_len - m) / config.seq_len) * (z - uncond)
        draws = take(uniforms, positions)
        drawn, _ = model.head.sample(
            z.flatten(0, 1), draws.flatten(0, 1), head_input=config.head_input
        )
        levels = model.quantizer.decode(drawn).view_as(draws)
        values.scatter_(1, positions[..., None].expand_as(levels), levels)
    return unpatchify(values, config.patch_size, config.grid_size)


@torch.no_grad()
def update_ema(ema: EMA, skipped: Tensor | float = 0.0) -> None:
    """Reads and writes the averages twice."""
    weight = (1 - ema.rate) * (1 - skipped)
    for average, parameter in zip(ema.averages, ema.parameters, strict=True):
        average.mul_(1 - weight).add_(parameter * weight)


def adamw_step(optimizer: torch.optim.AdamW) -> None:
    """One parameter after the other; the host waits to know whether the step is skipped."""
    skipped, optimizer.found_inf = bool(optimizer.found_inf), None
    if skipped:
        return
    with ExitStack() as stack:
        for group in optimizer.param_groups:
            stack.enter_context(patch.dict(group, fused=False, foreach=False))
        torch.optim.AdamW.step(optimizer)


# Where the switches act: model, optimizer, ema, and a sampler whose `sample` is `sample_latents`.
Parts = SimpleNamespace
# Owner, attribute and its plain value.
SWITCHES: dict[str, Callable[[Parts], tuple[object, str, object]]] = {
    "quantizer": lambda p: (
        p.model.quantizer,
        "encode",
        partial(nearest_levels, p.model.quantizer),
    ),
    "head": lambda p: (p.model.head, "loss", partial(head_loss, p.model.head)),
    "chunks": lambda p: (p.model.head, "chunk", 0),
    "backbone": lambda p: (p.model.backbone, "forward", partial(conditions, p.model)),
    "sampling": lambda p: (p.model.head, "sample", partial(head_sample, p.model.head)),
    "guidance": lambda p: (p.sampler, "sample", sample_latents),
    "token_cache": lambda p: (p.sampler, "sample", partial(sampler.sample_latents, token_cache=4)),
    "ema": lambda p: (p.ema, "update", partial(update_ema, p.ema)),
    "optimizer": lambda p: (p.optimizer, "step", partial(adamw_step, p.optimizer)),
    "channels_last": lambda p: (kl16, "fastest_layout", lambda x: x),
}


@contextmanager
def plain(parts: Parts, *names: str) -> Iterator[None]:
    """These parts are computed the plain way for a while."""
    with ExitStack() as stack:
        for name in names:
            stack.enter_context(patch.object(*SWITCHES[name](parts)))
        yield
