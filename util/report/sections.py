"""What the page says of trainings, evaluations with their sweeps, and reconstructions."""

import io
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from util.args import train_parser
from util.evaluation.settings import SWEPT
from util.evaluation.sweep import compared
from util.report.load import Runs, Training
from util.report.page import Section, chart, figure, picture

GRID = "grid.png"  # images of an evaluation or a reconstruction
FRAMES = 16  # pictures of a training, spread over it
LOSSES = {  # of the heads; those that are not here have the channel head's
    "channel": "Cross-entropy in nats for each masked token and channel; a blind guess costs ln K.",
    "masked": "Cross-entropy in nats of masked channels, and a tenth of that of visible ones.",
    "mixture": "Negative log-likelihood of a density, in nats for each masked token.",
    "diffusion": "Squared error of the noise, and a bound, for each masked token and channel.",
    "codebook": "Cross-entropy in nats for each masked token; a blind guess costs ln K.",
}
WEIGHTS = {"raw": "raw weights", "ema": "averaged weights"}
GROUPS = {"ratio": "mask ratio", "channel": "channel"}
ERRORS = ("_standard_error", "_std", "_error")  # ends of the names of figures' errors


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


def training_sections(training: Training) -> list[Section]:
    made = [losses(training), validation(training), images(training)]
    return [*made, levels(training)] if training.histograms else made


def losses(training: Training) -> Section:
    """The loss, and all that was logged beside it."""
    scalars = training.scalars
    if "train/loss" not in scalars:
        return Section("Training", notes=["No TensorBoard events of a training; see --log_dir."])
    loss = {"training": scalars["train/loss"]}
    for key, name in WEIGHTS.items():
        loss[f"validation, {name}"] = scalars.get(f"validation/loss_{key}", [])
    small = [
        chart(tag.replace("_", " "), {"": points})
        for tag, points in sorted(scalars.items(), reverse=True)
        if not tag.startswith(("train/loss", "validation", "levels/")) and any(y for _, y in points)
    ]
    text = LOSSES.get(training.model.get("head"), LOSSES["channel"])
    return Section("Training", text, charts=[chart("loss", loss, wide=True), *small])


def validation(training: Training) -> Section:
    scalars = training.scalars
    if "validation/loss_raw" not in scalars:
        return Section("Validation loss", notes=["No validation images; see --holdout."])
    text = (
        "On images that training never sees, with the same masks and noise every time. A ratio of "
        "1.00 hides all of an image; those below --mask_ratio_min are never trained on."
    )
    strip = []
    for group, title in GROUPS.items():
        for key, weights in WEIGHTS.items():
            prefix = f"validation_{group}_{key}/"
            tags = sorted(tag for tag in scalars if tag.startswith(prefix))
            curves = {tag.removeprefix(prefix): scalars[tag] for tag in tags}
            strip.append(("", chart(f"by {title}, {weights}", curves, wide=True)))
    return Section("Validation loss", text, strip=strip)


def images(training: Training) -> Section:
    found = [(step, tag, file) for tag, files in training.images.items() for step, file in files]
    if not found:
        return Section("Images over time", notes=["No images; see --preview_freq and --vae_path."])
    text = (
        "The newest first; the same classes and seeds every time: raw weights on the left, their "
        "average on the right, whose images are grey or black while most of it is initial weights."
    )
    strip = [
        (f"step {step:,}", picture(io.BytesIO(file), f"{tag} after step {step}"))
        for step, tag, file in found[:: -math.ceil(len(found) / FRAMES)]
    ]
    return Section("Images over time", text, strip=strip)


def levels(training: Training) -> Section:
    shares, bits = {}, {}
    for key in ("data", "generated_raw", "generated_ema"):
        name = key.replace("_", ", ")
        for _, found in training.histograms.get(f"levels/{key}", [])[-1:]:
            bins, total = zip(found.bucket_limit, found.bucket, strict=True), sum(found.bucket)
            shares[name] = [(round(edge - 0.5), 100 * n / total) for edge, n in bins if edge > 0]
        bits[name] = training.scalars.get(f"levels/entropy_{key}", [])
    charts = [chart("use of the levels, %", shares, "level"), chart("entropy, bits", bits)]
    return Section("Use of the levels", "Of the images that were drawn last.", charts=charts)


def settings_sections(training: Training) -> list[Section]:
    """Flags, those that differ from the defaults first; model; checkpoint; every start."""
    if not training.flags and not training.model:
        return [Section("Configuration", notes=["Neither checkpoint nor events say the flags."])]
    usual = vars(train_parser("").parse([]))
    flags = {f"--{name}": value for name, value in training.flags.items()}
    changed = {k: v for k, v in flags.items() if k[2:] not in usual or usual[k[2:]] != v}
    rest = {k: v for k, v in flags.items() if k not in changed}
    saved = {k: v for k, v in training.checkpoint.items() if not isinstance(v, dict)}
    folds = {"the other flags": rest, "the model": training.model, "the newest checkpoint": saved}
    made = [Section("Configuration", rows=list(changed.items()), folds=folds)]
    if training.environments:
        steps, environments = zip(*training.environments, strict=True)
        names = dict.fromkeys(name for environment in environments for name in environment)
        rows = [[name, *(environment.get(name) for environment in environments)] for name in names]
        head = ["", *(f"from step {step:,}" for step in steps)]
        made.append(Section("Environment", head=head, rows=rows))
    return made


def evaluation_sections(records: Sequence[dict]) -> list[Section]:
    """A point, or the points of a sweep: figures with errors, curves, images, provenance."""
    settings = [record.get("settings", {}) for record in records]
    known = dict.fromkeys(name for one in settings for name in one)
    varied = [name for name in known if len({str(one.get(name)) for one in settings}) > 1]
    rows = []
    for record, one in zip(records, settings, strict=True):
        shown = {name: one.get(name) for name in dict.fromkeys((*SWEPT, "num_images", *varied))}
        rows.append(shown | record["metrics"] | {"replicates": record.get("replicates", {})})
    if len(rows) > 1 and len({(*r["metrics"], str(r.get("classes"))) for r in records}) == 1:
        rows = compared(rows)
    names = dict.fromkeys(name for row in rows for name in row)
    names = [n for n in names if n not in ("replicates", "best") and not n.endswith(ERRORS)]
    strip = [(one["folder"].name, picture(one["folder"] / GRID, GRID)) for one in records]
    if (curves := records[0]["folder"].parent / "sweep.png").exists():
        strip.insert(0, ("all points", picture(curves, curves.name)))
    notes = dict.fromkeys(warning for record in records for warning in record.get("warnings", []))
    return [
        Section(
            "Evaluation",
            notes=list(notes),
            head=[name.removesuffix("_mean").replace("_", " ") for name in names],
            rows=[[with_error(row, name) for name in names] for row in rows],
            best=next((i for i, row in enumerate(rows) if row.get("best")), None),
            strip=strip,
            folds={f"all about {record['folder'].name}": record for record in records},
        )
    ]


def with_error(row: dict, name: str) -> str:
    errors = [row[n] for end in ERRORS if (n := name.removesuffix("_mean") + end) in row]
    return figure(row.get(name)) + "".join(f" ± {error:.2g}" for error in errors)


def reconstruction_sections(record: dict) -> list[Section]:
    """Figures by the number of bits, at last without a quantizer; images; provenance."""
    results = sorted(record["results"], key=lambda result: result["bits"] % math.inf)
    names = dict.fromkeys(n for r in results for n, value in r.items() if isinstance(value, float))
    quantized = [result for result in results if result["bits"] > 0]
    charts = [
        chart(name, {"": [(r["bits"], r[name]) for r in quantized if name in r]}, "bits")
        for name in names
    ]
    by_channel = {
        f"{result['bits']} bits": list(enumerate(result.get("entropy_bits_by_channel", [])))
        for result in quantized
    }
    order = ["original", "continuous", *(r["name"] for r in record["results"] if r["bits"] > 0)]
    return [
        Section(
            "Reconstruction",
            "What quantization alone costs: images through the VAE, every latent channel rounded "
            f"to 2^bits levels. Rows of the images: {', '.join(order)}.",
            head=["", *names],
            rows=[[result["name"], *(result.get(name) for name in names)] for result in results],
            charts=[*charts, chart("entropy of the channels, bits", by_channel, "channel")],
            strip=[("", picture(record["folder"] / GRID, GRID))],
            folds={"all about it": record},
        )
    ]
