"""Autoregressive head over the channels of one position: condition -> K logits for each channel.

Inside, channels stand in `order` (low-frequency energy first), outside in natural order. Training
feeds the condition at the first channel and the embedding of the previous one's index at the
others; sampling goes channel by channel over cached keys and values, through the same blocks.
Letters: M positions, T channels of a token (C*p*p), K levels, D width.
Source: arXiv 2503.16430, dimension-wise autoregressive prediction.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.chunks import chunked_mean, split
from models.config import TokenBridgeConfig
from models.layers import AdaLNBlock, FinalNorm, KVCache, LayerNorm, call, init_linear, learned

# Rows (positions x channels) that the head works on at once: enough to keep the device busy.
CHUNK_ROWS = {"cpu": 1024}
CHUNK_ROWS_ELSEWHERE = 16384


class ChannelHead(nn.Module):
    """See models/heads/__init__.py for what it is given and returns.

    chunk: positions worked on at once; None is chosen by the device, 0 is all of them in one graph.
    """

    order: Tensor
    inverse_order: Tensor

    def __init__(self, config: TokenBridgeConfig):
        super().__init__()
        self.grad_checkpointing = False
        self.chunk: int | None = None
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

    def loss(self, z: Tensor, indices: Tensor, grad_scale: Tensor | float = 1.0) -> Tensor:
        """The mean of all cross-entropies; in chunks (`chunked_mean`) unless chunk is 0."""
        if self.chunk == 0:
            return self(z, indices).mean()
        return chunked_mean(self, z, indices, self._pieces(z), grad_scale)

    def cross_entropies(self, z: Tensor, indices: Tensor) -> Tensor:
        """As `forward`, in chunks, for validation; training takes `loss`."""
        return torch.cat([self(*part) for part in split(self._pieces(z), z, indices)])

    def logits(self, z: Tensor, indices: Tensor) -> Tensor:
        """Teacher-forced logits: z [M, cond_dim], indices [M, T] int64 -> [M, T, K].

        Channel i's logits depend only on the indices of channels before it in `order`.
        """
        cond = self.condition_proj(z)  # [M, D]
        *modulations, final = self._modulations(cond[:, None] + self.timesteps_embeddings)
        x = self._tokens(cond, indices[:, self.order])
        for block, modulation in zip(self.channel_blocks, modulations, strict=True):
            x = call(block, x, modulation, recompute=self.grad_checkpointing)
        x = self.channel_final(self.channel_norm(x), final)  # [M, T, D]
        weight = torch.stack([head.weight for head in self.channel_heads])  # [T, K, D]
        bias = torch.stack([head.bias for head in self.channel_heads])
        logits = torch.baddbmm(bias[:, None], x.transpose(0, 1), weight.transpose(1, 2))
        return logits[self.inverse_order].transpose(0, 1)

    def _tokens(self, cond: Tensor, indices: Tensor) -> Tensor:
        """Indices [M, T] -> the inputs of all channels [M, T, D]; both in head order."""
        inputs = [cond[:, None]]
        if len(self.token_embeddings) > 0:
            table = torch.cat([embedding.weight for embedding in self.token_embeddings])
            first = torch.arange(len(self.token_embeddings), device=cond.device) * self.levels
            inputs.append(F.embedding(indices[:, :-1] + first, table))  # [M, T - 1, D]
        return torch.cat(inputs, dim=1) + self.channel_embed

    def _modulations(self, c: Tensor) -> list[Tensor]:
        """c: [..., D] -> [..., 6 D] for every block, [..., 2 D] for the final norm."""
        c = F.silu(c)
        return [p.adaLN_modulation[1](c) for p in (*self.channel_blocks, self.channel_final)]

    def _pieces(self, z: Tensor) -> int:
        """The number of chunks to work in."""
        chunk = self.chunk
        if chunk is None:
            rows = CHUNK_ROWS.get(z.device.type, CHUNK_ROWS_ELSEWHERE)
            rows *= 1 if torch.is_grad_enabled() else 4  # then most of the memory is not needed
            chunk = max(1, rows // len(self.order))
        return max(1, math.ceil(len(z) / chunk)) if chunk else 1

    @torch.no_grad()
    def sample(
        self, z: Tensor, uniforms: Tensor, temperature: float = 1.0, head_input: str = "trained"
    ) -> tuple[Tensor, Tensor]:
        """Draw the T channels of each position, one after the other: indices, log-probabilities.

        z: [M, cond_dim]. uniforms: [M, T] in [0, 1), one for each draw.
        temperature: 0 takes the most likely level, and gives log-probabilities of temperature 1.
        head_input: "trained" feeds the condition at the first channel, as training does;
        "published" feeds condition + first timestep embedding, as the published sampler does
        and as the published FIDs were measured.
        """
        parts = split(self._pieces(z), z, uniforms)
        drawn = [self._sample(*part, temperature, head_input) for part in parts]
        indices, log_probs = (torch.cat(x) for x in zip(*drawn, strict=True))
        return indices, log_probs

    def _sample(
        self, z: Tensor, uniforms: Tensor, temperature: float, head_input: str
    ) -> tuple[Tensor, Tensor]:
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


def inverse_cdf(logits: Tensor, uniforms: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Draws of softmax(logits / temperature), and their log-probabilities.

    logits: [M, K], uniforms: [M] in [0, 1) -> [M] int64 and [M] float32.
    """
    logits = logits.float()
    below = logits - logits.amax(dim=-1, keepdim=True)  # at most 0: no temperature is too low
    log_probs = (below / (temperature or 1)).log_softmax(dim=-1)
    if temperature == 0:
        drawn = log_probs.argmax(dim=-1)
    else:
        cdf = log_probs.exp().cumsum(dim=-1)
        # The sum of K rounded probabilities is not exactly 1: scale the draw to what it is.
        drawn = (cdf <= uniforms[:, None] * cdf[:, -1:]).sum(dim=-1)
        drawn = drawn.clamp(max=logits.shape[-1] - 1)
    return drawn, log_probs.gather(-1, drawn[:, None])[:, 0]
