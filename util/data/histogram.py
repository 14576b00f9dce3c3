"""How a tokenizer's latents are distributed, channel by channel: histograms that add up exactly.

A channel whose values lie within (-2^e, 2^e) has B bins over that interval; to take in larger
values, pairs of bins become one. So the histogram of a whole is the sum of its parts', in any order
and however it was divided.
Letters: N latents, C channels, h, w positions, B bins.
"""

import base64
import hashlib
import zlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

BINS = 8192  # of 8 standard deviations to each side: 512 a standard deviation
MIN_EXPONENT = -60  # of a channel that is zero everywhere


@dataclass(frozen=True)
class LatentHistogram:
    """exponents: [C] int64, e of each channel. counts: [C, B] int64."""

    exponents: Tensor
    counts: Tensor

    @classmethod
    def of(cls, latents: Tensor) -> "LatentHistogram":
        """latents: [N, C, h, w]. Raises ValueError if some are not finite."""
        values = latents.double().movedim(1, 0).flatten(1)  # [C, N*h*w]
        largest = values.abs().amax(dim=1)
        if not largest.isfinite().all():
            raise ValueError("latents that are not finite have no histogram")
        exponents = torch.frexp(largest).exponent.long()  # largest < 2^e
        exponents = torch.where(largest > 0, exponents, MIN_EXPONENT).clamp(min=MIN_EXPONENT)
        bins = torch.floor(values / cls(exponents, values).bin_widths()[:, None]).long() + BINS // 2
        counts = torch.zeros(len(values), BINS, dtype=torch.int64)
        return cls(exponents, counts.scatter_add_(1, bins, torch.ones_like(bins)))

    def __add__(self, other: "LatentHistogram") -> "LatentHistogram":
        exponents = torch.maximum(self.exponents, other.exponents)
        counts = self._coarsened(exponents).counts + other._coarsened(exponents).counts
        return LatentHistogram(exponents, counts)

    def _coarsened(self, exponents: Tensor) -> "LatentHistogram":
        """With wider bins, for the given exponents, none of them smaller than its own."""
        half = BINS // 2
        shift = (exponents - self.exponents).clamp(max=half.bit_length())  # to one bin a sign
        bins = (torch.arange(BINS) - half >> shift[:, None]) + half
        counts = torch.zeros_like(self.counts).scatter_add_(1, bins, self.counts)
        return LatentHistogram(exponents, counts)

    def bin_widths(self, scale: float = 1.0) -> Tensor:
        """[C] float64, of the latents multiplied by scale; the edge in the middle is zero."""
        return torch.exp2(self.exponents.double()) * (2 * scale / BINS)

    def digest(self) -> str:
        """SHA-256 of all it says."""
        arrays = (self.exponents.numpy(), self.counts.numpy())
        return hashlib.sha256(b"".join(a.astype("<i8").tobytes() for a in arrays)).hexdigest()

    def to_dict(self) -> dict:
        """Plain values, as a JSON file holds them: most counts are zero and pack well."""
        packed = zlib.compress(self.counts.numpy().astype("<i8").tobytes(), 9)
        counts = base64.b64encode(packed).decode("ascii")
        return {"exponents": self.exponents.tolist(), "counts": counts}

    @classmethod
    def from_dict(cls, values: dict) -> "LatentHistogram":
        """The inverse of `to_dict`. Raises any exception on values that are not of one."""
        packed = zlib.decompress(base64.b64decode(values["counts"]))
        counts = np.frombuffer(packed, "<i8").astype(np.int64).reshape(-1, BINS)
        return cls(torch.tensor(values["exponents"]), torch.from_numpy(counts))


def posterior_noise(moments: Tensor) -> Tensor:
    """Standard normal noise of one latent [C, h, w], float64, for its moments [2C, h, w].

    A function of the moments alone, so that a latent is sampled alike whatever it is stored with.
    """
    digest = hashlib.sha256(moments.float().contiguous().numpy().tobytes()).digest()
    # Raw Philox words: numpy promises that these stay as they are in later releases.
    generator = np.random.Philox(key=np.frombuffer(digest[:16], np.uint64))
    words = generator.random_raw(moments.numel() // 2)
    uniforms = torch.from_numpy(((words >> np.uint64(11)) + 0.5) * 2.0**-53)
    return torch.special.ndtri(uniforms).reshape(-1, *moments.shape[1:])
