"""What the page says of trainings, evaluations with their sweeps, and reconstructions."""

import io
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from markupsafe import Markup

from util.args import train_parser
from util.evaluation.settings import SWEPT
from util.evaluation.sweep import PLOTTED, compared
from util.report.load import Runs, Training
from util.report.page import SERIES, Curve, Section, chart, figure, picture

GRID = "grid.png"  # images of an evaluation or a reconstruction
FRAMES = 16  # pictures of a training, spread over it
WEIGHTS = {"ema": "averaged weights", "raw": "raw weights"}
STYLES = {
    "data": {"color": SERIES[3], "linewidth": 4, "alpha": 0.5},
    "raw": {"color": SERIES[1], "marker": "o"},
    "ema": {"color": SERIES[2], "marker": "o"},
}
CARDS = {
    "train/loss": "training loss after {:,} steps",
    "validation/loss_ema": "validation loss, averaged weights",
    "speed/images_per_second": "images a second",
}
TITLES = {
    "fid": "FID",
    "rfid": "rFID",
    "ssim": "SSIM",
    "psnr": "PSNR, dB",
    "num_iter": "iterations",
    "inception_score_mean": "IS",
    "kernel_inception_distance_mean": "KID",
    "frechet_distance": "Fréchet distance",
    "reconstruction_frechet_distance": "Fréchet distance to the crops",
}


def sections(runs: Runs) -> list[Section]:
    """All that a folder holds, in the order in which one looks at it."""
    made = []
    for parts, make in (
        (runs.trainings, training_sections),
        (runs.evaluations, evaluation_sections),
        (runs.reconstructions, reconstruction_sections),
        (runs.trainings, settings_sections),
    ):
        for name, part in parts.items():
            after = f": {name}" if name and len(parts) > 1 else ""
            with runs.reading(Path(name)):  # a record may lack what its kind has
                made += [replace(section, title=section.title + after) for section in make(part)]
    return [*made, Section("Not shown", notes=runs.unreadable)] if runs.unreadable else made


def cards(runs: Runs) -> list[tuple[str, str]]:
    """(figure, what it is): the best distance, and where the trainings ended."""
    points = [point["metrics"] for found in runs.evaluations.values() for point in found]
    made = []
    for name in ("fid", "frechet_distance"):
        if values := [one[name] for one in points if isinstance(one.get(name), float)]:
            made.append((f"{min(values):.2f}", f"{TITLES[name]}, the lowest"))
    for training in runs.trainings.values():
        for tag, text in CARDS.items():
            for step, value in training.scalars.get(tag, [])[-1:]:
                made.append((figure(value), text.format(step)))
    return made


def training_sections(training: Training) -> list[Section]:
    made = [losses(training), validation(training), images(training)]
    return [*made, levels(training)] if training.histograms else made


def losses(training: Training) -> Section:
    """The loss, and all that was logged beside it."""
    scalars = training.scalars
    if "train/loss" not in scalars:
        note = "No curves: there are no TensorBoard events of a training here (see --log_dir)."
        return Section("Training", notes=[note])
    loss = [Curve("training", scalars["train/loss"])]
    for key, name in WEIGHTS.items():
        points = scalars.get(f"validation/loss_{key}", [])
        loss.append(Curve(f"validation, {name}", points, STYLES[key]))
    small = [
        chart(tag.replace("_", " "), [Curve("", points)])
        for tag, points in sorted(scalars.items(), reverse=True)
        if not tag.startswith(("train/loss", "validation", "levels/")) and any(y for _, y in points)
    ]
    text = "Cross-entropy in nats for each masked token and channel."
    if levels := training.settings("model", "config").get("quant_levels"):
        text += f" A blind guess among {levels} levels costs {math.log(levels):.2f}."
    return Section("Training", text, charts=[chart("loss", loss, wide=True), *small])


def validation(training: Training) -> Section:
    scalars = training.scalars
    if "validation/loss_raw" not in scalars:
        flags = "--val_path, --val_cached_path or --holdout"
        note = f"No validation loss: the run had no validation images ({flags})."
        return Section("Validation loss", notes=[note])
    text = (
        "On images that training never sees, with the same masks and noise every time. A ratio of "
        "1.00 hides all of an image. What a model learns to use of the visible part shows as a "
        "lower loss at low ratios, which are never trained on below --mask_ratio_min."
    )
    tabs = []
    groups = {"ratio": "mask ratio", "order": "channel as predicted", "channel": "channel"}
    for group, title in groups.items():
        for key, weights in WEIGHTS.items():
            prefix = f"validation_{group}_{key}/"  # "03_channel_09" follows, of the head's fourth
            tags = sorted(tag for tag in scalars if tag.startswith(prefix))
            curves = [Curve(re.split("[/_]", tag)[-1], scalars[tag]) for tag in tags]
            tabs.append((f"{title}, {weights}", chart(f"by {title}, {weights}", curves, wide=True)))
    return Section("Validation loss", text, tabs=tabs)


def images(training: Training) -> Section:
    found = [(step, tag, file) for tag, files in training.images.items() for step, file in files]
    if not found:
        note = "No images: none were drawn (--preview_freq 0, or latents without --vae_path)."
        return Section("Images over time", notes=[note])
    text = (
        "The same classes and seeds every time: raw weights on the left, their average on the "
        "right, whose images are grey or black while most of it is initial weights."
    )
    tabs = [
        (f"{step:,}", picture(io.BytesIO(file), f"{tag} after step {step}"))
        for step, tag, file in found[:: -math.ceil(len(found) / FRAMES)][::-1]
    ]
    return Section("Images over time", text, tabs=tabs, chosen=len(tabs) - 1)


def levels(training: Training) -> Section:
    text = "Of the quantizer, in training data and in the images that were drawn last."
    shares, bits = [], []
    for key in ("data", "generated_raw", "generated_ema"):
        name, style = key.replace("_", ", "), STYLES[key.rpartition("_")[2]]
        counts = training.histograms.get(f"levels/{key}", [(0, [])])[-1][1]
        points = [(level, 100 * count / sum(counts)) for level, count in enumerate(counts)]
        shares.append(Curve(name, points, style))
        bits.append(Curve(name, training.scalars.get(f"levels/entropy_{key}", []), style))
    charts = [chart("use of the levels, %", shares, "level"), chart("entropy, bits", bits)]
    return Section("Use of the levels", text, charts=charts)


def settings_sections(training: Training) -> list[Section]:
    """Flags, those that differ from the defaults first; model; checkpoint; every start."""
    flags, model = training.settings("flags", "args"), training.settings("model", "config")
    if not flags and not model:
        note = "Neither a checkpoint nor the events say with which flags this was run."
        return [Section("Configuration", notes=[note])]
    usual = vars(train_parser("").parse([]))
    changed = {f"--{k}": v for k, v in flags.items() if k not in usual or usual[k] != v}
    rest = {f"--{k}": v for k, v in flags.items() if f"--{k}" not in changed}
    plain = {k: v for k, v in training.checkpoint.items() if not isinstance(v, dict)}
    folds = {"the other flags": rest, "the model": model, "the newest checkpoint": plain}
    made = [Section("Configuration", rows=list(changed.items()), folds=folds)]
    if training.starts:
        found = [about.get("environment", {}) for _, about in training.starts]
        names = dict.fromkeys(name for environment in found for name in environment)
        rows = [[name, *(environment.get(name) for environment in found)] for name in names]
        head = ["", *(f"from step {step:,}" for step, _ in training.starts)]
        made.append(Section("Environment", head=head, rows=rows))
    return made


def evaluation_sections(records: Sequence[dict]) -> list[Section]:
    """A point, or the points of a sweep: figures with errors, curves, images, provenance."""
    settings = [{"weights": "ema"} | record.get("settings", {}) for record in records]
    known = dict.fromkeys(name for one in settings for name in one)
    varied = [name for name in known if len({str(one.get(name)) for one in settings}) > 1]
    rows = []
    for record, one in zip(records, settings, strict=True):
        shown = {name: one.get(name) for name in dict.fromkeys((*SWEPT, "num_images", *varied))}
        rows.append(shown | record["metrics"] | {"replicates": record.get("replicates", {})})
    if len(rows) > 1 and len({(*r["metrics"], str(r.get("classes"))) for r in records}) == 1:
        rows = compared(rows)
    names = list(dict.fromkeys(name for row in rows for name in row))
    names = [n for n in names if n not in ("replicates", "best", *map(_error, names))]
    best = next((i for i, row in enumerate(rows) if row.get("best")), None)
    notes = [warning for record in records for warning in record.get("warnings", [])]
    notes += [] if any(record["metrics"] for record in records) else ["Nothing was measured."]
    return [
        Section(
            "Evaluation",
            notes=list(dict.fromkeys(notes)),
            head=[_title(name) for name in names],
            rows=[[_with_error(row, name) for name in names] for row in rows],
            best=best,
            charts=sweep_charts(rows, varied),
            tabs=[(one["folder"].name, picture(one["folder"] / GRID, GRID)) for one in records],
            chosen=best or 0,
            folds={f"all about {record['folder'].name}": record for record in records},
        )
    ]


def sweep_charts(rows: Sequence[dict], varied: Sequence[str]) -> list[Markup]:
    """Each figure over the setting with the most values; a curve for each choice of the others."""
    axis = max(SWEPT, key=lambda name: len({row[name] for row in rows}))
    charts = []
    for name in (name for name in PLOTTED if axis in varied and all(name in row for row in rows)):
        curves: dict[str, Curve] = {}
        for row in sorted(rows, key=lambda row: row[axis]):
            label = ", ".join(f"{_title(n)} {figure(row[n])}" for n in varied if n != axis)
            curve = curves.setdefault(label, Curve(label, [], {"marker": "o", "yerr": []}))
            curve.points.append((row[axis], row[name]))
            curve.style["yerr"].append(row.get(_error(name), 0))
        charts.append(chart(_title(name), list(curves.values()), _title(axis)))
    return charts


def _title(name: str) -> str:
    if name.endswith("_difference"):
        return f"{_title(name.removesuffix('_difference'))}, from the best"
    return TITLES.get(name, name.removesuffix("_mean").replace("_", " "))


def _error(name: str) -> str:
    """The name of the figure that says how sure another one is."""
    if name.endswith("_mean"):
        return name.removesuffix("_mean") + "_std"
    return f"{name}_error" if name.endswith("_difference") else f"{name}_standard_error"


def _with_error(row: dict, name: str) -> str:
    error = f" ± {row[_error(name)]:.2g}" if _error(name) in row else ""
    return figure(row.get(name)) + error


def reconstruction_sections(record: dict) -> list[Section]:
    """Figures by the number of bits, at last without a quantizer; images; provenance."""
    results = sorted(record["results"], key=lambda result: result["bits"] % math.inf)
    names = dict.fromkeys(n for r in results for n, value in r.items() if isinstance(value, float))
    quantized = [result for result in results if result["bits"] > 0]
    charts = []
    for name in names:
        points = [(result["bits"], result[name]) for result in quantized if name in result]
        charts.append(chart(_title(name), [Curve("", points, {"marker": "o"})], "bits"))
    by_channel = [
        Curve(f"{result['bits']} bits", list(enumerate(result["entropy_bits_by_channel"])))
        for result in quantized
        if "entropy_bits_by_channel" in result
    ]
    order = ["original", "continuous", *(r["name"] for r in record["results"] if r["bits"] > 0)]
    return [
        Section(
            "Reconstruction",
            "What quantization alone costs: images through the VAE, every latent channel rounded "
            f"to 2^bits levels. Rows of the images: {', '.join(order)}.",
            head=["", *map(_title, names)],
            rows=[[result["name"], *(result.get(name) for name in names)] for result in results],
            charts=[*charts, chart("entropy of the channels, bits", by_channel, "channel")],
            tabs=[("images", picture(record["folder"] / GRID, GRID))],
            folds={"all about it": record},
        )
    ]
