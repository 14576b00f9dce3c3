"""What a CPU computes in another way, because torch's own is slow there; on a GPU, skip this file:
`Dropout` is nn.Dropout, `attend` and `attend_causal` are F.scaled_dot_product_attention.

Dropout takes 32 random bits an element: torch's double took longer than the matrix products around
it. Attention goes by its definition where the fused kernel has no dropout, and for the 16 positions
of the channel head, for which the kernel takes 1.5 times as long in fp32, 6 times in bf16.
Letters: N sequences, H heads, R queries, T keys, d width of a head.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, drop: float) -> Tensor:
    """q: [N, H, R, d], k, v: [N, H, T, d], mask: bool, spread to [N, H, R, T] -> [N, H, R, d]."""
    if q.device.type != "cpu" or torch.compiler.is_compiling() or drop == 0:
        return F.scaled_dot_product_attention(q, k, v, mask, drop)
    # Recomputed in backward, which would else keep the weights of all pairs of positions.
    return checkpoint(_by_definition, q, k, v, mask, drop, use_reentrant=False)


def attend_causal(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """The same for few positions; without a mask, each attends to those up to itself."""
    if q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None)
    if mask is None:
        mask = torch.ones(k.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
    return _by_definition(q, k, v, mask, 0.0)


def _by_definition(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, drop: float) -> Tensor:
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return dropout(scores.softmax(dim=-1).to(v.dtype), drop) @ v


class Dropout(nn.Dropout):
    def forward(self, x: Tensor) -> Tensor:
        return dropout(x, self.p) if self.training else x


def dropout(x: Tensor, p: float) -> Tensor:
    """Zeroes each element with probability p in [0, 1], and scales the others by 1 / (1 - p)."""
    if not 0 < p < 0.999 or x.device.type != "cpu" or torch.compiler.is_compiling():
        return F.dropout(x, p)  # which also refuses what is no probability
    return _Dropout.apply(x, p)


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
