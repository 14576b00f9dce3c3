"""Which positions are masked: random orders, the training mask ratio, the sampling schedule.

Letters: B batch, L positions, M masked positions of each image, V = L - M visible ones.
Source: MAR, arXiv 2406.11838, section 3; arXiv 2503.16430.
"""

import math
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

MASK_RATIO_MEAN, MASK_RATIO_STD = 1.0, 0.25


@dataclass(frozen=True)
class Mask:
    """The same number of masked positions in every image: masked [B, M] and visible [B, V] int64,
    ascending. Indices keep every shape known on the host, so nothing waits for the device.
    """

    masked: Tensor
    visible: Tensor

    @classmethod
    def from_orders(cls, orders: Tensor, num_masked: int) -> "Mask":
        """orders: [B, L] permutations; the first `num_masked` positions of each are masked."""
        parts = orders[:, :num_masked], orders[:, num_masked:]
        return cls(*(part.sort(dim=1).values for part in parts))

    @classmethod
    def from_bool(cls, mask: Tensor) -> "Mask":
        """mask: [B, L], true or 1 where masked. Raises ValueError if the rows' counts differ."""
        mask = mask.bool()
        counts = mask.sum(dim=1).tolist()
        if len(set(counts)) != 1:
            raise ValueError(f"rows mask different numbers of positions: {counts}")
        return cls.from_orders(mask.int().argsort(dim=1, descending=True, stable=True), counts[0])


def random_orders(batch: int, length: int, device: torch.device | str) -> Tensor:
    """[B, L]: an independent, uniformly random permutation of the positions for each image."""
    return torch.rand(batch, length, device=device).argsort(dim=1)


def draw_mask_ratio(minimum: float) -> float:
    """One draw of normal(1.0, 0.25) truncated to [minimum, 1.0], from torch's CPU generator."""
    low = torch.tensor((minimum - MASK_RATIO_MEAN) / MASK_RATIO_STD, dtype=torch.float64)
    mass = torch.special.ndtr(low)  # P(n < minimum); the upper end is the mean, so P = 1/2
    quantile = mass + (0.5 - mass) * torch.rand((), dtype=torch.float64)
    ratio = MASK_RATIO_MEAN + MASK_RATIO_STD * torch.special.ndtri(quantile).item()
    return min(max(ratio, minimum), 1.0)


def share_below(ratio: float, minimum: float) -> float:
    """P(drawn <= ratio), the distribution function of `draw_mask_ratio`."""
    normal = NormalDist(MASK_RATIO_MEAN, MASK_RATIO_STD)
    below, mass = normal.cdf(minimum), normal.cdf(1.0) - normal.cdf(minimum)
    if mass == 0:  # all is masked
        return float(ratio >= 1)
    return max(normal.cdf(ratio) - below, 0.0) / mass


def masked_counts(length: int, minimum: float) -> list[tuple[int, float]]:
    """How many positions `training_mask` masks, and with which probability: (M, P(M))."""
    cdf = [share_below(m / length, minimum) for m in range(length + 1)]
    return [(m, cdf[m] - cdf[m - 1]) for m in range(1, length + 1) if cdf[m] > cdf[m - 1]]


def training_mask(
    batch: int, length: int, minimum: float, share: float, device: torch.device | str
) -> tuple[Mask, Tensor]:
    """The published training mask: one ratio for the batch, ceil(L * ratio) positions an image.

    share: of the masked positions that the loss is taken of, the second result [B, n], ascending:
    a uniformly random subset, all of them if it is 1.
    """
    num_masked = math.ceil(length * draw_mask_ratio(minimum))
    orders = random_orders(batch, length, device)
    mask = Mask.from_orders(orders, num_masked)
    if share == 1:
        return mask, mask.masked
    return mask, orders[:, : math.ceil(num_masked * share)].sort(dim=1).values


def mask_schedule(length: int, num_iter: int) -> list[tuple[int, int, int]]:
    """For each sampling iteration: (masked before, masked after, m of the cosine).

    After iteration s of S, m = max(1, min(before - 1, floor(L cos(pi/2 s/S)))) positions stay
    masked; the last one predicts all that remain, but its m, which guidance reads, is the cosine's.
    With S > L some iterations predict nothing.
    """
    schedule, before = [], length
    for step in range(1, num_iter + 1):
        m = max(1, min(before - 1, math.floor(length * math.cos(math.pi / 2 * step / num_iter))))
        after = m if step < num_iter else 0
        schedule.append((before, after, m))
        before = after
    return schedule
