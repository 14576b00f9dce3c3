"""The end of an evaluation, on the main process: figures, grid.png, samples.npz, metrics.json."""

import sys
from datetime import datetime, timezone

from torch import Tensor

from models.config import TokenBridgeConfig
from util import dist
from util.data.images import grid, save_png
from util.evaluation import metrics
from util.evaluation.features import wait_for
from util.evaluation.folder import EvaluationFolder, write_json, write_samples
from util.evaluation.metrics import Measure, Scores
from util.evaluation.reference import write_statistics
from util.provenance import git_revision, versions

GRID_ROWS, GRID_COLUMNS = 8, 10


def finish(
    place: EvaluationFolder,
    settings,
    config: TokenBridgeConfig,
    measure: Measure | None,
    facts: dict,
) -> None:
    """Write everything; metrics.json last, which says that the evaluation is finished.

    settings: an EvalSettings. facts: what metrics.json is to hold besides, as plain values.
    """
    labels = settings.labels(config.class_num)
    drawn, counts = (part.tolist() for part in labels.unique_consecutive(return_counts=True))
    keep = measure is None or settings.keep_images
    before = place.record()
    if before is not None and before["images"] == "kept":
        keep = True  # somebody asked for them
    if settings.save_npz and not place.samples.is_file():
        write_samples(place, labels.numpy(), config.img_size, dist.beat)
    if not place.grid.is_file():
        shown = shown_ids(labels)
        wait_for([place.image(i) for i in shown])
        save_png(grid(place.read_images(shown), min(len(drawn), GRID_COLUMNS)), place.grid)
    scores = measured(place, measure, config.img_size) if measure is not None else Scores()
    trained = len(settings.names) or config.class_num
    if scores.figures and len(drawn) < trained:
        scores.warnings.append(
            f"these figures are of {len(drawn)} of {trained} classes: compare them only "
            "with images of the same classes"
        )
    record = {
        "metrics": scores.figures,
        "warnings": scores.warnings,
        "images": "kept" if keep else "removed",
        "classes": [settings.name(label) for label in drawn],
        "labels": drawn,
        "counts": counts,
        **facts,
        "reference": measure.reference.record if measure is not None else None,
        "metric_settings": scores.settings,
        "replicates": scores.replicates,
        "versions": versions(),
        "git_revision": git_revision(),
        "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    write_json(place.metrics, record)


def measured(place: EvaluationFolder, measure: Measure, size: int) -> Scores:
    """The figures of all features; their mean and covariance are left as statistics.npz."""
    extractor = measure.extractor
    features = place.features(extractor).load(place.batches)
    dist.beat("computing the figures")
    scores = metrics.score(features, measure)
    if "fid" in extractor.layers:
        layer = extractor.layers["fid"]
        stats = metrics.statistics(features[layer])
        facts = extractor.identity() | {"layer": layer, "count": place.count, "img_size": size}
        write_statistics(place.path / "statistics.npz", stats, facts)
    return scores


def tell(place: EvaluationFolder) -> None:
    """What was found, and what became of the images: they go only where all else is written."""
    record = place.record()
    if place.images_were_removed():
        place.remove_images()
        fate = "removed, they are measured (--keep_images keeps them)"
    else:
        fate = f"kept in {place.path / 'images'}"
    print(f"{place.count} images {fate}; a first look: {place.grid}")
    for name, value in record["metrics"].items():
        shown = f"{name.upper()}-{count_name(place.count)}" if name == "fid" else name
        print(f"{shown}: {value:.4f}")
    for warning in record["warnings"]:
        print(f"warning: {warning}", file=sys.stderr, flush=True)


def count_name(count: int) -> str:
    """50000 -> "50K", as papers write it."""
    return f"{count // 1000}K" if count % 1000 == 0 else str(count)


def shown_ids(labels: Tensor) -> list[int]:
    """Images for a first look, a column for each of the first classes. labels: [N], of all."""
    counts = labels.unique_consecutive(return_counts=True)[1]
    firsts = (counts.cumsum(0) - counts)[:GRID_COLUMNS].tolist()
    rows = min(GRID_ROWS, int(counts[:GRID_COLUMNS].min()))
    return [first + k for k in range(rows) for first in firsts]
