"""Transformer blocks: the backbone's (timm's ViT block) and the channel head's (adaLN-zero).

Letters: N sequences, T positions, D width, H heads, d = D / H.
Source: DiT, arXiv 2212.09748 (adaLN-zero); MAR, arXiv 2406.11838 (backbone).
"""

from collections.abc import Callable
from functools import partial

import torch
from timm.layers import Mlp
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

LayerNorm = partial(nn.LayerNorm, eps=1e-6)


def vit_block(width: int, heads: int, mlp_ratio: float, attn_drop: float, proj_drop: float):
    """timm's pre-norm block, [N, T, D] -> [N, T, D]."""
    return Block(
        width,
        heads,
        mlp_ratio=mlp_ratio,
        qkv_bias=True,
        norm_layer=LayerNorm,
        attn_drop=attn_drop,
        proj_drop=proj_drop,
    )


def call(block: Callable, *args, recompute: bool) -> Tensor:
    """block(*args); with `recompute` its activations are not kept but computed again in backward.

    The random state is restored for the second computation, so dropout draws the same masks.
    """
    if recompute and torch.is_grad_enabled():
        return checkpoint(block, *args, use_reentrant=False)
    return block(*args)


def init_linear(module: nn.Module) -> None:
    """The published initialisation of linear layers and layer norms."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm) and module.elementwise_affine:
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)


def learned(*shape: int) -> nn.Parameter:
    """A parameter drawn from normal(0, 0.02)."""
    return nn.Parameter(torch.randn(*shape) * 0.02)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale) + shift


def modulation(width: int, chunks: int) -> nn.Sequential:
    """SiLU -> Linear(D -> chunks * D); the head makes the linear zero after its initialisation."""
    return nn.Sequential(nn.SiLU(), nn.Linear(width, chunks * width))


class KVCache:
    """Keys and values of the positions seen so far, in buffers allocated once: [N, H, T, d]."""

    def __init__(self, length: int):
        self.length, self.filled = length, 0
        self.keys = self.values = None

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """k, v: [N, H, 1, d] of the next position -> all so far, [N, H, t, d]."""
        if self.keys is None:
            n, heads, _, d = k.shape
            self.keys = k.new_empty(n, heads, self.length, d)
            self.values = v.new_empty(n, heads, self.length, d)
        self.keys[:, :, self.filled] = k[:, :, 0]
        self.values[:, :, self.filled] = v[:, :, 0]
        self.filled += 1
        return self.keys[:, :, : self.filled], self.values[:, :, : self.filled]


class CausalAttention(nn.Module):
    """Multi-head attention in which no position sees a later one; q and k normalised per head."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = LayerNorm(width // heads)
        self.k_norm = LayerNorm(width // heads)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, cache: KVCache | None = None) -> Tensor:
        """x: [N, T, D]; with a cache T = 1, the position after those the cache holds."""
        n, t, d = x.shape
        qkv = self.qkv(x).reshape(n, t, 3, self.heads, d // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # 3 x [N, H, T, d]
        q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
        if cache is not None:
            k, v = cache.append(k, v)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=cache is None)
        return self.proj(out.transpose(1, 2).reshape(n, t, d))


class AdaLNBlock(nn.Module):
    """Causal attention and MLP, each shifted, scaled and gated by the condition."""

    def __init__(self, width: int, heads: int, mlp_ratio: float):
        super().__init__()
        self.norm1 = LayerNorm(width)
        self.attn = CausalAttention(width, heads)
        self.norm2 = LayerNorm(width)
        self.mlp = Mlp(width, int(width * mlp_ratio))
        self.adaLN_modulation = modulation(width, 6)

    def forward(self, x: Tensor, c: Tensor, cache: KVCache | None = None) -> Tensor:
        """x, c: [N, T, D] -> [N, T, D]."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=-1)
        x = x + gate1 * self.attn(modulate(self.norm1(x), shift1, scale1), cache)
        return x + gate2 * self.mlp(modulate(self.norm2(x), shift2, scale2))


class FinalNorm(nn.Module):
    """A norm without weights of its own, modulated by the condition; chunks scale, then shift."""

    def __init__(self, width: int):
        super().__init__()
        self.norm_final = LayerNorm(width, elementwise_affine=False)
        self.adaLN_modulation = modulation(width, 2)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """x, c: [N, T, D] -> [N, T, D]."""
        scale, shift = self.adaLN_modulation(c).chunk(2, dim=-1)
        return modulate(self.norm_final(x), shift, scale)
