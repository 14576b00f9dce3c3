"""Transformer blocks: the backbone's (pre-norm ViT) and the channel head's (adaLN-zero).

Letters: N sequences, T positions, R of them, D width, H heads, d = D / H.
Source: ViT, arXiv 2010.11929; MAR, arXiv 2406.11838 (backbone); DiT, arXiv 2212.09748 (adaLN-zero).
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from models.cpu import Dropout, attend, attend_causal

LayerNorm = partial(nn.LayerNorm, eps=1e-6)


def take(x: Tensor, positions: Tensor) -> Tensor:
    """x: [N, T, D], positions: [N, R] -> [N, R, D]: those positions of each sequence."""
    return x.gather(1, positions[..., None].expand(-1, -1, x.shape[-1]))


def call(block: Callable, *args, recompute: bool) -> Tensor:
    """block(*args); with `recompute` its activations are computed again in backward."""
    if recompute and torch.is_grad_enabled():
        return checkpoint(block, *args, use_reentrant=False)
    return block(*args)


def init_linear(module: nn.Module) -> None:
    """The published initialisation; layer norms are torch's."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)


def learned(*shape: int) -> nn.Parameter:
    """A parameter drawn from normal(0, 0.02)."""
    return nn.Parameter(torch.randn(*shape) * 0.02)


class KVCache(NamedTuple):
    """Keys and values [N, H, T, d] of all positions, for a pass that computes some of them.

    positions: [N or 1, R], those computed now. visible: bool, spread to [N, H, R, T], the keys that
    they attend to, None for all. No shape changes between passes: a compiled one is one graph.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor | None = None
    visible: Tensor | None = None

    @classmethod
    def empty(cls, x: Tensor, heads: int, length: int) -> "KVCache":
        """For sequences of T = length positions; x: [N, ..., D], what the keys are made from."""
        kind, shape = x.device.type, (len(x), heads, length, x.shape[-1] // heads)
        casts = kind != "meta" and torch.is_autocast_enabled(kind)
        dtype = torch.get_autocast_dtype(kind) if casts else x.dtype
        return cls(*(torch.zeros(shape, dtype=dtype, device=x.device) for _ in range(2)))

    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """k, v: [N, H, R, d] of the positions, kept from now on -> those of all positions."""
        rows = self.positions[:, None, :, None].expand_as(k)
        return self.keys.scatter_(2, rows, k), self.values.scatter_(2, rows, v)


def split_heads(x: Tensor, parts: int, heads: int) -> Tensor:
    """[N, T, parts * D] -> [parts, N, H, T, d]."""
    return x.unflatten(-1, (parts, heads, -1)).permute(2, 0, 3, 1, 4)


class Attention(nn.Module):
    """Multi-head self-attention. causal: to no later position, q and k normalised per head."""

    def __init__(self, width: int, heads: int, attn_drop=0.0, proj_drop=0.0, causal=False):
        super().__init__()
        self.heads, self.attn_drop, self.causal = heads, attn_drop, causal
        self.qkv = nn.Linear(width, 3 * width)
        norm = LayerNorm if causal else nn.Identity
        self.q_norm, self.k_norm = norm(width // heads), norm(width // heads)
        self.proj = nn.Linear(width, width)
        self.proj_drop = Dropout(proj_drop)

    def forward(
        self, x: Tensor, positions: Tensor | None = None, cache: KVCache | None = None
    ) -> Tensor:
        """x: [N, T, D], of the cache's positions if there is one -> [N, T, D], or [N, R, D]."""
        if positions is None:
            q, k, v = split_heads(self.qkv(x), 3, self.heads)  # [N, H, T, d]
        else:
            sizes = [x.shape[-1], 2 * x.shape[-1]]
            of_q, of_kv = zip(self.qkv.weight.split(sizes), self.qkv.bias.split(sizes), strict=True)
            (q,) = split_heads(F.linear(take(x, positions), *of_q), 1, self.heads)
            k, v = split_heads(F.linear(x, *of_kv), 2, self.heads)
        q, k, mask = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype), None
        if cache is not None:
            mask = cache.visible
            k, v = cache.update(k, v)
        if self.causal:
            out = attend_causal(q, k, v, mask)
        else:
            out = attend(q, k, v, mask, self.attn_drop if self.training else 0.0)
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))


class Mlp(nn.Module):
    """timm's, by its names, whose import takes two seconds."""

    def __init__(self, width: int, hidden: int, drop: float = 0.0):
        super().__init__()
        self.fc1, self.act = nn.Linear(width, hidden), nn.GELU()
        self.fc2, self.drop = nn.Linear(hidden, width), Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))


class Block(nn.Module):
    """The backbone's pre-norm block; arguments of forward as those of `Attention`."""

    def __init__(
        self, width: int, heads: int, mlp_ratio: float, attn_drop: float, proj_drop: float
    ):
        super().__init__()
        self.norm1 = LayerNorm(width)
        self.attn = Attention(width, heads, attn_drop, proj_drop)
        self.norm2 = LayerNorm(width)
        self.mlp = Mlp(width, int(width * mlp_ratio), proj_drop)

    def forward(
        self, x: Tensor, positions: Tensor | None = None, cache: KVCache | None = None
    ) -> Tensor:
        attended = self.attn(self.norm1(x), positions, cache)
        x = (x if positions is None else take(x, positions)) + attended
        return x + self.mlp(self.norm2(x))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale) + shift


class AdaLNBlock(nn.Module):
    """Causal attention and MLP, each shifted, scaled and gated by `adaLN_modulation` of z."""

    def __init__(self, width: int, heads: int, mlp_ratio: float):
        super().__init__()
        self.norm1 = LayerNorm(width)
        self.attn = Attention(width, heads, causal=True)
        self.norm2 = LayerNorm(width)
        self.mlp = Mlp(width, int(width * mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, modulations: Tensor, cache: KVCache | None = None) -> Tensor:
        """x: [N, T, D], modulations: [N, T, 6 D] -> [N, T, D]."""
        shift1, scale1, gate1, shift2, scale2, gate2 = modulations.chunk(6, dim=-1)
        x = x + gate1 * self.attn(modulate(self.norm1(x), shift1, scale1), cache=cache)
        return x + gate2 * self.mlp(modulate(self.norm2(x), shift2, scale2))


class AdaLNMLP(nn.Module):
    """An MLP around which x is added, shifted, scaled and gated by `adaLN_modulation` of y."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.in_ln = LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, width))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 3 * width))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """x, y: [N, D] -> [N, D]."""
        shift, scale, gate = self.adaLN_modulation(y).chunk(3, dim=-1)
        return x + gate * self.mlp(modulate(self.in_ln(x), shift, scale))


class AdaLNLinear(nn.Module):
    """Norm without weights of its own, modulated, and a linear layer that is zero at first."""

    def __init__(self, width: int, outputs: int):
        super().__init__()
        self.norm_final = LayerNorm(width, elementwise_affine=False)
        self.linear = nn.Linear(width, outputs)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """x, y: [N, D] -> [N, outputs]."""
        shift, scale = self.adaLN_modulation(y).chunk(2, dim=-1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class FinalNorm(nn.Module):
    """A norm without weights of its own, modulated."""

    def __init__(self, width: int):
        super().__init__()
        self.norm_final = LayerNorm(width, elementwise_affine=False)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, modulations: Tensor) -> Tensor:
        """x: [N, T, D], modulations: [N, T, 2 D] -> [N, T, D]."""
        scale, shift = modulations.chunk(2, dim=-1)
        return modulate(self.norm_final(x), shift, scale)
