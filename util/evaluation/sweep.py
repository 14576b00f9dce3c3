"""Evaluate a checkpoint at every combination of the sampling settings, and compare them.

Image i is made of the same noise at every point of a sweep, so that points are compared in pairs:
the error of a difference comes from the replicates of both (metrics.py).
"""

import argparse
from pathlib import Path

import numpy as np
import torch

from models.tokenizers.tokenizer import Tokenizer
from util import dist
from util.args import EVALUATION_CONFIG, value
from util.data.images import save_png
from util.device import Precision, accelerate, resolve_precision
from util.evaluation.evaluator import Evaluator
from util.evaluation.folder import GRID, METRICS, read_json, read_png, write_csv, write_plot
from util.evaluation.metrics import fid_error, is_error
from util.evaluation.reference import prepare_measure
from util.evaluation.settings import SWEPT, EvalSettings
from util.files import sha256
from util.logging import MetricsFile, settings_saved
from util.posthoc_ema import PosthocEMA
from util.setup import build_model, open_evaluated

DISTANCES = ("fid", "frechet_distance", "fd_dinov2")  # the name depends on the network
SCORES = ("inception_score_mean", "score_mean")
PLOTTED = (*DISTANCES, "sfid", *SCORES, "precision", "recall", "density", "coverage")
SHOWN = 8  # images of each point in sweep_images.png


def evaluate_checkpoint(
    args: argparse.Namespace, device: torch.device, precision: Precision
) -> dict:
    """Evaluate --resume at all points; returns their figures on the main process."""
    inputs = open_evaluated(args)
    checkpoint, config = inputs.checkpoint, inputs.config
    points = EvalSettings.of(args, config.class_num, checkpoint.classes)
    averages = PosthocEMA(checkpoint) if args.ema_sigma else None
    key = "model" if averages else checkpoint.key(args.eval_weights)
    model = build_model(config, checkpoint, key).to(device)
    accelerate(model, device, args.compile, args.cuda_graphs)
    tokenizer = Tokenizer(inputs.vae, *config.latent_norm).to(device)
    tokenizer.decode_dtype = resolve_precision(args.vae_precision, device, args.tf32).dtype
    output = Path(args.output_dir)
    measure = prepare_measure(args, config.img_size, device, output / "reference_features")
    dist.print_main(f"{points[0].weights} weights of {checkpoint.path}")
    files = {"vae": {"path": value(args, "vae_path"), "sha256": inputs.data.vae_sha256}}
    if dist.is_main():
        files["checkpoint"] = {"path": str(checkpoint.path), "sha256": sha256(checkpoint.path)}
    if measure is not None and args.inception_weights is not None:
        sha = measure.extractor.weights_sha256
        files["extractor"] = {"path": args.inception_weights, "sha256": sha}
    evaluator = Evaluator(model, tokenizer, device, precision, measure)
    if averages is None:
        checkpoint.release()
        evaluator.refuse_other_images(points, output)
    result = {"checkpoint": str(checkpoint.path), "step": checkpoint.saved.get("step")}
    result["evaluations"], rows, weights = [], [], None
    metrics_file = MetricsFile(args.metrics_file)
    with settings_saved(args, output / EVALUATION_CONFIG):
        for done, point in enumerate(points, start=1):
            name = point.folder_name()
            if averages is not None and point.weights != weights:
                weights = point.weights
                averages.checkpoint_of(point.sigma).load_into(model, "model_ema")
            if len(points) > 1:
                dist.print_main(f"{done} of {len(points)}: {name}")
            figures, _ = evaluator.evaluate(point, output / name, {"files": files})
            named = {f"eval/{name}/{key}": figure for key, figure in figures.items()}
            metrics_file.write(named, result["step"], replace=True)
            if dist.is_main():
                record = read_json(output / name / METRICS)
                own = {"folder": str(output / name), "settings": point.to_dict()}
                own |= {key: record[key] for key in ("metrics", "warnings")}
                result["evaluations"].append(own)
                more = {"folder": name, "replicates": record["replicates"]}
                rows.append(point.swept() | record["metrics"] | more)
                if len(points) > 1:
                    write_sweep(output, rows, config.img_size)
    dist.barrier()
    return result if dist.is_main() else {}


def write_sweep(output: Path, rows: list[dict], side: int) -> None:
    """sweep.csv, sweep.png and sweep_images.png. rows: of the points that are done, with figures,
    replicates and the folder's name; side: of an image.
    """
    rows = compared([dict(row) for row in rows])
    names = dict.fromkeys(name for row in rows for name in row)
    names = [*(name for name in names if name not in ("replicates", "folder")), "folder"]
    write_csv(output / "sweep.csv", rows, names)
    # The same images at every point, a row for each.
    grids = [read_png(output / row["folder"] / GRID) for row in rows]
    width = min(grids[0].shape[2], SHOWN * (side + 2) + 2)  # grid() pads by two
    save_png(torch.cat([g[:, : side + 4, :width] for g in grids], 1), output / "sweep_images.png")
    plot_sweep(rows, output / "sweep.png")


def compared(rows: list[dict]) -> list[dict]:
    """The rows with their difference from the best one and its standard error.

    The best has the lowest Frechet distance, or, where none was computed, the highest score.
    """
    distance = next((name for name in DISTANCES if name in rows[0]), None)
    score = next((name for name in SCORES if name in rows[0]), None)
    if distance is None and score is None:
        return rows
    best = min(rows, key=lambda row: row[distance] if distance else -row[score])
    spatial = "sfid" if all("sfid" in row for row in rows) else None  # older points have none
    pairs = [(distance, "fid", fid_error), (spatial, "sfid", fid_error)]
    pairs += [(score, "inception_score", is_error)]
    for row in rows:
        row["best"] = int(row is best)
        for name, replicates, error in pairs:
            if name is None:
                continue
            row[f"{name}_difference"] = row[name] - best[name]
            own, other = (x["replicates"].get(replicates) for x in (row, best))
            if own and other:
                row[f"{name}_difference_error"] = error(np.subtract(own, other).tolist())
    return rows


def plot_sweep(rows: list[dict], path: Path) -> None:
    """Each figure over the setting with the most values; a line for each choice of the others."""
    swept = [name for name in (*SWEPT, "ema_sigma") if name in rows[0]]
    axis = max(swept, key=lambda name: len({row[name] for row in rows}))
    others = [name for name in swept if len({r[name] for r in rows}) > 1 and name != axis]
    lines: dict[str, list[dict]] = {}
    for row in sorted(rows, key=lambda row: row[axis]):
        lines.setdefault(", ".join(f"{name} {row[name]:g}" for name in others), []).append(row)
    write_plot(path, PLOTTED, axis, lines)
