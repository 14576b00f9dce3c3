"""Autoregressive head over the channels of one position: condition -> K logits for each channel.

Inside, channels stand in `order` (low-frequency energy first), outside in natural order. Training
feeds the condition at the first channel and the embedding of the previous one's index at the
others; sampling goes channel by channel over cached keys and values, through the same blocks.
Letters: M positions, T channels of a token (C*p*p), K levels, D width.
Source: arXiv 2503.16430, dimension-wise autoregressive prediction.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.config import TokenBridgeConfig
from models.heads import Head, inverse_cdf
from models.layers import AdaLNBlock, FinalNorm, KVCache, LayerNorm, call, init_linear, learned


class ChannelHead(Head):
    """See models/heads/__init__.py for what it is given and returns."""

    order: Tensor
    inverse_order: Tensor

    def __init__(self, config: TokenBridgeConfig):
        super().__init__(draws=config.token_dim, rows_each=config.token_dim)
        self.levels, self.heads = config.quant_levels, config.channel_heads
        width = config.channel_embed_dim
        area = config.patch_size**2  # a token has its patch channel by channel, then row-major
        order = torch.tensor([c * area + k for c in config.channel_order for k in range(area)])
        channels = len(order)
        self.channel_embed = learned(1, channels, width)
        self.timesteps_embeddings = learned(1, channels, width)
        # Part of the published layout only: the attention itself is causal.
        self.register_buffer("channel_mask", torch.ones(channels, channels).tril())
        self.register_buffer("order", order, persistent=False)
        self.register_buffer("inverse_order", order.argsort(), persistent=False)

        self.condition_proj = nn.Linear(config.decoder_embed_dim, width)
        self.token_embeddings = nn.ModuleList(
            nn.Embedding(self.levels, width) for _ in range(channels - 1)
        )
        self.channel_blocks = nn.ModuleList(
            AdaLNBlock(width, self.heads, config.mlp_ratio) for _ in range(config.channel_depth)
        )
        self.channel_norm = LayerNorm(width)
        self.channel_final = FinalNorm(width)
        self.channel_heads = nn.ModuleList(nn.Linear(width, self.levels) for _ in range(channels))
        self.apply(init_linear)
        for part in (*self.channel_blocks, self.channel_final):  # adaLN-zero
            nn.init.zeros_(part.adaLN_modulation[1].weight)

    def forward(self, z: Tensor, indices: Tensor) -> Tensor:
        """Cross-entropy of every index: z [M, cond_dim], indices [M, T] -> [M, T], in nats."""
        logits = self.logits(z, indices).float()  # [M, T, K]
        losses = F.cross_entropy(logits.flatten(0, 1), indices.flatten(), reduction="none")
        return losses.view_as(indices)

    def logits(self, z: Tensor, indices: Tensor) -> Tensor:
        """Teacher-forced logits: z [M, cond_dim], indices [M, T] int64 -> [M, T, K].

        Channel i's logits depend only on the indices of channels before it in `order`.
        """
        cond = self.condition_proj(z)  # [M, D]
        *modulations, final = self._modulations(cond[:, None] + self.timesteps_embeddings)
        inputs = [cond[:, None]]
        if len(self.token_embeddings) > 0:
            table = torch.cat([embedding.weight for embedding in self.token_embeddings])
            first = torch.arange(len(self.token_embeddings), device=z.device) * self.levels
            inputs.append(F.embedding(indices[:, self.order[:-1]] + first, table))  # [M, T - 1, D]
        x = torch.cat(inputs, dim=1) + self.channel_embed  # in head order
        for block, modulation in zip(self.channel_blocks, modulations, strict=True):
            x = call(block, x, modulation, recompute=self.grad_checkpointing)
        x = self.channel_final(self.channel_norm(x), final)  # [M, T, D]
        weight = torch.stack([head.weight for head in self.channel_heads])  # [T, K, D]
        bias = torch.stack([head.bias for head in self.channel_heads])
        logits = torch.baddbmm(bias[:, None], x.transpose(0, 1), weight.transpose(1, 2))
        return logits[self.inverse_order].transpose(0, 1)

    def _modulations(self, c: Tensor) -> list[Tensor]:
        """c: [..., D] -> [..., 6 D] for every block, [..., 2 D] for the final norm."""
        c = F.silu(c)
        return [p.adaLN_modulation[1](c) for p in (*self.channel_blocks, self.channel_final)]

    def sample_rows(
        self, z: Tensor, uniforms: Tensor, temperature: float, head_input: str = "trained"
    ) -> tuple[Tensor, Tensor]:
        """Draw the T channels of each position, one after the other.

        head_input: "trained" feeds the condition at the first channel, as training does;
        "published" feeds condition + first timestep embedding, as the published sampler does
        and as the published FIDs were measured.
        """
        uniforms, channels = uniforms[:, self.order], torch.arange(len(self.order), device=z.device)
        cond = self.condition_proj(z)  # [M, D]
        c = cond + self.timesteps_embeddings[0, :, None]  # [T, M, D]
        *modulations, final = self._modulations(c)  # of all channels at once: they know no index
        caches = [KVCache.empty(cond, self.heads, len(channels)) for _ in modulations]
        parts = self.channel_blocks, modulations, caches
        token, drawn = c[0] if head_input == "published" else cond, []
        for i, channel_head in enumerate(self.channel_heads):
            x = (token + self.channel_embed[:, i])[:, None]  # [M, 1, D]
            now = {"positions": channels[None, i : i + 1], "visible": (channels <= i)[None]}
            for block, modulation, cache in zip(*parts, strict=True):
                x = block(x, modulation[i][:, None], cache._replace(**now))
            x = self.channel_final(self.channel_norm(x), final[i][:, None])
            drawn.append(inverse_cdf(channel_head(x[:, 0]), uniforms[:, i], temperature))
            if i + 1 < len(channels):
                token = self.token_embeddings[i](drawn[i][0])
        indices, log_probs = (torch.stack(x, dim=1) for x in zip(*drawn, strict=True))
        return indices[:, self.inverse_order], log_probs[:, self.inverse_order]
