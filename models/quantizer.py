"""Dimension-wise post-training quantizers: every latent scalar on its own, nothing learnt.

published: K levels of equal probability under N(0, 1): boundaries b_i = clamp(Phi^-1(i/K), -3, 3),
levels v_i = E[n | b_i < n < b_{i+1}]. A scalar x in [low, high] maps to n = (x - low)/(high - low)
* 6 - 3, its index is the nearest v.
calibrated: K levels of its own for each channel, fitted to the latents (models/calibration.py).
codebook: the vectors of a VQ tokenizer, for the head of that name; these are learnt.
Letters: C latent channels, K levels, D scalars of a token: C, or C*p*p channel by channel.
Source: arXiv 2503.16430, post-training quantization.
"""

import math

import torch
from torch import Tensor, nn

from models.tokenizers.kl16 import check_layout
from models.tokenizers.vq import nearest

# The published codebook covers this many standard deviations to each side.
SPAN = 3.0


def gaussian_levels(levels: int) -> tuple[Tensor, Tensor]:
    """Boundaries [K + 1] and reconstruction values [K] of the N(0, 1) codebook, float32.

    The quantiles are exact; the rest is float32 arithmetic in the published order, whose rounding
    the outer levels show. Made on the CPU whatever the default device is.
    """
    quantiles = torch.linspace(0, 1, levels + 1, dtype=torch.float64, device="cpu")
    boundaries = torch.special.ndtri(quantiles).float().clamp(-SPAN, SPAN)
    density = torch.exp(-boundaries.square() / 2) / math.sqrt(2 * math.pi)
    mass = (1 + torch.erf(boundaries / math.sqrt(2))) / 2
    values = (density[:-1] - density[1:]) / (mass[1:] - mass[:-1])
    return boundaries, values


class Quantizer(nn.Module):
    """The nearest of K levels for each scalar of scaled latents (about unit std).

    boundaries, reconstruction_values: buffers, in the published names and order.
    fitted: whether it has levels; without, its methods raise ValueError.
    Raises ValueError if K is not in [2, 512]: from 741 levels on, the published outer boundaries
    coincide at three standard deviations, and their levels are undefined.
    """

    boundaries: Tensor
    reconstruction_values: Tensor
    fitted = True

    def __init__(self, levels: int, boundaries: Tensor, values: Tensor):
        super().__init__()
        if not 2 <= levels <= 512:
            raise ValueError(f"levels {levels} is not between 2 and 512 (1 to 9 bits)")
        self.levels = levels
        self.register_buffer("reconstruction_values", values)
        self.register_buffer("boundaries", boundaries)

    def encode(self, x: Tensor) -> Tensor:
        """x: [..., D] floating point -> int64 [..., D] in [0, K); ties go to the lower index.

        By binary search among the K - 1 borders. Raises ValueError if x is not floating point.
        """
        if not x.is_floating_point():
            raise ValueError(f"expected floating-point latents, got {x.dtype}")
        return self._nearest(x.float())


class GaussianQuantizer(Quantizer):
    """The published one. levels: K. low, high: the latent range; what lies outside is clamped.

    Buffers: boundaries [K + 1], reconstruction_values [K]. Raises ValueError on an empty range.
    """

    def __init__(self, levels: int = 64, low: float = -5.0, high: float = 5.0):
        super().__init__(levels, *gaussian_levels(levels))
        if not low < high:
            raise ValueError(f"low {low} is not below high {high}")
        self.low, self.high = low, high

    def _nearest(self, x: Tensor) -> Tensor:
        unit = x.clamp(self.low, self.high)
        unit = unit.sub_(self.low).div_(self.high - self.low).mul_(2 * SPAN).sub_(SPAN)
        values = self.reconstruction_values  # not a table of borders: a file may set them
        return torch.bucketize(unit.contiguous(), (values[1:] + values[:-1]) / 2)

    def decode(self, indices: Tensor) -> Tensor:
        """indices: [...] integers in [0, K) -> float32 [...] in [low, high]."""
        unit = (self.reconstruction_values[indices.long()] + SPAN) / (2 * SPAN)
        return unit * (self.high - self.low) + self.low

    def outside(self, x: Tensor) -> Tensor:
        """x: [...] -> bool [...], true beyond the range."""
        return (x < self.low) | (x > self.high)


class CalibratedQuantizer(Quantizer):
    """levels: K. channels: C. Its levels are set by `set_levels` or come with a state dict.

    Buffers: boundaries [C, K + 1], the first and the last of which are the ends of the data that
    the levels were fitted to; reconstruction_values [C, K].
    """

    def __init__(self, levels: int, channels: int):
        shapes = (channels, levels + 1), (channels, levels)
        super().__init__(levels, *(torch.full(shape, torch.nan) for shape in shapes))
        self.channels, self.fitted = channels, False

    def set_levels(self, boundaries: Tensor, values: Tensor) -> None:
        """boundaries: [C, K + 1]. values: [C, K]. Raises ValueError on what are no levels."""
        state = {"boundaries": boundaries, "reconstruction_values": values}
        check_layout(state, self.state_dict())
        self.load_state_dict(state)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *rest) -> None:
        super()._load_from_state_dict(state_dict, prefix, *rest)
        tables = (self.boundaries, self.reconstruction_values)
        self.fitted = all(table.isfinite().all() for table in tables)
        if self.fitted and not all((table.diff(dim=1) >= 0).all() for table in tables):
            raise ValueError("the levels of a calibrated quantizer are not in ascending order")

    def _by_channel(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., C, D / C]."""
        if not self.fitted:
            raise ValueError("this calibrated quantizer has no levels: load or fit them first")
        return x.unflatten(-1, (self.channels, -1))

    def _nearest(self, x: Tensor) -> Tensor:
        x = self._by_channel(x).movedim(-2, 0)
        borders = self.boundaries[:, 1:-1].contiguous()
        indices = torch.searchsorted(borders, x.flatten(1).contiguous())
        return indices.view(x.shape).movedim(0, -2).flatten(-2)

    def decode(self, indices: Tensor) -> Tensor:
        """indices: [..., D] integers in [0, K) -> float32 [..., D]."""
        first = torch.arange(self.channels, device=indices.device)[:, None] * self.levels
        entries = self._by_channel(indices).long() + first
        return self.reconstruction_values.flatten()[entries.flatten(-2)]

    def outside(self, x: Tensor) -> Tensor:
        """x: [..., D] -> bool [..., D], true beyond the data fitted to."""
        x, low, high = self._by_channel(x), self.boundaries[:, :1], self.boundaries[:, -1:]
        return ((x < low) | (x > high)).flatten(-2)


class CodebookQuantizer(nn.Module):
    """The nearest of K learnt vectors: those of a VQ tokenizer, set later or by a state dict.

    codebook: buffer [K, C], scaled as the latents are. A token has one index.
    """

    codebook: Tensor

    def __init__(self, size: int, channels: int):
        super().__init__()
        self.levels = size
        self.register_buffer("codebook", torch.full((size, channels), torch.nan))

    @property
    def fitted(self) -> bool:
        return bool(self.codebook[0, 0].isfinite())

    def set_levels(self, codebook: Tensor) -> None:
        """codebook: [K, C]. Raises ValueError on another shape."""
        check_layout({"codebook": codebook}, self.state_dict())
        self.load_state_dict({"codebook": codebook.detach()})

    def encode(self, x: Tensor) -> Tensor:
        """x: [..., C] -> int64 [..., 1]."""
        return nearest(x.float(), self.codebook)[..., None]

    def decode(self, indices: Tensor) -> Tensor:
        """indices: [..., 1] integers in [0, K) -> float32 [..., C]."""
        return self.codebook[indices[..., 0].long()]


def build_quantizer(
    kind: str | None, levels: int, low: float, high: float, channels: int
) -> GaussianQuantizer | CalibratedQuantizer | CodebookQuantizer | None:
    """The quantizer of that name; a calibrated one and a codebook are set later.

    levels: K. channels: C of a codebook are those of a token.
    """
    if kind is None:
        return None
    if kind == "codebook":
        return CodebookQuantizer(levels, channels)
    if kind == "calibrated":
        return CalibratedQuantizer(levels, channels)
    return GaussianQuantizer(levels, low, high)


def level_counts(indices: Tensor, levels: int) -> Tensor:
    """indices: [..., C] -> how often each channel takes each level: [C, K] int64."""
    channels = indices.shape[-1]
    offsets = torch.arange(channels, device=indices.device) * levels
    counts = torch.bincount((indices + offsets).flatten(), minlength=channels * levels)
    return counts.reshape(channels, levels)


def entropy(counts: Tensor) -> Tensor:
    """counts: [C, K] -> entropy of each channel's levels in bits: [C]."""
    p = counts.double() / counts.sum(dim=1, keepdim=True)
    return -torch.special.xlogy(p, p).sum(dim=1) / math.log(2.0)
