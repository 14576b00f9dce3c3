"""FID, IS, KID, precision and recall: torch-fidelity's network and torch-fidelity's arithmetic.

    images -> Extractor -> features [N, D] of each layer, in image order -> figures

The figures are those of `torch_fidelity.calculate_metrics` on the PNG files of the same images,
with its default splits, order, subsets and seeds.
Letters: N images, D features.
Source: Heusel et al., arXiv 1706.08500 (FID); Salimans et al., arXiv 1606.03498 (IS); Binkowski
et al., arXiv 1801.01401 (KID); Kynkaanniemi et al., arXiv 1904.06991 (precision and recall).
"""

import argparse
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from util import dist
from util.data.images import LOADING, Loading
from util.errors import UserError
from util.evaluation.extractor import INCEPTION, Extractor, load_extractor
from util.evaluation.features import FeatureStore, folder_features, upsampled
from util.evaluation.jackknife import fid_error, fid_replicates, is_replicates
from util.evaluation.reference import (
    ADM_STATISTICS,
    Reference,
    check_statistics,
    listing_digest,
    load_fid_statistics,
    open_images,
)

FULL_COUNT = 50000  # images of the FID that papers report
ISC_SPLITS = 10
KID_SUBSET = 1000
REFERENCE_BATCH = 64
PRC_IN_MEMORY = 10000  # above, distances are computed in parts: 50,000 x 50,000 fill 10 GB
# Names of the figures: with Inception, and with another network, where FID is not FID.
NAMES = {
    "frechet_inception_distance": ("fid", "frechet_distance"),
    "kernel_inception_distance_mean": ("kernel_inception_distance_mean", "kernel_distance_mean"),
    "kernel_inception_distance_std": ("kernel_inception_distance_std", "kernel_distance_std"),
    "inception_score_mean": ("inception_score_mean", "score_mean"),
    "inception_score_std": ("inception_score_std", "score_std"),
}


@dataclass
class Measure:
    """The extractor and what its features are compared with."""

    extractor: Extractor
    reference: Reference

    @property
    def stats(self) -> dict[str, np.ndarray] | None:
        """The statistics that FID is the distance to, if there are any."""
        return self.reference.stats

    def identity(self) -> dict:
        """What decides the figures of given images, as plain values."""
        digests = {k: v for k, v in self.reference.record.items() if k.endswith("sha256")}
        return self.extractor.identity() | {"reference": digests}


@dataclass
class Scores:
    """figures by name; what their numbers would mean, where that is not what a reader expects.

    replicates: {"fid": [G], "inception_score": [G]}, see jackknife.py; where they can be had.
    """

    figures: dict[str, float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    replicates: dict[str, list[float]] = field(default_factory=dict)
    settings: dict = field(default_factory=dict)


def score(features: dict[str, Tensor], measure: Measure) -> Scores:
    """All figures that can be had. features: {layer: [N, D]} in the order of image numbers."""
    layers, inception = measure.extractor.layers, measure.extractor.is_inception
    found = Scores()
    if "isc" in layers:
        _inception_score(features[layers["isc"]], found)
    if "fid" in layers and measure.stats is not None:
        _frechet_distance(features[layers["fid"]], measure.stats, inception, found)
    if measure.reference.features is not None:
        _kid(features, measure, found)
        _precision_recall(features, measure, found)
    named = {name: pair[0 if inception else 1] for name, pair in NAMES.items()}
    if not inception:
        named["fid_standard_error"] = "frechet_distance_standard_error"
    found.figures = {named.get(name, name): value for name, value in found.figures.items()}
    return found


def _inception_score(logits: Tensor, found: Scores) -> None:
    from torch_fidelity.metric_isc import isc_features_to_metric

    if len(logits) < ISC_SPLITS:
        found.warnings.append(
            f"IS is not computed: {len(logits)} images are fewer than its {ISC_SPLITS} splits"
        )
        return
    found.figures |= isc_features_to_metric(logits)
    found.replicates["inception_score"] = is_replicates(logits)


def _frechet_distance(
    own: Tensor, stats: dict[str, np.ndarray], inception: bool, found: Scores
) -> None:
    if len(own) < 2:
        found.warnings.append("no Frechet distance is computed: a covariance takes two images")
        return
    found.figures["frechet_inception_distance"] = frechet(statistics(own), stats)
    found.warnings += _few_images(*own.shape, inception)
    replicates = fid_replicates(own, stats)
    if replicates is not None:
        found.replicates["fid"] = replicates
        found.figures["fid_standard_error"] = fid_error(replicates)


def _few_images(count: int, width: int, inception: bool) -> list[str]:
    if count <= width:
        return [
            f"{count} images are not more than the {width} features: the covariance is singular "
            "and FID far too large; compare it with nothing but the same number of images"
        ]
    if inception and count != FULL_COUNT:
        return [
            f"this is FID-{count}: FID falls with the number of images, so it is not comparable "
            "with the FID-50K of papers"
        ]
    return []


def statistics(features: Tensor) -> dict[str, np.ndarray]:
    """mu and sigma of [N, D], float64."""
    from torch_fidelity.metric_fid import fid_features_to_statistics

    found = fid_features_to_statistics(features)
    return {key: value.astype(np.float64) for key, value in found.items()}


def frechet(first: dict[str, np.ndarray], second: dict[str, np.ndarray]) -> float:
    from torch_fidelity.metric_fid import fid_statistics_to_metric

    return next(iter(fid_statistics_to_metric(first, second, False).values()))


def _kid(features: dict[str, Tensor], measure: Measure, found: Scores) -> None:
    from torch_fidelity.metric_kid import kid_features_to_metric

    layer = measure.extractor.layers.get("kid")
    if layer is None:
        return
    own, other = features[layer], measure.reference.features[layer]
    subset = min(KID_SUBSET, len(own), len(other))
    if subset < 2:
        found.warnings.append("KID is not computed: it needs two images on each side")
        return
    if subset < KID_SUBSET:
        found.warnings.append(
            f"KID is of subsets of {subset} images, not {KID_SUBSET}: its standard deviation is "
            "not comparable with others'"
        )
    found.settings["kid_subset_size"] = subset
    kid = kid_features_to_metric(own, other, kid_subset_size=subset, verbose=False)
    if subset == len(own) == len(other):
        del kid["kernel_inception_distance_std"]  # all subsets are the whole: it is rounding
    found.figures |= kid


def _precision_recall(features: dict[str, Tensor], measure: Measure, found: Scores) -> None:
    from torch_fidelity.metric_prc import prc_features_to_metric

    layer = measure.extractor.layers.get("prc")
    if layer is None:
        return
    own, other = features[layer], measure.reference.features[layer]
    if min(len(own), len(other)) < 4:  # the third neighbour beside itself
        found.warnings.append("precision and recall need four images on each side")
        return
    in_parts = max(len(own), len(other)) > PRC_IN_MEMORY
    found.figures |= prc_features_to_metric(own, other, save_cpu_ram=in_parts, verbose=False)


def prepare_by_flags(
    args: argparse.Namespace, size: int, device: torch.device, folder_follows: bool = False
) -> Measure | None:
    """`prepare` for scripts with `util.args.add_metric_flags`."""
    return prepare(
        args.fid_stats,
        args.inception_weights,
        device,
        wanted=not args.no_metrics,
        feature_extractor=args.feature_extractor,
        size=size,
        folder_follows=folder_follows,
    )


def prepare(
    fid_stats: str | None,
    inception_weights: str | None,
    device: torch.device,
    wanted: bool = True,
    feature_extractor: str = INCEPTION,
    size: int | None = None,
    folder_follows: bool = False,
) -> Measure | None:
    """What can be measured here; what cannot is said in one line, with the remedy.

    Files are checked before the first image is made. fid_stats: None takes ADM's if it is there
    and the extractor is Inception. size: of the images, so that another one is noticed.
    folder_follows: `compare_with_folder` will give the reference, so none is missing.
    """
    if not wanted:
        return None
    inception = feature_extractor == INCEPTION
    if fid_stats is None and inception and not folder_follows and ADM_STATISTICS.is_file():
        fid_stats = str(ADM_STATISTICS)
    stats = None
    if fid_stats is not None and inception:  # before the weights, which may be a download
        stats = load_fid_statistics(fid_stats)
    extractor = load_extractor(feature_extractor, inception_weights, device)
    if extractor is None:
        return None
    if fid_stats is None:
        if not folder_follows:
            dist.print_main(
                "FID is not computed: no statistics; put ADM's adm_in256_stats.npz into fid_stats/ "
                "or name an npz file with mu and sigma with --fid_stats"
            )
        return Measure(extractor, Reference(None, {}))
    if "fid" not in extractor.layers:
        raise UserError(
            f"--fid_stats {fid_stats}: --feature_extractor {feature_extractor} declares no layer "
            "for a Frechet distance; leave --fid_stats out"
        )
    if stats is None:
        stats = load_fid_statistics(fid_stats, extractor.width("fid", size))
    identity = extractor.identity() | {"layer": extractor.layers["fid"]}
    record, warnings = check_statistics(fid_stats, identity, size, len(stats["mu"]))
    for warning in warnings:
        dist.print_main(f"warning: {warning}")
    return Measure(extractor, Reference(stats, record))


def compare_with_folder(
    measure: Measure,
    folder: str | Path,
    size: int,
    cache: Path,
    loading: Loading = LOADING,
) -> Measure:
    """The same measure with real images as its reference; all processes take part.

    folder: of images, or an npz file of them. FID stays the distance to the file of statistics if
    there is one. cache: a folder for the features, which a restart finds again. Raises UserError
    if there are too few.
    """
    files = open_images(folder)
    extractor = measure.extractor
    key = listing_digest(Path(folder), files)
    smaller = dist.gather_objects(upsampled(files, size) if dist.is_main() else None)[0]
    if smaller:
        dist.print_main(
            f"warning: --fid_reference {folder}: {smaller} and are enlarged: figures measure the "
            "blur of that too"
        )
    name = f"{extractor.label}-{size}px-{key[:12]}"
    features = folder_features(
        extractor, files, size, FeatureStore(cache / name), REFERENCE_BATCH, loading
    )
    record = {"fid_reference": str(folder), "listing_sha256": key}
    stats = measure.stats
    if features is not None:
        record["images"] = len(next(iter(features.values())))  # those that could be read
    if features is not None and stats is None and "fid" in extractor.layers:
        own = features[extractor.layers["fid"]]
        if len(own) < 2:
            raise UserError(f"--fid_reference {folder}: a covariance takes two images")
        if len(own) <= own.shape[1]:
            print(
                f"warning: --fid_reference {folder}: {len(own)} images are not more than the "
                f"{own.shape[1]} features: their covariance is singular and FID far too large",
                flush=True,
            )
        stats = statistics(own)
    return Measure(extractor, Reference(stats, measure.reference.record | record, features))
