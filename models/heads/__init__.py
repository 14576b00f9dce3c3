"""Heads: from the condition z of a position to the C*p*p scalars of its token.

A head is built from a `TokenBridgeConfig`, knows nothing of the grid and the mask, and takes every
row (position) on its own, so that rows can be split and joined. In and out, scalars are in natural
order; an order of prediction is the head's own business. All that is random is given to it.

    head(z, targets, *noise) -> losses
        z        [M, D]   float, conditions of M positions
        targets  [M, T]   the levels to predict, int64, or continuous scalars, float32
        noise    of `head.noise(targets)`: tensors [M, ...], drawn from torch's generators; often ()
        losses   [M, T'], float32, in nats; their mean is what is minimised. T' is T or 1.

    head.sample(z, uniforms, temperature) -> values, log_probs
        z         as above; [M, 2, D] with guidance=g where `head.guides`: conditional and not
        uniforms  [M, head.draws]  in [0, 1), all that is random about the draws
        values    [M, T]   as the targets
        log_probs [M, T']  in nats, with which they were drawn; zeros where they are not known

A head is its `forward`, `noise` and `sample_rows`, which is `sample` of one chunk; `loss` (by
`ChunkedMean`), `losses` and `sample` work in chunks of `head.chunk` rows unless that is 0.
channel is the paper's; parallel and masked (masked.py), mixture (mixture.py), diffusion
(diffusion.py) and codebook (codebook.py) are what it is compared with.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call
from torch.nn import functional as F

# Rows (positions x `rows_each`) worked on at once: enough to keep the device busy.
CPU_ROWS, GPU_ROWS = 1024, 16384


class Head(nn.Module):
    """draws: uniform numbers that a position is sampled from. rows_each: rows of arithmetic that it
    takes. guides: whether guidance acts inside `sample`, not on z.

    chunk: positions worked on at once; None is chosen by the device, 0 is all of them in one graph.
    padded: fill up the last chunk of a loss if that is little: compiled blocks then know one size.
    grad_checkpointing: recompute blocks in backward.
    """

    guides = False

    def __init__(self, draws: int, rows_each: int = 1):
        super().__init__()
        self.draws, self.rows_each = draws, rows_each
        self.chunk: int | None = None
        self.padded = self.grad_checkpointing = False

    def noise(self, targets: Tensor) -> tuple[Tensor, ...]:
        """What `forward` needs that is random."""
        return ()

    def loss(self, z: Tensor, targets: Tensor, grad_scale: Tensor | float = 1.0) -> Tensor:
        """The mean of all losses; in chunks (`ChunkedMean`) unless chunk is 0.

        grad_scale: of a gradient scaler; gradients are computed multiplied by it, or those in fp16
        would underflow.
        """
        if self.chunk == 0 or not torch.is_grad_enabled():
            return self.losses(z, targets).mean()
        parameters = {name: p for name, p in self.named_parameters() if p.requires_grad}
        others = targets, *self.noise(targets)
        how = self, list(parameters), self._chunk(z), others, grad_scale
        return ChunkedMean.apply(how, z, *parameters.values())

    def losses(self, z: Tensor, targets: Tensor) -> Tensor:
        """As `forward`, in chunks; no memory is saved where gradients are wanted."""
        rows = z, targets, *self.noise(targets)
        return torch.cat([self(*part) for part in split(self._chunk(z), *rows)])

    @torch.no_grad()
    def sample(
        self, z: Tensor, uniforms: Tensor, temperature: float = 1.0, **how
    ) -> tuple[Tensor, Tensor]:
        """In chunks; `how` is the head's own."""
        parts = split(self._chunk(z), z, uniforms)
        drawn = [self.sample_rows(*part, temperature, **how) for part in parts]
        values, log_probs = (torch.cat(x) for x in zip(*drawn, strict=True))
        return values, log_probs

    def _chunk(self, z: Tensor) -> int:
        """The number of positions in a chunk."""
        if self.chunk is not None:
            return self.chunk or max(1, len(z))
        rows = CPU_ROWS if z.device.type == "cpu" else GPU_ROWS
        rows *= 1 if torch.is_grad_enabled() else 4  # then most of the memory is not needed
        return max(1, rows // self.rows_each)


def inverse_cdf(logits: Tensor, uniforms: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Draws of softmax(logits / temperature), and their log-probabilities.

    logits: [..., K], uniforms: [...] in [0, 1) -> [...] int64 and [...] float32.
    temperature: 0 takes the most likely, and gives log-probabilities of temperature 1.
    """
    logits = logits.float()
    below = logits - logits.amax(dim=-1, keepdim=True)  # at most 0: no temperature is too low
    log_probs = (below / (temperature or 1)).log_softmax(dim=-1)
    if temperature == 0:
        drawn = log_probs.argmax(dim=-1)
    else:
        cdf = log_probs.exp().cumsum(dim=-1)
        # The sum of K rounded probabilities is not exactly 1: scale the draw to what it is.
        drawn = (cdf <= uniforms[..., None] * cdf[..., -1:]).sum(dim=-1)
        drawn = drawn.clamp(max=logits.shape[-1] - 1)
    return drawn, log_probs.gather(-1, drawn[..., None])[..., 0]


def normals(uniforms: Tensor) -> Tensor:
    """Standard normal numbers of uniform ones in [0, 1), multiples of 2^-24 or finer."""
    return torch.special.ndtri(uniforms.clamp(2**-25, 1 - 2**-25))


# --- the loss in chunks


def split(chunk: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The rows of all tensors, so many at a time."""
    return zip(*(tensor.split(chunk) for tensor in tensors), strict=True)


class ChunkedMean(torch.autograd.Function):
    """head(*rows).mean() in memory that does not grow with the rows: z [M, D], targets, noise.

    Each chunk goes forward and backward at once, so that what it keeps for its backward is freed
    before the next begins. The gradients of z and of the parameters stay, which autograd's
    later backward only multiplies by the gradient from above; so they can be taken once.

    One operation on z and the parameters: hooks on them, DDP's too, run once, at the end.
    The chunks therefore work on leaves of their own: tensors that share the parameters' storage
    and gather the gradients of all chunks in their `.grad`.
    """

    @staticmethod
    def forward(ctx, how: tuple, z: Tensor, *parameters: nn.Parameter) -> Tensor:
        head, names, chunk, others, grad_scale = how
        leaves = [parameter.data.requires_grad_() for parameter in parameters]
        replaced = dict(zip(names, leaves, strict=True))
        total, z_gradients = 0.0, []
        # A chunk uses what it saves at once: hooks on what is kept for later are not for it.
        with torch.enable_grad(), saved_tensors_hooks(lambda x: x, lambda x: x):
            for rows, *targets in split(chunk, z.detach(), *others):
                rows, inputs = rows.requires_grad_(), (rows, *targets)
                more = chunk - len(rows)
                if head.padded and 0 < 8 * more <= len(z):  # zeros behind
                    inputs = tuple(F.pad(x, (0, 0) * (x.ndim - 1) + (0, more)) for x in inputs)
                losses = functional_call(head, replaced, inputs)[: len(rows)]
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
