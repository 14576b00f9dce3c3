"""The mean of a loss over many rows, in memory that does not grow with their number.

The rows go through the head in chunks, each forward and backward at once, so that what one keeps
for its backward is freed before the next begins. What stays are the gradients of z and of the
parameters, which autograd's later backward only multiplies by the gradient that comes from above.
Letters: M rows, T predictions of each, D width.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call


def split(pieces: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The rows of all tensors in pieces of about equal size."""
    return zip(*(tensor.tensor_split(pieces) for tensor in tensors), strict=True)


def chunked_mean(
    head: nn.Module, rows: tuple[Tensor, ...], pieces: int, grad_scale: Tensor | float = 1.0
) -> Tensor:
    """head(*rows).mean(), the rows z [M, D], targets and noise; gradients can be taken once.

    grad_scale: of a gradient scaler; gradients are computed multiplied by it, or those in fp16
    would underflow.
    """
    if not torch.is_grad_enabled():
        parts = [head(*part) for part in split(pieces, *rows)]
        return sum(losses.sum() for losses in parts) / (len(rows[0]) * parts[0].shape[1])
    parameters = {name: p for name, p in head.named_parameters() if p.requires_grad}
    z, *others = rows
    how = head, list(parameters), pieces, others, grad_scale
    return _ChunkedMean.apply(how, z, *parameters.values())


class _ChunkedMean(torch.autograd.Function):
    """One operation on z and the parameters: hooks on them, DDP's too, run once, at the end.

    The chunks therefore work on leaves of their own: tensors that share the parameters' storage
    and gather the gradients of all chunks in their `.grad`.
    """

    @staticmethod
    def forward(ctx, how: tuple, z: Tensor, *parameters: nn.Parameter) -> Tensor:
        head, names, pieces, others, grad_scale = how
        leaves = [parameter.data.requires_grad_() for parameter in parameters]
        replaced = dict(zip(names, leaves, strict=True))
        total, z_gradients = 0.0, []
        # A chunk uses what it saves at once: hooks on what is kept for later are not for it.
        with torch.enable_grad(), saved_tensors_hooks(lambda x: x, lambda x: x):
            for rows, *targets in split(pieces, z.detach(), *others):
                rows = rows.requires_grad_()
                losses = functional_call(head, replaced, (rows, *targets))
                loss = losses.sum() / (len(z) * losses.shape[1])
                (loss * grad_scale).backward()
                z_gradients.append(rows.grad)
                total = total + loss.detach()
        ctx.gradients = torch.cat(z_gradients), [leaf.grad for leaf in leaves], grad_scale
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple:
        if ctx.gradients is None:
            raise RuntimeError("backward through a chunked loss a second time; it keeps nothing")
        (z_gradient, gradients, grad_scale), ctx.gradients = ctx.gradients, None
        factor = grad / grad_scale
        torch._foreach_mul_([gradient for gradient in gradients if gradient is not None], factor)
        return None, z_gradient * factor, *gradients
