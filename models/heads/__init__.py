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

`loss` and `losses` work in chunks of `head.chunk` rows (models/chunks.py) unless that is 0.
channel is the paper's; parallel and masked (masked.py), mixture (mixture.py), diffusion
(diffusion.py) and codebook (codebook.py) are what it is compared with.
"""

import math

import torch
from torch import Tensor, nn

from models.chunks import chunked_mean, split

# Rows (positions x `rows_each`) worked on at once: enough to keep the device busy.
CHUNK_ROWS = {"cpu": 1024}
CHUNK_ROWS_ELSEWHERE = 16384


class Head(nn.Module):
    """draws: uniform numbers that a position is sampled from. rows_each: rows of arithmetic that it
    takes. guides: whether guidance acts inside `sample`, not on z.

    chunk: positions worked on at once; None is chosen by the device, 0 is all of them in one graph.
    grad_checkpointing: recompute blocks in backward.
    """

    guides = False

    def __init__(self, draws: int, rows_each: int = 1):
        super().__init__()
        self.draws, self.rows_each = draws, rows_each
        self.chunk: int | None = None
        self.grad_checkpointing = False

    def noise(self, targets: Tensor) -> tuple[Tensor, ...]:
        """What `forward` needs that is random."""
        return ()

    def loss(self, z: Tensor, targets: Tensor, grad_scale: Tensor | float = 1.0) -> Tensor:
        """The mean of all losses; in chunks (`chunked_mean`) unless chunk is 0."""
        rows = z, targets, *self.noise(targets)
        if self.chunk == 0:
            return self(*rows).mean()
        return chunked_mean(self, rows, self._pieces(z), grad_scale)

    def losses(self, z: Tensor, targets: Tensor) -> Tensor:
        """As `forward`, in chunks, for validation; training takes `loss`."""
        rows = z, targets, *self.noise(targets)
        return torch.cat([self(*part) for part in split(self._pieces(z), *rows)])

    @torch.no_grad()
    def sample(
        self, z: Tensor, uniforms: Tensor, temperature: float = 1.0, **how
    ) -> tuple[Tensor, Tensor]:
        """In chunks; `how` is the head's own."""
        parts = split(self._pieces(z), z, uniforms)
        drawn = [self._sample(*part, temperature, **how) for part in parts]
        values, log_probs = (torch.cat(x) for x in zip(*drawn, strict=True))
        return values, log_probs

    def _pieces(self, z: Tensor) -> int:
        """The number of chunks to work in."""
        chunk = self.chunk
        if chunk is None:
            rows = CHUNK_ROWS.get(z.device.type, CHUNK_ROWS_ELSEWHERE)
            rows *= 1 if torch.is_grad_enabled() else 4  # then most of the memory is not needed
            chunk = max(1, rows // self.rows_each)
        return max(1, math.ceil(len(z) / chunk)) if chunk else 1


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
