"""What a tokenizer's latents tell about themselves: scale, channel order, distribution.

latent_scale = 1 / std of posterior samples, over all images, channels and positions. By the law of
total variance, Var[sample] = Var[mean] + E[variance].

channel_order = channels by their share of low-frequency energy, largest first: the power of the 2-D
spectra of posterior means, less their mean over the data set, at frequencies from zero to a quarter
of the sampling frequency.

histogram = the distribution of posterior samples in each channel, which calibrated levels fit.

Letters: N latents, C channels, h, w positions.
Source: arXiv 2503.16430, the Fourier analysis of KL-16's channels.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from models.tokenizers.kl16 import Posterior
from util.data.histogram import LatentHistogram, posterior_noise

LOW_FREQUENCY = 0.25  # cycles per position; sampling frequency 1, Nyquist 0.5
_ROWS = ("mean", "square", "variance", "low_power")


@dataclass
class LatentStats:
    """Sums over N latents of shape (C, h, w); sums of parts of the data add up to the whole's.

    sums: [4, C] float64, over images and positions: the posterior's mean, its square, the
    posterior's variance, and the power of the mean's low frequencies.
    histogram: of a posterior sample of each, not scaled.
    """

    latent_shape: tuple[int, int, int]
    count: int
    sums: Tensor
    histogram: LatentHistogram

    @classmethod
    def of(cls, moments: Tensor) -> "LatentStats":
        """moments: [N, 2C, h, w], mean and log-variance."""
        posterior = Posterior(moments.double())
        mean, variance = posterior.mean, posterior.std.square()
        rows, columns = map(torch.fft.fftfreq, mean.shape[2:])
        is_low = rows[:, None].square() + columns.square() <= LOW_FREQUENCY**2
        power = torch.fft.fft2(mean).abs().square() * is_low
        sums = torch.stack([x.sum(dim=(0, 2, 3)) for x in (mean, mean.square(), variance, power)])
        noise = torch.stack([posterior_noise(of_latent) for of_latent in moments])
        samples = mean + posterior.std * noise
        return cls(tuple(mean.shape[1:]), len(mean), sums, LatentHistogram.of(samples))

    def __add__(self, other: "LatentStats") -> "LatentStats":
        sums, histogram = self.sums + other.sums, self.histogram + other.histogram
        return LatentStats(self.latent_shape, self.count + other.count, sums, histogram)

    def to_dict(self) -> dict:
        """As a JSON file holds it."""
        rows = dict(zip(_ROWS, self.sums.tolist(), strict=True))
        values = {"latent_shape": list(self.latent_shape), "count": self.count, **rows}
        return values | {"histogram": self.histogram.to_dict()}

    @classmethod
    def from_dict(cls, values: dict) -> "LatentStats":
        sums = torch.tensor([values[row] for row in _ROWS], dtype=torch.float64)
        histogram = LatentHistogram.from_dict(values["histogram"])
        return cls(tuple(values["latent_shape"]), values["count"], sums, histogram)

    @property
    def _means(self) -> Tensor:
        """What sums up, at an average position, [4, C]."""
        return self.sums / (self.count * math.prod(self.latent_shape[1:]))

    def channel_mean(self) -> Tensor:
        """[C]."""
        return self._means[0]

    def channel_std(self, of_means: bool = False) -> Tensor:
        """Std of posterior samples, or of posterior means, [C]."""
        mean, square, variance, _ = self._means
        variance = 0 if of_means else variance
        return (square + variance - mean.square()).clamp(min=0).sqrt()

    def latent_scale(self) -> float:
        mean, square, variance, _ = self._means.mean(dim=1).tolist()
        return (square + variance - mean**2) ** -0.5

    def low_frequency_share(self) -> Tensor:
        """Part of each channel's energy at low frequencies, [C] in [0, 1]; 0 without energy."""
        area = math.prod(self.latent_shape[1:])
        _, square, _, low_power = self.sums
        # The constant sits in the zero frequency alone: N images of power (h * w * mean)^2.
        constant = self.count * (area * self.channel_mean()).square()
        energy = area * square - constant  # Parseval: power of all frequencies
        share = torch.where(energy > 0, (low_power - constant) / energy, 0.0)
        return share.clamp(0, 1)

    def channel_order(self) -> list[int]:
        """Channels, largest share of low-frequency energy first; equal ones by their number."""
        share = self.low_frequency_share().round(decimals=9)  # equal up to rounding is equal
        return share.argsort(descending=True, stable=True).tolist()
