"""FID, sFID, IS, KID, precision, recall, density and coverage of features that come in batches.

    features {layer: [n, D]} in image order -> Accumulator -> score -> figures

FID, IS, KID, precision and recall are those of `torch_fidelity.calculate_metrics` on the PNG files
of the same images. FID and sFID add up moments; the others' features are kept, of 50,000 at most.
Replicates say how sure a figure is, or a difference of two evaluations with the same noise: of FID
and sFID by the delete-a-group jackknife (replicate j is without the images i with i % G == j), of
IS its splits.
Letters: N images, D features, G groups.
Source: Heusel et al., arXiv 1706.08500 (FID); Nash et al., arXiv 2103.03841 (sFID); Salimans et
al., arXiv 1606.03498 (IS); Binkowski et al., arXiv 1801.01401 (KID); Kynkaanniemi et al., arXiv
1904.06991 (precision and recall); Naeem et al., arXiv 2002.09797 (density and coverage); Kott,
Journal of Official Statistics 17, 2001 (jackknife).
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from util import dist
from util.errors import as_user_error
from util.evaluation.extractor import Extractor
from util.evaluation.folder import FeatureFiles
from util.files import atomic_write

FULL_COUNT = 50000  # images of the distances that papers report
PUBLISHED = {"fid": "FID", "fd_dinov2": "FD-DINOv2"}  # as papers call them
MOST_KEPT = 50000  # images whose features are kept
ISC_SPLITS, ISC_SEED = 10, 2020
KID_SUBSET = 1000
GROUPS = 10
PRC_IN_MEMORY = 10000  # above, distances are computed in parts: 50,000 x 50,000 fill 10 GB
NEIGHBOURS = 5  # of density and coverage, as their authors take
ENDS = {"fid": "", "sfid": "_s"}  # of the names of their statistics
# Written beside mu and sigma; files of others have none of them.
RECORDED = ("count", "img_size", "extractor", "layer", "weights_sha256")
# mu [D] and sigma [D, D], float64, and perhaps sFID's, mu_s and sigma_s, and RECORDED.
Statistics = dict[str, np.ndarray]


@dataclass(frozen=True)
class Measure:
    """stats: what FID and sFID are the distances to. record: where the reference comes from.

    features: {layer: [N, D]} of real images, on the main process.
    """

    extractor: Extractor
    stats: Statistics | None = None
    record: dict = field(default_factory=dict)
    features: dict[str, Tensor] | None = None

    def identity(self) -> dict:
        """What decides the figures of given images, as plain values."""
        digests = {k: v for k, v in self.record.items() if k.endswith("sha256")}
        return self.extractor.identity() | {"reference": digests}

    def sums(self, files: FeatureFiles | None = None) -> "Accumulator":
        """What all figures need: of nothing yet, or of all processes' files, if there are."""
        count, keep = files.batches[-1].stop if files else 0, self.features is not None
        sums = Accumulator(self.extractor.layers, count, keep)
        return sums.add(files) if files else sums


@dataclass
class Scores:
    """warnings: of figures that mean less than a reader expects.

    replicates: {"fid": [G], "sfid": [G], "inception_score": [G], "density": [G], ...}, if any.
    """

    figures: dict[str, float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    replicates: dict[str, list[float]] = field(default_factory=dict)
    settings: dict = field(default_factory=dict)


class Moments:
    """Sums of features in float64, of each of G groups: image i is of group i % G."""

    def __init__(self, groups: int = 1):
        self.counts = torch.zeros(groups, dtype=torch.float64)
        self.first: Tensor | int = 0  # [G, D] and [G, D, D], from the first batch on
        self.second: Tensor | int = 0

    @property
    def count(self) -> int:
        return int(self.counts.sum())

    def update(self, features: Tensor) -> "Moments":
        """features: [n, D]."""
        groups, count, width = len(self.counts), self.count, features.shape[1]
        wide = features.double()
        if count == 0:
            self.first = wide.new_zeros(groups, width)
            self.second = wide.new_zeros(groups, width, width)
        for group in range(groups):
            rows = wide[(group - count) % groups :: groups]
            self.counts[group] += len(rows)
            self.first[group] += rows.sum(dim=0)
            self.second[group].addmm_(rows.T, rows)
        return self

    def gather(self) -> None:
        """All processes' together, on the main process."""
        parts = dist.gather_to_main((self.counts, self.first, self.second))
        if parts is not None:
            self.counts, self.first, self.second = map(sum, zip(*parts, strict=True))

    def statistics(self, without: int | None = None) -> Statistics:
        """Mean and covariance of all groups, or of all but one."""
        kept = (torch.arange(len(self.counts)) != (-1 if without is None else without)).double()
        count = (kept * self.counts).sum()
        mu = kept @ self.first / count
        second = torch.einsum("g,gij->ij", kept, self.second)
        sigma = (second - count * torch.outer(mu, mu)) / (count - 1)
        return {"mu": mu.numpy(), "sigma": sigma.numpy()}


class Accumulator:
    """What figures need of features, added up batch by batch in the order of images.

    layers: {metric: layer} of the metrics that are computed. count: of images to come, so that
    enough features are kept of them, if keep. groups: of the jackknife.
    """

    def __init__(
        self, layers: dict[str, str], count: int = 0, keep: bool = False, groups: int = GROUPS
    ):
        self.layers, self.count = layers, 0
        self.step = max(1, -(-count // MOST_KEPT))
        self.moments = {metric: Moments(groups) for metric in ENDS if metric in layers}
        self.logits: list[Tensor] = []
        kept = [layers[metric] for metric in ("kid", "prc") if keep and metric in layers]
        self._features: dict[str, list[Tensor]] = {layer: [] for layer in kept}

    def update(self, features: dict[str, Tensor]) -> None:
        """features: {layer: [n, D]}; of no images, none."""
        if not features:
            return
        if "isc" in self.layers:
            self.logits.append(features[self.layers["isc"]])
        for metric, moments in self.moments.items():
            moments.update(features[self.layers[metric]])
        for layer, kept in self._features.items():
            kept.append(features[layer][-self.count % self.step :: self.step].clone())
        self.count += len(next(iter(features.values())))

    def add(self, files: FeatureFiles) -> "Accumulator":
        with as_user_error(f"the folder {files.folder} lacks a layer, remove it", (KeyError,)):
            for features in files.chunks():
                self.update(features)
        return self

    @property
    def features(self) -> dict[str, Tensor]:
        """{layer: [n, D]} of the images whose features are kept."""
        return {layer: torch.cat(kept) for layer, kept in self._features.items()}

    def statistics(self) -> Statistics:
        """mu and sigma, and of sFID mu_s and sigma_s; of those that have a layer."""
        pairs = [(ENDS[metric], moments.statistics()) for metric, moments in self.moments.items()]
        return {name + end: array for end, found in pairs for name, array in found.items()}

    def save_statistics(self, path: Path, extractor: Extractor, size: int) -> None:
        """As --fid_stats reads them, if there is a layer for FID; size in pixels."""
        if "fid" in self.layers:
            origin = (extractor.name, self.layers["fid"], extractor.weights_sha256)
            facts = dict(zip(RECORDED, (self.moments["fid"].count, size, *origin), strict=True))
            with atomic_write(path) as file:
                np.savez(file, **self.statistics(), **facts)


def score(sums: Accumulator, measure: Measure) -> Scores:
    """All figures that can be had."""
    layers, stats, scores = measure.extractor.layers, measure.stats or {}, Scores()
    if "isc" in layers:
        _inception_score(torch.cat(sums.logits), scores)
    for metric, moments in sums.moments.items():
        names = {"mu": f"mu{ENDS[metric]}", "sigma": f"sigma{ENDS[metric]}"}
        if names["mu"] in stats:
            title = measure.extractor.distance if metric == "fid" else metric
            reference = {name: stats[own] for name, own in names.items()}
            _frechet_distance(moments, reference, title, scores)
    if measure.features is not None:
        own, other = sums.features, measure.features
        figures = (("kid", _kid), ("prc", _precision_recall), ("prc", _density_coverage))
        for metric, compute in figures:
            if metric in layers:
                compute(own[layers[metric]], other[layers[metric]], scores)
    if not measure.extractor.is_inception:  # features of another network give no IS and KID
        scores.figures = {n.replace("inception_", ""): v for n, v in scores.figures.items()}
    return scores


def _inception_score(logits: Tensor, scores: Scores) -> None:
    """Mean and deviation over the splits, which are replicates. logits: [N, K]."""
    from torch_fidelity.metric_isc import isc_features_to_metric

    count, splits = len(logits), ISC_SPLITS
    if count < splits:
        few = f"{count} images are fewer than its {splits} splits"
        scores.warnings.append(f"IS is not computed: {few}")
        return
    shuffled = logits[np.random.RandomState(ISC_SEED).permutation(count)]
    parts = [shuffled[i * count // splits : (i + 1) * count // splits] for i in range(splits)]
    whole = [isc_features_to_metric(part, splits=1, shuffle=False) for part in parts]
    values = [score["inception_score_mean"] for score in whole]
    figures = {"mean": np.mean(values), "std": np.std(values)}
    scores.figures |= {f"inception_score_{name}": float(v) for name, v in figures.items()}
    scores.replicates["inception_score"] = values


def _frechet_distance(moments: Moments, stats: Statistics, name: str, scores: Scores) -> None:
    """name: of the figure. What FID says of few images sFID does not repeat."""
    count, width = moments.count, len(stats["mu"])
    if count < 2:
        few = "a covariance takes two images"
        scores.warnings += [] if name == "sfid" else [f"no Frechet distance is computed: {few}"]
        return
    scores.figures[name] = frechet(moments.statistics(), stats)
    if count - moments.counts.max() > width:  # else the replicates are of singular covariances
        groups = range(len(moments.counts))
        values = [frechet(moments.statistics(without=group), stats) for group in groups]
        scores.replicates["sfid" if name == "sfid" else "fid"] = values
        scores.figures[f"{name}_standard_error"] = fid_error(values)
    if name == "sfid":
        return
    if few := few_for_covariance(count, width):
        scores.warnings.append(f"{few}; compare it with nothing but the same number")
    elif (title := PUBLISHED.get(name)) and count != FULL_COUNT:
        scores.warnings.append(
            f"this is {title}-{count}: {title} falls with the number of images, so it is not "
            f"comparable with the {title}-50K of papers"
        )


def few_for_covariance(count: int, width: int) -> str:
    """What is wrong with the covariance of so few images; "" of enough."""
    if count > width:
        return ""
    few = f"{count} images are not more than the {width} features"
    return f"{few}: their covariance is singular and FID far too large"


def _kid(own: Tensor, other: Tensor, scores: Scores) -> None:
    from torch_fidelity.metric_kid import kid_features_to_metric

    subset = min(KID_SUBSET, len(own), len(other))
    if subset < 2:
        scores.warnings.append("KID is not computed: it needs two images on each side")
        return
    if subset < KID_SUBSET:
        few = f"KID is of subsets of {subset} images, not {KID_SUBSET}"
        scores.warnings.append(f"{few}: its standard deviation is not comparable with others'")
    scores.settings["kid_subset_size"] = subset
    kid = kid_features_to_metric(own, other, kid_subset_size=subset, verbose=False)
    if subset == len(own) == len(other):
        del kid["kernel_inception_distance_std"]  # all subsets are the whole: it is rounding
    scores.figures |= kid


def _precision_recall(own: Tensor, other: Tensor, scores: Scores) -> None:
    from torch_fidelity.metric_prc import prc_features_to_metric

    if min(len(own), len(other)) < 4:  # the third neighbour beside itself
        scores.warnings.append("precision and recall need four images on each side")
        return
    in_parts = max(len(own), len(other)) > PRC_IN_MEMORY
    scores.figures |= prc_features_to_metric(own, other, save_cpu_ram=in_parts, verbose=False)


def _density_coverage(own: Tensor, other: Tensor, scores: Scores) -> None:
    """A ball around each real image reaches to its fifth neighbour.

    Density: in how many a generated image lies, over five. Coverage: the share that holds one.
    """
    if len(other) <= NEIGHBOURS:  # the fifth beside itself
        scores.warnings.append(f"density and coverage need {NEIGHBOURS + 1} real images")
        return
    groups = F.one_hot(torch.arange(len(own)) % GROUPS, GROUPS).float()
    parts = []  # how many generated images of each group lie in each ball
    for part in other.split(PRC_IN_MEMORY):
        radii = torch.cdist(part, other).kthvalue(NEIGHBOURS + 1).values
        parts.append((torch.cdist(part, own) < radii[:, None]).float() @ groups)
    inside, sizes = torch.cat(parts).double(), groups.sum(dim=0)
    total = inside.sum(dim=1, keepdim=True)
    # Column 0 is of all, the others are each without a group.
    kept, counts = torch.cat([total, total - inside], 1), len(own) - F.pad(sizes, (1, 0))
    density = kept.sum(dim=0) / (NEIGHBOURS * counts)
    for name, values in (("density", density), ("coverage", (kept > 0).double().mean(dim=0))):
        scores.figures[name], *replicates = values.tolist()
        if len(own) > GROUPS:
            scores.replicates[name] = replicates
            scores.figures[f"{name}_standard_error"] = fid_error(replicates)


def frechet(own: Statistics, other: Statistics) -> float:
    """|m - mu|^2 + tr(C + S - 2 (C S)^1/2).

    The root's trace is that of (R C R)^1/2 with R R = S, which is symmetric: fast and exact.
    """
    own, other = ({k: torch.from_numpy(s[k]) for k in ("mu", "sigma")} for s in (own, other))
    values, vectors = torch.linalg.eigh(other["sigma"])
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    roots = torch.linalg.eigvalsh(root @ own["sigma"] @ root).clamp_min(0).sqrt()
    shift = own["mu"] - other["mu"]
    return (shift @ shift + own["sigma"].trace() + other["sigma"].trace() - 2 * roots.sum()).item()


def fid_error(replicates: list[float]) -> float:
    """Standard error of a figure, or of a difference, from its jackknife replicates."""
    return float(np.sqrt(len(replicates) - 1) * np.std(replicates))


def is_error(replicates: list[float]) -> float:
    """Standard error of the mean of independent splits."""
    return float(np.std(replicates, ddof=1) / np.sqrt(len(replicates)))
