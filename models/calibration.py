"""Levels of a scalar quantizer fitted to the data: one codebook for each channel.

With a density of levels proportional to f^a, f the density of the data, the error is least at
a = 1/3 and all levels are used alike at a = 1. The published codebook, made for N(0, 1) and
stretched by 5/3, has a = 0.36 on N(0, 1) data; this one has a = EXPONENT on any data:
1. f is the histogram, smoothed by a Gaussian kernel of Silverman's bandwidth;
2. boundaries are where f^a is cut into K equal parts;
3. a few of Lloyd's steps: values are the means of their cells, boundaries lie halfway between.
Letters: C channels, B bins, K levels.
Source: Panter and Dite 1951 (f^(1/3)); Lloyd 1982 (step 3); Silverman 1986, eq. 3.31.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

EXPONENT = 0.361
LLOYD_STEPS = 4
KERNEL_RADIUS = 6  # bandwidths


def fit_levels(
    counts: Tensor, widths: Tensor, levels: int, exponent: float = EXPONENT
) -> tuple[Tensor, Tensor]:
    """Boundaries [C, K + 1], the outermost the ends of the data, and values [C, K], float64.

    counts: [C, B] of bins, B even: the edge in the middle is zero. widths: [C] of the bins.
    Raises ValueError if a channel has no counts.
    """
    if not (counts.sum(dim=1) > 0).all():
        raise ValueError("there are channels without any latents to fit levels to")
    histograms = map(_Histogram, counts.double(), widths.tolist())
    tables = [_fit_channel(histogram, levels, exponent) for histogram in histograms]
    boundaries, values = (torch.stack(table) for table in zip(*tables, strict=True))
    return boundaries, values


def _fit_channel(data: "_Histogram", levels: int, exponent: float) -> tuple[Tensor, Tensor]:
    edges, smooth = data.smoothed()
    inner = cut(edges, smooth**exponent, levels)
    used = data.mass.nonzero()
    low, high = data.edges[used[0]].item(), data.edges[used[-1] + 1].item()
    ends = torch.tensor([min(low, inner[0].item()), max(high, inner[-1].item())]).double()
    boundaries = torch.cat([ends[:1], inner, ends[1:]])
    for _ in range(LLOYD_STEPS):
        values = data.means(boundaries)
        boundaries[1:-1] = (values[1:] + values[:-1]) / 2
    return boundaries, values


def cut(edges: Tensor, mass: Tensor, parts: int) -> Tensor:
    """The parts - 1 points that cut bins, filled evenly, into parts of equal mass."""
    below = torch.cat([mass.new_zeros(1), (mass / mass.sum()).cumsum(0)])
    shares = torch.arange(1, parts, dtype=torch.float64) / parts
    bins = (torch.searchsorted(below, shares) - 1).clamp(0, len(mass) - 1)
    inside = (shares - below[bins]) / (below[bins + 1] - below[bins])
    return edges[bins] + inside.clamp(0, 1) * (edges[bins + 1] - edges[bins])


class _Histogram:
    """One channel's data, spread evenly inside each bin. edges: [B + 1]. mass: [B], sums to 1."""

    def __init__(self, counts: Tensor, width: float):
        self.samples, self.width = counts.sum().item(), width
        self.mass = counts / self.samples
        self.edges = (torch.arange(len(counts) + 1, dtype=torch.float64) - len(counts) // 2) * width
        middles = (self.edges[1:] + self.edges[:-1]) / 2
        zero = self.mass.new_zeros(1)
        self.below = torch.cat([zero, self.mass.cumsum(0)])  # mass below an edge, [B + 1]
        self.first_moment = torch.cat([zero, (self.mass * middles).cumsum(0)])
        variance = (self.mass * (middles - self.first_moment[-1]).square()).sum().item()
        self.variance = variance + width**2 / 12

    def up_to(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Integrals of f and x f from the left end to each x."""
        x = x.clamp(self.edges[0], self.edges[-1])
        bins = (torch.searchsorted(self.edges, x, right=True) - 1).clamp(0, len(self.mass) - 1)
        left, density = self.edges[bins], self.mass[bins] / self.width
        return (
            self.below[bins] + density * (x - left),
            self.first_moment[bins] + density * (x.square() - left.square()) / 2,
        )

    def means(self, boundaries: Tensor) -> Tensor:
        """The mean of the data in each cell, the middle of a cell without any: [K]."""
        mass, moment = (integral.diff() for integral in self.up_to(boundaries))
        middles = (boundaries[1:] + boundaries[:-1]) / 2
        means = torch.where(mass > 1e-15, moment / mass, middles)
        return means.clamp(boundaries[:-1], boundaries[1:])  # rounding must not leave the cell

    def smoothed(self) -> tuple[Tensor, Tensor]:
        """Edges and mass of the same data after a Gaussian kernel, which reaches further out."""
        low, _, high = cut(self.edges, self.mass, 4).tolist()  # quartiles
        bandwidth = 0.9 * min(math.sqrt(self.variance), (high - low) / 1.349) * self.samples**-0.2
        # Bins that are far narrower than the kernel only cost time.
        pooled = max(1, min(len(self.mass) // 2, int(bandwidth / (32 * self.width))))
        pooled = 2 ** (pooled.bit_length() - 1)
        mass, width = self.mass.reshape(-1, pooled).sum(dim=1), self.width * pooled
        radius = math.ceil(KERNEL_RADIUS * bandwidth / width)
        steps = torch.arange(-radius, radius + 1, dtype=torch.float64) * width
        kernel = torch.exp(-(steps / bandwidth).square() / 2)
        kernel /= kernel.sum()
        mass = F.conv1d(mass[None, None], kernel[None, None], padding=2 * radius)[0, 0]
        start = self.edges[0] - radius * width
        return start + torch.arange(len(mass) + 1, dtype=torch.float64) * width, mass
