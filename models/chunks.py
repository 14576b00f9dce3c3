"""The mean cross-entropy of many rows, in memory that does not grow with their number.

A chunk's forward and backward run at once, within forward: what they saved is free before the next
chunk begins, nothing is computed twice, and what is kept for the backward pass of everything
before is the gradient of the rows and of the parameters, which are then handed back.
Autograd sees one operation of these parameters, so that hooks on them (DDP's among them) run once,
and when they should.
Letters: M rows, T predictions of each, K classes.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call
from torch.nn import functional as F


def cross_entropies(logits: Tensor, targets: Tensor) -> Tensor:
    """logits: [..., K], targets: [...] int64 -> [...] float32, in nats."""
    losses = F.cross_entropy(logits.flatten(0, -2).float(), targets.flatten(), reduction="none")
    return losses.view_as(targets)


def chunked_loss(
    module: nn.Module,
    z: Tensor,
    targets: Tensor,
    pieces: int,
    grad_scale: Tensor | float = 1.0,
) -> Tensor:
    """The mean cross-entropy of module(z, targets), computed in pieces of about equal size.

    module: of z [m, ...] and targets [m, T] -> logits [m, T, K], each row on its own.
    grad_scale: what the gradients are multiplied by while they are computed, and divided by
    afterwards: that of a gradient scaler, without which those in fp16 would underflow.
    """
    if not torch.is_grad_enabled():
        parts = _split(pieces, z, targets)
        return (
            sum(cross_entropies(module(*part), part[1]).sum() for part in parts) / targets.numel()
        )
    wanted = {name: p for name, p in module.named_parameters() if p.requires_grad}
    return _ChunkedLoss.apply(
        module, list(wanted), pieces, grad_scale, z, targets, *wanted.values()
    )


def _split(pieces: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    return zip(*(tensor.tensor_split(pieces) for tensor in tensors), strict=True)


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, module, names, pieces, grad_scale, z, targets, *parameters):
        # Tensors of the same storage: hooks on the parameters are for the whole gradient.
        aliases = [parameter.data.requires_grad_() for parameter in parameters]
        own = dict(zip(names, aliases, strict=True))
        total, z_gradients = 0.0, []
        # What a chunk saves is used at once: hooks from outside, which move to another place or
        # count what is kept for a later backward, are not for it.
        with torch.enable_grad(), saved_tensors_hooks(_unchanged, _unchanged):
            for part, part_targets in _split(pieces, z.detach(), targets):
                part = part.requires_grad_()
                logits = functional_call(module, own, (part, part_targets))
                loss = cross_entropies(logits, part_targets).sum() / targets.numel()
                (loss * grad_scale).backward()  # sums the parameters' gradients in their aliases
                z_gradients.append(part.grad)
                total = total + loss.detach()
        gradients = [alias.grad for alias in aliases]
        ctx.kept = torch.cat(z_gradients), gradients, grad_scale
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        if ctx.kept is None:
            raise RuntimeError("backward through a chunked loss a second time; it keeps nothing")
        z_gradient, gradients, grad_scale = ctx.kept
        ctx.kept = None
        factor = grad / grad_scale
        torch._foreach_mul_(gradients, factor)
        return None, None, None, None, z_gradient * factor, None, *gradients


def _unchanged(tensor: Tensor) -> Tensor:
    return tensor
