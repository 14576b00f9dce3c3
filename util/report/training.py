"""The report's sections of a training: curves, held-out loss, previews, levels, configuration."""

import math
import re
from collections.abc import Sequence
from html import escape

from util.preview import about_average, initial_share
from util.report.charts import Series, chart, colour, ramp, thinned
from util.report.html import Section, facts, figure, more, note, picture, table, tabs, viewer
from util.report.run import Training

FRAMES = 16  # previews in the page, spread over the run
CURVES = {  # of the training itself, in the order of the page; the loss has a chart of its own
    "train/lr": "learning rate",
    "train/grad_norm": "gradient norm, before clipping",
    "train/skipped_steps": "skipped steps",
    "speed/images_per_second": "images a second",
    "speed/data_wait_percent": "waiting for data, % of the time",
    "speed/tflops_per_device": "TFLOP/s of each device",
    "speed/percent_of_peak": "of the device's peak, %",
    "speed/memory_gib": "memory, GiB",
}
OWN = ("train/loss", "heldout", "levels/", "eval/")  # tags that have other places
WEIGHTS = (("ema", "averaged weights"), ("raw", "raw weights"))


def sections(training: Training, name: str) -> list[Section]:
    """name: of its folder within the whole; empty for the whole."""
    after = f": {name}" if name else ""
    made = [Section(f"Training{after}", _curves(training))]
    for title, body in (
        ("Held-out loss", _held_out(training)),
        ("Images over time", _previews(training)),
        ("Use of the levels", _levels(training)),
        ("Evaluations while training", _evaluations(training)),
    ):
        if body:
            made.append(Section(f"{title}{after}", body))
    return made


def headline(training: Training) -> list[tuple[str, str]]:
    """(figure, what it is) for the cards."""
    found = []
    loss = training.scalars.get("train/loss")
    if loss:
        step, value = loss[-1]
        found.append((f"{step:,}", f"steps{_of_all(training)}"))
        found.append((f"{value:.3f}", "training loss, nats a channel"))
    for key, text in WEIGHTS[:1]:
        held_out = training.scalars.get(f"heldout/loss_{key}")
        if held_out:
            found.append((f"{held_out[-1][1]:.3f}", f"held-out loss, {text}"))
    speed = [value for _, value in training.scalars.get("speed/images_per_second", [])]
    if speed:
        found.append((figure(sorted(speed)[len(speed) // 2]), "images a second, median"))
    return found


def _of_all(training: Training) -> str:
    epochs, schedule = training.flags.get("epochs"), training.facts.get("schedule")
    if not isinstance(epochs, int) or not isinstance(schedule, dict):
        return ""
    global_batch = schedule.get("batch_size", 0) * schedule.get("micro_batches", 0)
    if not global_batch:
        return ""
    return f" of {epochs * (schedule.get('images', 0) // global_batch):,}"


def _line(training: Training, tag: str, name: str, number: int, **style) -> Series:
    points, band = thinned(training.scalars.get(tag, []))
    return Series(name, points, colour(number), band, **style)


def _curves(training: Training) -> str:
    scalars = training.scalars
    if "train/loss" not in scalars:
        return note(
            "No curves: there are no TensorBoard events of a training here (see --log_dir)."
        )
    loss = [
        _line(training, "train/loss", "training", 0),
        _line(training, "heldout/loss_raw", "held out, raw weights", 1, dots=True),
        _line(training, "heldout/loss_ema", "held out, averaged weights", 2, dots=True),
    ]
    small = [
        chart(text, [_line(training, tag, "", 0)])
        for tag, text in CURVES.items()
        if tag in scalars and not _constant_zero(scalars[tag])
    ]
    others = sorted(t for t in scalars if t not in CURVES and not t.startswith(OWN))
    small += [chart(_words(tag), [_line(training, tag, "", 0)]) for tag in others]
    levels = training.model.get("quant_levels", 0)
    guess = (
        f" A blind guess among {levels} levels costs {math.log(levels):.2f}."
        if isinstance(levels, int) and levels > 0
        else ""
    )
    return (
        f"<p>Cross-entropy in nats for each masked token and channel.{guess}</p>"
        + chart("loss", loss, tall=True)
        + f'<div class="grid">{"".join(small)}</div>'
    )


def _constant_zero(points: Sequence[tuple[int, float]]) -> bool:
    return all(value == 0 for _, value in points)


def _words(tag: str) -> str:
    return tag.split("/", 1)[-1].replace("_", " ")


def _held_out(training: Training) -> str:
    if "heldout/loss_raw" not in training.scalars:
        return note(
            "No held-out loss: the run had no held-out images (--val_path, --val_cached_path or "
            "--holdout)."
        )
    ratios = [(text, _by_ratio(training, key)) for key, text in WEIGHTS]
    return (
        "<p>On images that training never sees, with the same masks and noise at every look. "
        "A ratio of 1.00 hides all of an image, 0.25 a quarter. What a model learns to use of the "
        "visible part shows as a lower loss at low ratios; those below --mask_ratio_min are never "
        "trained on, but sampling ends there.</p>"
        f"<h3>By mask ratio</h3>{tabs(ratios)}<h3>By channel, at the last look</h3>"
        + tabs(
            [
                ("in the head's order", _by_channel(training, "order")),
                ("in natural order", _by_channel(training, "channel")),
                ("over time", _channels_over_time(training)),
            ]
        )
    )


def _tagged(training: Training, prefix: str) -> list[tuple[str, list[tuple[int, float]]]]:
    """(what follows the prefix, points) of the scalars, sorted by name."""
    return [
        (tag.removeprefix(prefix), points)
        for tag, points in sorted(training.scalars.items())
        if tag.startswith(prefix)
    ]


def _by_ratio(training: Training, weights: str) -> str:
    found = _tagged(training, f"heldout_ratio_{weights}/")
    series = [
        Series(f"ratio {name}", thinned(points)[0], ramp(i, len(found)))
        for i, (name, points) in enumerate(found)
    ]
    return chart("held-out loss by mask ratio", series)


def _channel_names(names: Sequence[str]) -> list[str]:
    """ "03_channel_09", a place in the head's order, and "09" are both channel 9."""
    return [str(int(re.sub(r"^\d+_channel_", "", name))) for name in names]


def _by_channel(training: Training, order: str) -> str:
    series, names = [], []
    for number, (key, text) in enumerate(WEIGHTS):
        found = _tagged(training, f"heldout_{order}_{key}/")
        names = _channel_names([name for name, _ in found])
        points = [(float(i), values[-1][1]) for i, (_, values) in enumerate(found)]
        series.append(Series(text, points, colour(2 - number), dots=True))
    return chart("held-out loss of each channel", series, "channel", names, tall=True)


def _channels_over_time(training: Training) -> str:
    found = _tagged(training, "heldout_order_ema/")
    series = [
        Series(f"channel {name}", thinned(points)[0], ramp(i, len(found)))
        for i, (name, (_, points)) in enumerate(
            zip(_channel_names([name for name, _ in found]), found, strict=True)
        )
    ]
    return chart("held-out loss of each channel, averaged weights, head's order", series, tall=True)


def _previews(training: Training) -> str:
    images = training.images.get("preview/raw_and_average", [])
    if not images:
        return note(
            "No preview images: the run was told not to draw any (--preview_freq 0), or its cached "
            "latents came without a VAE (--vae_path)."
        )
    chosen = sorted({round(i * (len(images) - 1) / (FRAMES - 1)) for i in range(FRAMES)})
    rate = training.flags.get("ema_rate")
    frames = []
    for step, content in (images[i] for i in chosen):
        label = f"step {step:,}"
        if isinstance(rate, float) and initial_share(rate, step) >= 0.005:
            label += f" · {initial_share(rate, step):.0%} of the average are initial weights"
        frames.append((label, picture(content, f"previews after step {step}", "picture")))
    first = images[0][0]
    age = note(about_average(rate, first)) if isinstance(rate, float) else ""
    return (
        "<p>The same classes and seeds at every look: raw weights on the left, their average on "
        f"the right. Move the slider.</p>{viewer(frames)}{age}"
    )


def _levels(training: Training) -> str:
    found = {
        name: training.histograms.get(f"levels/{name}", [])
        for name in ("data", "generated_raw", "generated_ema")
    }
    if not all(found.values()):
        return ""
    styles = (
        ("data", "training data", dict(colour=colour(5), filled=True)),
        ("generated_raw", "generated, raw weights", dict(colour=colour(1))),
        ("generated_ema", "generated, averaged weights", dict(colour=colour(2))),
    )
    series, levels = [], 0
    for key, text, style in styles:
        counts = found[key][-1][1]
        levels = max(levels, len(counts))
        total = sum(counts) or 1.0
        points = [(float(i), 100 * count / total) for i, count in enumerate(counts)]
        series.append(Series(text, points, **style))
    bits = [
        _line(training, f"levels/entropy_{key}", text, (5, 1, 2)[i], dashed=key == "data")
        for i, (key, text, _) in enumerate(styles)
    ]
    names = [str(i) for i in range(levels)]
    return (
        "<p>How often each level of the quantizer comes up, in % of all latent scalars: in "
        "training data, and in the images drawn at the last look. Entropy is the mean over the "
        "channels.</p>"
        + '<div class="grid">'
        + chart("use of the levels", series, "level", names, zero=True)
        + chart("entropy, bits", bits)
        + "</div>"
    )


def _evaluations(training: Training) -> str:
    tags = [tag for tag in training.scalars if tag.startswith("eval/")]
    samples = training.images.get("eval/samples", [])
    if not tags and not samples:
        return ""
    charts = [chart(_words(tag), [_line(training, tag, "", 0, dots=True)]) for tag in sorted(tags)]
    frames = [
        (f"step {step:,}", picture(content, f"samples after step {step}", "picture"))
        for step, content in samples[-FRAMES:]
    ]
    grids = viewer(frames) if frames else ""
    return f'<div class="grid">{"".join(charts)}</div>{grids}'


# --- configuration and environment


def configuration(training: Training, defaults: dict) -> str:
    """Flags and model; those that differ from the defaults first."""
    flags, model = training.flags, training.model
    if not flags and not model:
        return note("Neither a checkpoint nor the events say with which flags this was run.")
    unset = object()
    changed = {k: v for k, v in flags.items() if defaults.get(k, unset) != v}
    rest = {k: v for k, v in flags.items() if k not in changed}
    parts = []
    if flags:
        given = {f"--{name}": value for name, value in changed.items()}
        parts.append(f"<h3>Flags that differ from the defaults</h3>{facts(given)}")
        parts.append(more(f"the other {len(rest)} flags", facts(rest)))
    if model:
        parts.append(more("the model's settings", facts(model)))
    known = training.facts
    kept = {
        "checkpoint": known.get("file"),
        "step": known.get("step"),
        "classes": len(known["classes"]) if isinstance(known.get("classes"), list) else None,
        "SHA-256 of the VAE": known.get("vae_sha256"),
        "skipped steps": known.get("skipped_steps"),
    }
    if known:
        parts.append(f"<h3>Newest checkpoint</h3>{facts(kept)}")
    return "".join(parts)


def environment(training: Training) -> str:
    """A column for each time the run was started or gone on with; empty if none is known."""
    if not training.starts:
        return ""
    found = [about.get("environment", {}) for _, about in training.starts]
    names = list(dict.fromkeys(name for one in found for name in one))
    head = ["", *(f"from step {step:,}" for step, _ in training.starts)]
    rows = [[escape(name), *(escape(str(one.get(name, "–"))) for one in found)] for name in names]
    return table(head, rows)
