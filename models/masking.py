"""Which positions are masked: random orders, the training mask ratio, the sampling schedule.

Every image of a batch has as many masked positions, and positions are given as indices: so every
shape is known on the host, and nothing waits for the device.
Letters: B batch, L positions, M masked positions of each image, V = L - M visible ones.
Source: MAR, arXiv 2406.11838, section 3; arXiv 2503.16430; eMIGM, arXiv 2503.07197, for "exp".
"""

import math
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

MASK_RATIO_MEAN, MASK_RATIO_STD = 1.0, 0.25
MASK_RATIO_MIN = {"normal": 0.7, "exp": 0.2}  # of the distributions of training, as published
EXP_RATE = 5  # of eMIGM's exponential schedules
# Of sampling: the share of positions that stay masked when a share of the iterations is done.
MASK_SCHEDULES = {
    "cosine": lambda done: math.cos(math.pi / 2 * done),
    "exp": lambda done: 1 - math.exp(-EXP_RATE * (1 - done)),
}


def split_mask(mask: Tensor) -> tuple[Tensor, Tensor]:
    """mask: [B, L], true or 1 where masked -> the visible positions [B, V] and the masked [B, M].

    Both ascend. Raises ValueError if the rows' counts differ.
    """
    mask = mask.bool()
    counts = mask.sum(dim=1).tolist()
    if len(set(counts)) != 1:
        raise ValueError(f"rows mask different numbers of positions: {counts}")
    return mask.int().argsort(dim=1, stable=True).split([mask.shape[1] - counts[0], counts[0]], 1)


@dataclass(frozen=True)
class MaskRatios:
    """From what training draws its mask ratio.

    "normal": normal(1.0, 0.25) truncated to [minimum, 1.0], as published. "exp": the larger of
    minimum and 1 - exp(-5 u), u uniform in [0, 1].
    """

    distribution: str
    minimum: float

    def draw(self) -> float:
        """One draw, from torch's CPU generator."""
        uniform = torch.rand((), dtype=torch.float64)
        if self.distribution == "exp":
            return max(1 - math.exp(-EXP_RATE * uniform.item()), self.minimum)
        low = torch.tensor((self.minimum - MASK_RATIO_MEAN) / MASK_RATIO_STD, dtype=torch.float64)
        mass = torch.special.ndtr(low)  # P(n < minimum); the upper end is the mean, so P = 1/2
        quantile = mass + (0.5 - mass) * uniform
        ratio = MASK_RATIO_MEAN + MASK_RATIO_STD * torch.special.ndtri(quantile).item()
        return min(max(ratio, self.minimum), 1.0)

    def share_below(self, ratio: float) -> float:
        """P(drawn <= ratio)."""
        if ratio >= 1:
            return 1.0
        if self.distribution == "exp":
            return min(-math.log1p(-ratio) / EXP_RATE, 1.0) if ratio >= self.minimum else 0.0
        normal = NormalDist(MASK_RATIO_MEAN, MASK_RATIO_STD)
        below, mass = normal.cdf(self.minimum), normal.cdf(1.0) - normal.cdf(self.minimum)
        return max(normal.cdf(ratio) - below, 0.0) / mass if mass else 0.0  # none: all is masked

    def counts(self, length: int) -> list[tuple[int, float]]:
        """How many positions `training_mask` masks, and with which probability: (M, P(M))."""
        cdf = [self.share_below(m / length) for m in range(length + 1)]
        return [(m, cdf[m] - cdf[m - 1]) for m in range(1, length + 1) if cdf[m] > cdf[m - 1]]


def training_mask(
    batch: int, length: int, ratios: MaskRatios, share: float, device: torch.device | str
) -> tuple[Tensor, Tensor]:
    """The training mask: one ratio for the batch, ceil(L * ratio) positions an image.

    share: of the masked positions whose loss is taken, a uniformly random subset.
    Returns the visible positions [B, V] and those of the loss [B, n], ascending.
    """
    num_masked = math.ceil(length * ratios.draw())
    orders = torch.rand(batch, length, device=device).argsort(dim=1)  # of each image its own
    parts = orders[:, num_masked:], orders[:, : math.ceil(num_masked * share)]
    visible, positions = (part.sort(dim=1).values for part in parts)
    return visible, positions


def mask_schedule(
    length: int, num_iter: int, schedule: str = "cosine"
) -> list[tuple[int, int, int]]:
    """For each sampling iteration: (masked before, masked after, m of the schedule).

    After iteration s of S, m = max(1, min(before - 1, floor(L share(s/S)))) positions stay masked;
    the last one predicts all that remain, but its m, which guidance reads, is the schedule's.
    With S > L some iterations predict nothing.
    """
    share, schedule, before = MASK_SCHEDULES[schedule], [], length
    for step in range(1, num_iter + 1):
        m = max(1, min(before - 1, math.floor(length * share(step / num_iter))))
        after = m if step < num_iter else 0
        schedule.append((before, after, m))
        before = after
    return schedule
