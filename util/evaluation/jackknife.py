"""How sure a figure is: replicates over groups of images, for single figures and for differences.

Two evaluations with the same seed make image i of the same noise. Their figures rise and fall
together from one group of images to the next, so the difference is far surer than either figure:
its standard error comes from the replicates' differences.
- FID: delete-a-group jackknife. Replicate j is the FID without the images i with i % G == j.
- IS: its splits, which are replicates already.
Letters: N images, D features, G groups.
Source: Kott, The delete-a-group jackknife, Journal of Official Statistics 17 (2001).
"""

import numpy as np
import torch
from torch import Tensor

GROUPS = 10


def fid_replicates(features: Tensor, stats: dict[str, np.ndarray]) -> list[float] | None:
    """FID of N - N/G images, G times. features: [N, D] in the order of image numbers.

    None unless every replicate has more images than features: below that its covariance is
    singular, and the replicates tell of the missing images alone.
    """
    count, width = features.shape
    if count - -(-count // GROUPS) <= width:
        return None
    root = _root(stats["sigma"])
    shift = features.double().mean(dim=0)  # moments about the mean lose no digits
    centred = features.double() - shift
    total, second = centred.sum(dim=0), centred.T @ centred
    found = []
    for group in range(GROUPS):
        left_out = centred[group::GROUPS]
        kept = count - len(left_out)
        mean = (total - left_out.sum(dim=0)) / kept
        square = second - left_out.T @ left_out
        cov = (square - kept * torch.outer(mean, mean)) / (kept - 1)
        found.append(_frechet(mean + shift, cov, stats, root))
    return found


def _root(sigma: np.ndarray) -> Tensor:
    """The symmetric root of a covariance."""
    values, vectors = torch.linalg.eigh(torch.from_numpy(sigma))
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T


def _frechet(mean: Tensor, cov: Tensor, stats: dict[str, np.ndarray], root: Tensor) -> float:
    """|m - mu|^2 + tr(C + S - 2 (R C R)^1/2), R R = S: R C R is symmetric, which is fast."""
    shift = mean - torch.from_numpy(stats["mu"])
    roots = torch.linalg.eigvalsh(root @ cov @ root).clamp_min(0).sqrt()
    return (shift @ shift + cov.trace() + float(np.trace(stats["sigma"])) - 2 * roots.sum()).item()


def is_replicates(logits: Tensor, splits: int = GROUPS, seed: int = 2020) -> list[float]:
    """The Inception Score of each split that torch-fidelity takes the mean of. logits: [N, K]."""
    from torch_fidelity.metric_isc import isc_features_to_metric

    count = len(logits)
    shuffled = logits[np.random.RandomState(seed).permutation(count)]
    parts = [shuffled[i * count // splits : (i + 1) * count // splits] for i in range(splits)]
    scores = [isc_features_to_metric(part, splits=1, shuffle=False) for part in parts]
    return [score["inception_score_mean"] for score in scores]


def fid_error(replicates: list[float]) -> float:
    """Standard error of a figure, or of a difference, from its jackknife replicates."""
    values = np.asarray(replicates)
    return float(np.sqrt((len(values) - 1) / len(values) * ((values - values.mean()) ** 2).sum()))


def is_error(replicates: list[float]) -> float:
    """Standard error of the mean of independent splits."""
    return float(np.std(replicates, ddof=1) / np.sqrt(len(replicates)))
