"""Dimension-wise post-training quantizer: every latent scalar on its own, nothing learnt.

K levels of equal probability under N(0, 1): boundaries b_i = clamp(Phi^-1(i / K), -3, 3), levels
v_i = E[n | b_i < n < b_{i+1}]. A scalar x in [low, high] maps to n = (x - low)/(high - low)*6 - 3,
its index is the nearest v. The nearest level is found among the K - 1 midpoints by binary search,
O(log K) a scalar and no [..., K] tensor of distances.
Source: arXiv 2503.16430, post-training quantization.
"""

import math

import torch
from torch import Tensor, nn

# The codebook covers this many standard deviations to each side.
SPAN = 3.0


def gaussian_levels(levels: int) -> tuple[Tensor, Tensor]:
    """Boundaries [K + 1] and reconstruction values [K] of the N(0, 1) codebook, float32.

    The quantiles are exact to float32; the rest is float32 arithmetic in the published order,
    whose rounding the outer levels show. Made on the CPU whatever the default device is.
    """
    quantiles = torch.linspace(0, 1, levels + 1, dtype=torch.float64, device="cpu")
    boundaries = torch.special.ndtri(quantiles).float().clamp(-SPAN, SPAN)
    density = torch.exp(-boundaries.square() / 2) / math.sqrt(2 * math.pi)
    mass = (1 + torch.erf(boundaries / math.sqrt(2))) / 2
    values = (density[:-1] - density[1:]) / (mass[1:] - mass[:-1])
    return boundaries, values


class GaussianQuantizer(nn.Module):
    """levels: K. low, high: the latent range; what lies outside is clamped to it.

    Buffers of the published layout: boundaries [K + 1], reconstruction_values [K].
    Raises ValueError if K is not in [2, 512], or the range is empty: from 741 levels on, the outer
    boundaries coincide at three standard deviations and their levels are undefined.
    """

    boundaries: Tensor
    reconstruction_values: Tensor

    def __init__(self, levels: int = 64, low: float = -5.0, high: float = 5.0):
        super().__init__()
        if not 2 <= levels <= 512:
            raise ValueError(f"levels {levels} is not between 2 and 512 (1 to 9 bits)")
        if not low < high:
            raise ValueError(f"low {low} is not below high {high}")
        self.levels, self.low, self.high = levels, low, high
        boundaries, values = gaussian_levels(levels)
        self.register_buffer("reconstruction_values", values)
        self.register_buffer("boundaries", boundaries)

    @property
    def midpoints(self) -> Tensor:
        """[K - 1] borders between neighbouring levels; from the buffers, which a file may set."""
        return (self.reconstruction_values[1:] + self.reconstruction_values[:-1]) / 2

    def encode(self, x: Tensor) -> Tensor:
        """Index of the nearest level for every scalar; ties go to the lower index.

        x: [...] floating point, scaled latents (about unit std).
        Returns [...] int64 in [0, K).
        Raises ValueError if x is not floating point.
        """
        if not x.is_floating_point():
            raise ValueError(f"expected floating-point latents, got {x.dtype}")
        unit = (x.float().clamp(self.low, self.high) - self.low) / (self.high - self.low)
        return torch.bucketize((unit * (2 * SPAN) - SPAN).contiguous(), self.midpoints)

    def decode(self, indices: Tensor) -> Tensor:
        """indices: [...] integers in [0, K) -> [...] float32 latents in [low, high]."""
        unit = (self.reconstruction_values[indices.long()] + SPAN) / (2 * SPAN)
        return unit * (self.high - self.low) + self.low

    def extra_repr(self) -> str:
        return f"levels={self.levels}, low={self.low}, high={self.high}"
