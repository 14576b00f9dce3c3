"""The tables and charts of the comparison's results (demo/compare.py), for docs/method.md."""

from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev

import matplotlib
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from torch import Tensor
from torchvision.utils import make_grid

from util import ROOT
from util.files import atomic_write
from util.report.page import STYLE

GROUPS = {
    "heads": "The same optimizer steps",
    "time": "The same training time",
    "bits": "Number of levels (mixture, diffusion: continuous)",
    "range": "Range of the levels (channel: 5)",
    "order": "Order of the channels (channel: by frequency)",
    "size": "Width x depth of the head (channel: 64 x 2)",
    "masks": "Distribution of the training mask ratio (channel: normal)",
    "share": "Share of the masked positions in the loss, the same steps",
    "share-time": "Share of the masked positions in the loss, the same training time",
    "latents": "Normalisation of the latents (channel: one scale, published levels)",
    "sampling": "Ways to draw from the channel head",
}
SHOWN = {"epochs": "epochs", "seconds": "training, s", "tflop": "TFLOP"}
TIMED = ("time", "share", "share-time")  # tables in which it matters what training took
# Rows that tables take from other groups; those that are not here take the channel head's.
ABOVE = {"heads": {}, "sampling": {}, "share": {}, "share-time": {"share": ("1, rate x1",)}}
ABOVE["bits"] = {"heads": ("channel", "mixture", "diffusion")}
PAGES = {"sampling.md": ["sampling", "masks"], "tokenizers.md": ["latents"]}
PAGES["method.md"] = [name for name in GROUPS if name not in sum(PAGES.values(), [])]
MARKS = "<!-- results of demo.compare -->\n", "<!-- end of results -->\n"


def spread(values: list[float], error: float | None = None) -> str:
    """Mean and standard error, over seeds or, of a single one, what is known of it."""
    error = stdev(values) / len(values) ** 0.5 if len(values) > 1 else error
    return f"{mean(values):.4g}" + (f" ± {error:.2g}" if error is not None else "")


def costs(runs: list[dict]) -> dict[str, str]:
    """A row, by the table's head, of runs that differ in their seeds: what the head needs.

    Times are the first one's: others may have shared the machine.
    """
    draws, trains = [run["draw"] for run in runs], [run["train"] for run in runs]
    row = {"": runs[0]["label"], "parameters": f"{draws[0]['parameters'] / 1000:.0f} K"}
    for kind in ("training", "drawing"):
        row[f"MFLOP, {kind}"] = f"{draws[0][f'flops_{kind}'] / 1e6:.2f}"
    row["GiB"] = f"{max(train['memory_gib'] for train in trains):.2f}"
    row["ms a step"] = f"{1000 * trains[0]['step_seconds']:.0f}"
    for point in draws[0]["points"]:
        row[f"s / 100, {point['num_iter']}"] = f"{point['seconds_100']:.1f}"
    return row


def quality(runs: list[dict], group: str) -> dict[str, str]:
    """As `costs`, in the table of that group: what came of it."""
    head, row = runs[0]["head"], {"": runs[0]["label"], "seeds": f"{len(runs)}"}
    trains, draws = ([run[part] for run in runs if part in run] for part in ("train", "draw"))
    if group in TIMED:
        for column, digits in (("epochs", 0), ("seconds", 0), ("tflop", 2)):
            row[SHOWN[column]] = f"{mean(train[column] for train in trains):.{digits}f}"
    if group != "sampling":
        losses = [train["validation"][-1][1] for train in trains]
        if head == "mixture":  # of a token: a channel's is said
            losses = [loss / draws[0]["config"]["vae_embed_dim"] for loss in losses]
        row["validation loss"] = "–" if head in ("masked", "diffusion") else spread(losses)
    if group == "latents":
        row["entropy, bits"] = spread([train["entropy_bits"] for train in trains])
        row["out of range"] = f"{mean(train['out_of_range'] for train in trains):.2%}"
    if group.startswith("share"):
        return row
    for name in ("temperature", "cfg"):
        row[name] = ", ".join(f"{draw[name]:g}" for draw in draws)
    for points in zip(*(draw["points"] for draw in draws), strict=True):
        n, distances = points[0]["num_iter"], [point["frechet"] for point in points]
        if group == "sampling":
            row[f"evaluations, {n}"] = f"{points[0]['evaluations']}"
        row[f"Fréchet, {n}"] = spread(distances, points[0]["frechet_error"])
        row[f"accuracy, {n}"] = f"{mean(point['accuracy'] for point in points):.1%}"
    return row


def tables(results: dict, groups: Sequence[str] = tuple(GROUPS)) -> str:
    """Those groups that there are, in Markdown."""
    floor, about = results["floor"], results["about"]
    parts = ["These are of `--quick`: a few steps, poor images.", ""] if results["quick"] else []
    used = []
    for group in groups:
        labels = {}
        if not any(run["group"] == group for run in results["runs"]):
            continue
        for run in results["runs"]:
            repeated = ABOVE.get(group, {"heads": ("channel",)}).get(run["group"], ())
            if run["group"] == group or run["label"] in repeated:
                labels.setdefault(run["label"], []).append(run)
        used += sum(labels.values(), [])
        parts += [f"**{GROUPS[group]}**", ""]
        both = [[quality(same, group) for same in labels.values()]]
        both = [[*map(costs, labels.values())], *both] if group == "heads" else both
        for rows in both:
            lines = [[*rows[0]], ["---"] * len(rows[0]), *(row.values() for row in rows)]
            parts += [*(f"| {' | '.join(line)} |" for line in lines), ""]
    if not used:
        return ""
    real = spread([floor["frechet"]], floor["frechet_error"])
    made = [run[part]["commit"] for run in used for part in ("train", "draw") if part in run]
    where = f"{about['processor']}, {about['system']}"
    parts += [
        f"Held-out real images: Fréchet distance {real}, accuracy {floor['accuracy']:.1%}. "
        f"{where}, Python {about['Python']}, torch {about['torch']}; commit "
        f"{', '.join(commit[:12] for commit in sorted(set(made)))}.",
    ]
    return "\n".join([*parts, ""])


def draw_sheet(images: dict[str, Tensor], path: Path, columns: int = 20) -> None:
    """Two rows of each head's images, evenly chosen of uint8 [N, 3, S, S], class by class."""
    figure = Figure(figsize=(7.5, 0.95 * len(images)), layout="constrained")
    rows = figure.subplots(len(images), squeeze=False)[:, 0]
    for axes, (label, every) in zip(rows, images.items(), strict=True):
        chosen = every[torch.linspace(0, len(every) - 1, 2 * columns).long()]
        sheet = make_grid(chosen, columns, padding=1)
        axes.imshow(sheet.permute(1, 2, 0).numpy(), interpolation="nearest")
        axes.set(xticks=[], yticks=[])
        axes.set_ylabel(label, rotation=0, ha="right", va="center")
    figure.savefig(path, dpi=90)


def render(results: dict, folder: Path = ROOT / "docs") -> None:
    """Put the tables between the marks of the pages, and the charts into images/ beside them."""
    training, sampling = {}, {}
    for run in results["runs"]:
        if run["group"] == "heads" and run["seed"] == 0:
            draw, epochs = run["draw"], run["train"]["epochs"]
            seconds, last = run["train"]["seconds"], draw["points"][1] | {"epoch": epochs}
            curve = [(x["epoch"] / epochs * seconds, x) for x in (*draw["curve"], last)]
            training[run["label"]] = curve
            sampling[run["label"]] = [(x["seconds_100"], x) for x in draw["points"]]
    images = folder / "images"
    images.mkdir(exist_ok=True)
    with matplotlib.rc_context(STYLE):
        for name, curves, x in (
            ("heads-training", training, "seconds of training"),
            ("heads-sampling", sampling, "seconds for 100 images"),
        ):
            figure = Figure(figsize=(7, 4), layout="constrained")
            axes = figure.add_subplot(xlabel=x, ylabel="Fréchet distance")
            axes.set(xscale="log", yscale="log")
            for axis in (axes.xaxis, axes.yaxis):
                axis.set(major_locator=LogLocator(subs=(1, 2, 5)), major_formatter="{x:g}")
                axis.set_minor_locator(NullLocator())
            for label, points in curves.items():
                at, found = zip(*points, strict=True)
                errors = [point["frechet_error"] or 0 for point in found]
                axes.errorbar(at, [y["frechet"] for y in found], errors, marker="o", label=label)
            axes.axhline(results["floor"]["frechet"], color="grey", ls=":", label="held-out images")
            axes.legend()
            with atomic_write(images / f"{name}.svg") as file:
                figure.savefig(file, format="svg", metadata={"Date": None})
    for name, groups in PAGES.items():
        before, rest = (folder / name).read_text().split(MARKS[0])
        text = f"{before}{MARKS[0]}\n{tables(results, groups)}\n{MARKS[1]}{rest.split(MARKS[1])[1]}"
        with atomic_write(folder / name) as file:
            file.write(text.encode())
