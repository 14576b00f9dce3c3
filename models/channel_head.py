"""Autoregressive head over the channels of one position: condition -> K logits for each channel.

Inside, channels stand in `order` (low-frequency energy first); outside everything is in natural
order. Training feeds the condition at the first position and the embedding of the previous
channel's index at the others; sampling computes one position at a time over cached keys and
values, through the same embedding and the same blocks.
Letters: M positions, T channels of a token (C*p*p), K levels, D width.
Source: arXiv 2503.16430, dimension-wise autoregressive prediction.
"""

import torch
from torch import Tensor, nn

from models.config import HEAD_INPUTS
from models.layers import AdaLNBlock, FinalNorm, KVCache, LayerNorm, call, init_linear, learned


class ChannelHead(nn.Module):
    """cond_dim: width of the condition z. levels: K. order: a permutation of the T channels."""

    order: Tensor
    inverse_order: Tensor

    def __init__(
        self,
        cond_dim: int,
        width: int,
        depth: int,
        heads: int,
        mlp_ratio: float,
        levels: int,
        order: tuple[int, ...],
    ):
        super().__init__()
        self.grad_checkpointing = False
        channels = len(order)
        self.channel_embed = learned(1, channels, width)
        self.timesteps_embeddings = learned(1, channels, width)
        # Part of the published layout only: the attention itself is causal.
        self.register_buffer("channel_mask", torch.ones(channels, channels).tril())
        self.register_buffer("order", torch.tensor(order), persistent=False)
        self.register_buffer("inverse_order", torch.tensor(order).argsort(), persistent=False)

        self.condition_proj = nn.Linear(cond_dim, width)
        self.token_embeddings = nn.ModuleList(
            nn.Embedding(levels, width) for _ in range(channels - 1)
        )
        self.channel_blocks = nn.ModuleList(
            AdaLNBlock(width, heads, mlp_ratio) for _ in range(depth)
        )
        self.channel_norm = LayerNorm(width)
        self.channel_final = FinalNorm(width)
        self.channel_heads = nn.ModuleList(nn.Linear(width, levels) for _ in range(channels))
        self.apply(init_linear)
        for part in (*self.channel_blocks, self.channel_final):  # adaLN-zero
            nn.init.zeros_(part.adaLN_modulation[1].weight)

    def forward(self, z: Tensor, indices: Tensor) -> Tensor:
        """Teacher-forced logits.

        z: [M, cond_dim]. indices: [M, T] int64, natural order; channel i's logits depend only on
        the indices of channels before it in `order`.
        Returns [M, T, K], natural order.
        """
        cond = self.condition_proj(z)  # [M, D]
        indices = indices[:, self.order]
        x = torch.stack([self._token(cond, indices, i) for i in range(len(self.order))], dim=1)
        c = cond[:, None] + self.timesteps_embeddings  # [M, T, D]
        for block in self.channel_blocks:
            x = call(block, x, c, recompute=self.grad_checkpointing)
        x = self.channel_final(self.channel_norm(x), c)
        logits = torch.stack([head(x[:, i]) for i, head in enumerate(self.channel_heads)], dim=1)
        return logits[:, self.inverse_order]

    @torch.no_grad()
    def sample(
        self, z: Tensor, uniforms: Tensor, temperature: float = 1.0, head_input: str = "trained"
    ) -> Tensor:
        """Draw the T channels of each position, one after the other.

        z: [M, cond_dim]. uniforms: [M, T] in [0, 1), natural order, one for each draw.
        temperature: 0 takes the most likely level. head_input: "trained" feeds the condition at
        the first position, as training does; "published" feeds condition + first timestep
        embedding, as the published sampler does and as the published FIDs were measured.
        Returns indices [M, T] int64, natural order.
        """
        if head_input not in HEAD_INPUTS:
            raise ValueError(f"head_input {head_input!r} is not one of {HEAD_INPUTS}")
        cond = self.condition_proj(z)
        uniforms = uniforms[:, self.order]
        caches = [KVCache(len(self.order)) for _ in self.channel_blocks]
        indices = torch.empty(uniforms.shape, dtype=torch.int64, device=z.device)
        for i in range(len(self.order)):
            logits = self.step(i, cond, indices, caches, head_input)
            indices[:, i] = inverse_cdf(logits, uniforms[:, i], temperature)
        return indices[:, self.inverse_order]

    def step(
        self, i: int, cond: Tensor, indices: Tensor, caches: list[KVCache], head_input: str
    ) -> Tensor:
        """Logits [M, K] of the i-th channel in head order, given indices[:, :i] in head order."""
        c = (cond + self.timesteps_embeddings[:, i])[:, None]  # [M, 1, D]
        x = self._token(cond, indices, i)[:, None]
        if i == 0 and head_input == "published":
            x = x + self.timesteps_embeddings[:, :1]
        for block, cache in zip(self.channel_blocks, caches, strict=True):
            x = block(x, c, cache)
        x = self.channel_final(self.channel_norm(x), c)
        return self.channel_heads[i](x[:, 0])

    def _token(self, cond: Tensor, indices: Tensor, i: int) -> Tensor:
        """The i-th input [M, D], in head order: the condition, or the previous channel's index."""
        token = cond if i == 0 else self.token_embeddings[i - 1](indices[:, i - 1])
        return token + self.channel_embed[:, i]


def inverse_cdf(logits: Tensor, uniforms: Tensor, temperature: float) -> Tensor:
    """logits: [M, K], uniforms: [M] in [0, 1) -> [M] draws of softmax(logits / temperature)."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    cdf = (logits.float() / temperature).softmax(dim=-1).cumsum(dim=-1)
    # The sum of K rounded probabilities is not exactly 1: scale the draw to what it is.
    drawn = (cdf <= uniforms[:, None] * cdf[:, -1:]).sum(dim=-1)
    return drawn.clamp(max=logits.shape[-1] - 1)
