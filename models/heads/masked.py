"""Masked head: the channels of a position are masked and filled in a few steps; and parallel, all
of them at once.

A position is one token: the embeddings of its channels, of which masked ones have an entry of
their own, are put together and added to z; an MLP without attention predicts all channels.
training: mask ratio 1 - sigmoid(0.8 n), n ~ N(0, 1) for each position; cross-entropy of masked
channels, and a tenth of that of visible ones
sampling: every step draws all masked channels and keeps those that were drawn most certainly
Letters: M positions, T channels of a token, K levels, D width, S steps.
Source: the masked-bit head of BAR, arXiv 2602.09024; the parallel head is an ablation of
arXiv 2503.16430.
"""

from itertools import accumulate

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.config import TokenBridgeConfig
from models.heads import Head, inverse_cdf
from models.layers import AdaLNLinear, AdaLNMLP, call, init_linear

DEPTH = 3
VISIBLE_WEIGHT = 0.1  # of the loss of a visible channel
RATIO_SCALE = 0.8
PUBLISHED_STEPS = {(4, 16): (2, 2, 5, 7)}  # of S steps for T channels


def step_sizes(steps: int | tuple[int, ...], channels: int) -> tuple[int, ...]:
    """How many channels each step fills: as given, as published, or about equally many."""
    if isinstance(steps, tuple):
        return steps
    if (steps, channels) in PUBLISHED_STEPS:
        return PUBLISHED_STEPS[steps, channels]
    ends = [round(channels * s / steps) for s in range(steps + 1)]
    return tuple(b - a for a, b in zip(ends, ends[1:], strict=False) if b > a)


class MaskedHead(Head):
    """See models/heads/__init__.py for what it is given and returns."""

    def __init__(self, config: TokenBridgeConfig):
        channels, width = config.token_dim, config.channel_embed_dim
        self.sizes = step_sizes(config.head_steps or 1, channels)
        super().__init__(len(self.sizes) * channels)
        self.channels, self.levels = channels, config.quant_levels
        part = max(1, width // channels)
        self.embeddings = nn.Embedding(channels * (self.levels + 1), part)  # level K is the mask's
        self.token_proj = nn.Linear(channels * part, width)
        self.condition_proj = nn.Linear(config.decoder_embed_dim, width)
        self.ratio_embed = nn.Sequential(nn.Linear(1, width), nn.SiLU(), nn.Linear(width, width))
        hidden = int(width * config.mlp_ratio)
        self.blocks = nn.ModuleList(AdaLNMLP(width, hidden) for _ in range(DEPTH))
        self.final_layer = AdaLNLinear(width, channels * self.levels)
        self.apply(init_linear)
        nn.init.normal_(self.embeddings.weight, std=0.02)
        for block in (*self.blocks, self.final_layer):  # adaLN-zero
            nn.init.zeros_(block.adaLN_modulation[1].weight)

    def noise(self, targets: Tensor) -> tuple[Tensor]:
        """Which channels are masked, bool [M, T]: a random set of at least one."""
        ratio = 1 - torch.sigmoid(RATIO_SCALE * torch.randn(len(targets), 1, device=targets.device))
        count = (ratio * self.channels).ceil()
        order = torch.rand(targets.shape, device=targets.device).argsort(dim=1).argsort(dim=1)
        return (order < count,)

    def forward(self, z: Tensor, targets: Tensor, masked: Tensor) -> Tensor:
        """z [M, cond_dim], targets [M, T], masked bool [M, T] -> weighted losses [M, T]."""
        logits = self.logits(z, targets, masked).float()
        losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        return losses.view_as(targets) * torch.where(masked, 1.0, VISIBLE_WEIGHT)

    def logits(self, z: Tensor, indices: Tensor, masked: Tensor) -> Tensor:
        """Logits of all channels [M, T, K], given those that are not masked."""
        entries = torch.where(masked, self.levels, indices)
        first = torch.arange(self.channels, device=z.device) * (self.levels + 1)
        token = self.embeddings(entries + first).flatten(1)  # [M, T * part]
        cond = self.condition_proj(z)
        ratio = masked.float().mean(dim=1, keepdim=True)
        x, y = cond + self.token_proj(token), cond + self.ratio_embed(ratio)
        for block in self.blocks:
            x = call(block, x, y, recompute=self.grad_checkpointing)
        return self.final_layer(x, y).unflatten(1, (self.channels, self.levels))

    def sample_rows(self, z: Tensor, uniforms: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """uniforms: [M, S T], of the channels in each step."""
        masked = torch.ones(len(z), self.channels, dtype=torch.bool, device=z.device)
        indices = torch.zeros_like(masked, dtype=torch.int64)
        log_probs = torch.zeros(masked.shape, device=z.device)
        draws = uniforms.unflatten(1, (len(self.sizes), self.channels)).unbind(dim=1)
        for end, uniform in zip(accumulate(self.sizes), draws, strict=True):
            drawn, sure = inverse_cdf(self.logits(z, indices, masked), uniform, temperature)
            indices = torch.where(masked, drawn, indices)
            log_probs = torch.where(masked, sure, log_probs)
            # Those filled before come first, then the most certain; ties by channel.
            certain = log_probs.masked_fill(~masked, torch.inf)
            ranks = certain.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
            masked = masked & (ranks >= end)
        return indices, log_probs


class ParallelHead(MaskedHead):
    """All channels at once, independent given z: the same network with everything masked."""

    def noise(self, targets: Tensor) -> tuple[Tensor]:
        return (torch.ones_like(targets, dtype=torch.bool),)
