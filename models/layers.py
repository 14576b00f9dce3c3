"""Transformer blocks: the backbone's (pre-norm ViT) and the channel head's (adaLN-zero).

Letters: N sequences, T positions, R of them wanted, D width, H heads, d = D / H.
Source: ViT, arXiv 2010.11929; MAR, arXiv 2406.11838 (backbone); DiT, arXiv 2212.09748 (adaLN-zero).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from timm.layers import Mlp
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

LayerNorm = partial(nn.LayerNorm, eps=1e-6)


def take(x: Tensor, positions: Tensor) -> Tensor:
    """x: [N, T, D], positions: [N, R] -> [N, R, D]: those positions of each sequence."""
    return x.gather(1, positions[..., None].expand(-1, -1, x.shape[-1]))


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


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, p: float) -> Tensor:
        words = torch.empty((x.numel() + 1) // 2, dtype=torch.int64).random_(-(2**63), None)
        uniform = words.view(torch.int32)[: x.numel()].view(x.shape)
        keep = torch.empty_like(x, memory_format=torch.contiguous_format)
        torch.ge(uniform, round((p - 0.5) * 2**32), out=keep)
        ctx.save_for_backward(keep)
        ctx.scale = 1 / (1 - p)
        return (x * keep).mul_(ctx.scale)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return (grad * ctx.saved_tensors[0]).mul_(ctx.scale), None


def dropout(x: Tensor, p: float) -> Tensor:
    """Zeroes each element with probability p in [0, 1], and scales the others by 1 / (1 - p).

    On a CPU through 32 random bits an element: torch draws a double for each, which took longer
    than the matrix products around it.
    """
    if not 0 < p < 0.999 or x.device.type != "cpu" or torch.compiler.is_compiling():
        return F.dropout(x, p)  # which also refuses what is no probability
    return _Dropout.apply(x, p)


class Dropout(nn.Dropout):
    """`dropout` in training."""

    def forward(self, x: Tensor) -> Tensor:
        return dropout(x, self.p) if self.training else x


def modulation(width: int, chunks: int) -> nn.Sequential:
    """SiLU -> Linear(D -> chunks * D); the head makes the linear zero after its initialisation."""
    return nn.Sequential(nn.SiLU(), nn.Linear(width, chunks * width))


class KVCache:
    """Keys and values of up to T positions [N, H, T, d], of which those so far are seen.

    The place of the next one is a tensor and no shape changes from one to the next, so that a
    compiled step is the same graph for all.
    """

    def __init__(self, like: Tensor, heads: int, length: int):
        """like: [N, D], of the dtype and on the device that keys and values will have."""
        n, width = like.shape
        self.keys = like.new_zeros(n, heads, length, width // heads)
        self.values = torch.zeros_like(self.keys)
        self.places = torch.arange(length, device=like.device)

    def at(self, i: int) -> "Past":
        """The place of position i: what a step at that position is given."""
        return self.keys, self.values, self.places[i : i + 1], self.places <= i


# Keys and values [N, H, T, d], the next position [1], and which ones are seen then [T].
Past = tuple[Tensor, Tensor, Tensor, Tensor]


class Attention(nn.Module):
    """Multi-head self-attention of the backbone: every position sees all."""

    def __init__(self, width: int, heads: int, attn_drop: float = 0.0, proj_drop: float = 0.0):
        super().__init__()
        self.heads, self.attn_drop = heads, attn_drop
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.proj_drop = Dropout(proj_drop)

    def forward(
        self, x: Tensor, wanted: Tensor | None = None, kept: "Kept | None" = None
    ) -> Tensor:
        """x: [N, T, D] -> [N, T, D], or, with wanted [N, R], only those positions [N, R, D].

        With `kept`, x is of some positions only, and sees all that were ever kept.
        """
        if wanted is None:
            q, k, v = split_heads(self.qkv(x), 3, self.heads)
        else:
            width = x.shape[-1]
            weights = self.qkv.weight.split([width, 2 * width])
            biases = self.qkv.bias.split([width, 2 * width])
            (q,) = split_heads(F.linear(take(x, wanted), weights[0], biases[0]), 1, self.heads)
            k, v = split_heads(F.linear(x, weights[1], biases[1]), 2, self.heads)
        if kept is not None:
            k, v = kept.replace(k, v)
        drop = self.attn_drop if self.training else 0.0
        mask = kept.seen if kept is not None else None
        plain = _plain_is_faster(q, drop)  # and would keep the weights of all pairs
        attend = plain_attention if plain else F.scaled_dot_product_attention
        out = call(attend, q, k, v, mask, drop, recompute=plain)
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))


@dataclass(frozen=True)
class Kept:
    """Keys and values [N, H, T, d] of earlier passes, to be renewed at some rows by this one.

    rows: [N, R]. seen: [N, 1, 1, T] bool, true where there is a position; None is everywhere.
    """

    keys: Tensor
    values: Tensor
    rows: Tensor
    seen: Tensor | None = None

    def replace(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """k, v: [N, H, R, d] of the rows -> those of all positions."""
        rows = self.rows[:, None, :, None].expand_as(k)
        self.keys.scatter_(2, rows, k)
        self.values.scatter_(2, rows, v)
        return self.keys, self.values


def split_heads(x: Tensor, parts: int, heads: int) -> Tensor:
    """[N, T, parts * D] -> [parts, N, H, T, d]."""
    return x.unflatten(-1, (parts, heads, -1)).permute(2, 0, 3, 1, 4)


class Block(nn.Module):
    """The backbone's pre-norm block."""

    def __init__(
        self, width: int, heads: int, mlp_ratio: float, attn_drop: float, proj_drop: float
    ):
        super().__init__()
        self.norm1 = LayerNorm(width)
        self.attn = Attention(width, heads, attn_drop, proj_drop)
        self.norm2 = LayerNorm(width)
        self.mlp = Mlp(width, int(width * mlp_ratio))
        self.mlp.drop1 = self.mlp.drop2 = Dropout(proj_drop)

    def forward(self, x: Tensor, wanted: Tensor | None = None, kept: Kept | None = None) -> Tensor:
        """x: [N, T, D] -> [N, T, D], or, with wanted [N, R], only those positions [N, R, D].

        With `kept`, x is of some positions only, and sees all that were ever kept.
        """
        attended = self.attn(self.norm1(x), wanted, kept)
        x = (x if wanted is None else take(x, wanted)) + attended
        return x + self.mlp(self.norm2(x))


def _plain_is_faster(q: Tensor, drop: float) -> bool:
    """Whether a CPU attends faster by the definition than by its fused kernel.

    That one has no dropout, and takes twice as long in half precision for 320 positions.
    """
    if q.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    short = q.dtype != torch.float32 and q.shape[2] <= 512
    return drop > 0 or (short and not torch.is_grad_enabled())


def plain_attention(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, drop: float) -> Tensor:
    """Attention by its definition: q, k, v [N, H, T, d]. seen: bool, spread to [N, H, T, T]."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if seen is not None:
        scores = scores.masked_fill(~seen, -torch.inf)
    return dropout(scores.softmax(dim=-1).to(v.dtype), drop) @ v


def short_attention(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None) -> Tensor:
    """Attention of few positions: q, k, v [N, H, T, d].

    seen: [T] bool, the keys to attend to; None is those up to each position.
    On a CPU by its definition: the fused kernel, made for long sequences, takes 1.5 times as long
    in fp32 and 6 times in bf16, forward and backward, for 16 positions.
    """
    if q.device.type != "cpu":
        mask = None if seen is None else seen[None]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=seen is None)
    if seen is None:
        seen = torch.ones(k.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
    return plain_attention(q, k, v, seen, drop=0.0)


class CausalAttention(nn.Module):
    """Multi-head attention in which no position sees a later one; q and k normalised per head."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = LayerNorm(width // heads)
        self.k_norm = LayerNorm(width // heads)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, past: Past | None = None) -> Tensor:
        """x: [N, T, D]; with a past T = 1, the position that follows."""
        q, k, v = split_heads(self.qkv(x), 3, self.heads)  # [N, H, T, d] each
        q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
        seen = None
        if past is not None:
            keys, values, place, seen = past
            k, v = keys.index_copy_(2, place, k), values.index_copy_(2, place, v)
        out = short_attention(q, k, v, seen)
        return self.proj(out.transpose(1, 2).flatten(2))


class AdaLNBlock(nn.Module):
    """Causal attention and MLP, each shifted, scaled and gated by a modulation.

    The modulation is this block's `adaLN_modulation` of the condition; whoever calls computes it,
    for all blocks together (see `modulations_of`).
    """

    chunks = 6

    def __init__(self, width: int, heads: int, mlp_ratio: float):
        super().__init__()
        self.norm1 = LayerNorm(width)
        self.attn = CausalAttention(width, heads)
        self.norm2 = LayerNorm(width)
        self.mlp = Mlp(width, int(width * mlp_ratio))
        self.adaLN_modulation = modulation(width, self.chunks)

    def forward(self, x: Tensor, modulations: Tensor, past: Past | None = None) -> Tensor:
        """x: [N, T, D], modulations: [N, T, 6 D] -> [N, T, D]."""
        shift1, scale1, gate1, shift2, scale2, gate2 = modulations.chunk(self.chunks, dim=-1)
        x = x + gate1 * self.attn(modulate(self.norm1(x), shift1, scale1), past)
        return x + gate2 * self.mlp(modulate(self.norm2(x), shift2, scale2))


class FinalNorm(nn.Module):
    """A norm without weights of its own, modulated; chunks scale, then shift."""

    chunks = 2

    def __init__(self, width: int):
        super().__init__()
        self.norm_final = LayerNorm(width, elementwise_affine=False)
        self.adaLN_modulation = modulation(width, self.chunks)

    def forward(self, x: Tensor, modulations: Tensor) -> Tensor:
        """x: [N, T, D], modulations: [N, T, 2 D] -> [N, T, D]."""
        scale, shift = modulations.chunk(self.chunks, dim=-1)
        return modulate(self.norm_final(x), shift, scale)


def modulations_of(c: Tensor, parts: Sequence[AdaLNBlock | FinalNorm]) -> list[Tensor]:
    """The modulations of all parts [..., chunks * D] from the condition c [..., D].

    One product a part: one for all saves nothing, and their weights would have to be put together.
    """
    activated = F.silu(c)
    return [part.adaLN_modulation[1](activated) for part in parts]
