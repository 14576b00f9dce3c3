"""Render the demo's results as one self-contained HTML page.

Everything shown is read from the files that the earlier stages wrote: images, scores.json of
demo/classifier.py, results.json of reconstruction.py, TensorBoard events, timings.tsv of
demo/run.sh. Images are inline, the curve is an SVG, nothing is loaded from elsewhere.
"""

import argparse
import base64
import io
import json
import math
import platform
from html import escape
from importlib.metadata import version
from pathlib import Path
from string import Template

import numpy as np
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from util.provenance import cores, processor

TEMPLATE = Path(__file__).with_name("report.template.html")
SHOWN = 8  # images of a class, real and generated
RECONSTRUCTED = 12  # images of the reconstruction table
PACKAGES = ("torch", "torchvision", "timm", "numpy", "scikit-learn")
# plot area of the curve, in SVG units
LEFT, TOP, WIDTH, HEIGHT = 48, 12, 640, 220


def inline_image(array: np.ndarray, alt: str) -> str:
    """uint8 [H, W] or [H, W, 3] -> an <img> element with a data URI."""
    file = io.BytesIO()
    Image.fromarray(array).save(file, format="PNG")
    data = base64.b64encode(file.getvalue()).decode()
    return f'<img src="data:image/png;base64,{data}" alt="{escape(alt)}">'


def strip(paths: list[Path], alt: str) -> str:
    """Images of one size side by side, as one <img>."""
    grey = [np.asarray(Image.open(path).convert("L")) for path in paths]
    return inline_image(np.concatenate(grey, axis=1), alt)


def table(head: list[str], rows: list[list[str]]) -> str:
    """An HTML table; cells are HTML."""
    cells = "".join(f"<th>{text}</th>" for text in head)
    body = ("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{cells}</tr></thead><tbody>{''.join(body)}</tbody></table>"


def digits_table(data_path: Path, generated: Path, scores: dict) -> str:
    """Held-out real digits beside generated ones, a row for each class."""
    labels = np.array(scores["generated"]["labels"])
    right = labels == np.array(scores["generated"]["predictions"])
    drawn = sorted((generated / "images").glob("*.png"))
    rows = []
    for label, folder in enumerate(sorted((data_path / "val").iterdir())):
        mine = np.flatnonzero(labels == label)
        real = strip(sorted(folder.glob("*.png"))[:SHOWN], f"real digits {folder.name}")
        new = strip([drawn[i] for i in mine[:SHOWN]], f"generated digits {folder.name}")
        rows.append([folder.name, real, new, f"{right[mine].mean():.1%}"])
    return table(["class", "real, held out", "generated", "recognised"], rows)


def mistakes(generated: Path, scores: dict) -> str:
    """The generated images that the classifier does not take for their class, all of them."""
    found = scores["generated"]
    wrong = [
        (i, asked, seen)
        for i, (asked, seen) in enumerate(zip(found["labels"], found["predictions"], strict=True))
        if asked != seen
    ]
    if not wrong:
        return "<p>The classifier recognises every generated digit.</p>"
    drawn = sorted((generated / "images").glob("*.png"))
    shown = (
        f"<figure>{strip([drawn[i]], f'asked {asked}')}"
        f"<figcaption>{asked} &rarr; {seen}</figcaption></figure>"
        for i, asked, seen in wrong
    )
    note = f"All {len(wrong)} that the classifier takes for another digit (asked &rarr; seen):"
    return f'<p>{note}</p><div class="figures">{"".join(shown)}</div>'


def reconstruction_table(folder: Path) -> str:
    """Originals and their reconstructions, a row for each bit width."""
    found = json.loads((folder / "results.json").read_text())
    step = max(1, found["images"] // RECONSTRUCTED)
    names = [f"{i:05d}.png" for i in range(0, found["images"], step)][:RECONSTRUCTED]

    def row(part: str, name: str, result: dict) -> list[str]:
        figures = (("psnr", ".1f"), ("entropy_bits", ".2f"), ("out_of_range_share", ".2%"))
        cells = [format(result[key], form) if key in result else "" for key, form in figures]
        return [name, strip([folder / part / file for file in names], name), *cells]

    rows = [row("original", "original", {})]
    for result in found["results"]:
        bits = result["bits"]
        name = f"{bits} bits" if bits > 0 else "not quantized"
        rows.append(row(result["name"], name, result))
    return table(["", "", "PSNR, dB", "entropy, bits", "out of range"], rows)


def read_scalars(log_dir: Path, tag: str) -> list[tuple[int, float]]:
    """(step, value) of one TensorBoard scalar; empty if it was never written."""
    events = EventAccumulator(str(log_dir), size_guidance={"scalars": 0})
    events.Reload()
    if tag not in events.Tags()["scalars"]:
        return []
    return [(event.step, event.value) for event in events.Scalars(tag)]


def curve(points: list[tuple[int, float]], title: str) -> str:
    """A line chart as an SVG element; its colours are the page's."""
    steps, values = zip(*points, strict=True)
    low, high = math.floor(min(values) * 5) / 5, math.ceil(max(values) * 5) / 5
    high = max(high, low + 0.2)

    def x(step: float) -> float:
        return LEFT + WIDTH * step / steps[-1]

    def y(value: float) -> float:
        return TOP + HEIGHT * (high - value) / (high - low)

    line = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in points)
    marks = []
    for i in range(5):
        value, step = low + (high - low) * i / 4, steps[-1] * i / 4
        marks.append(f'<path class="rule" d="M{LEFT} {y(value):.1f}h{WIDTH}"/>')
        marks.append(f'<text x="{LEFT - 6}" y="{y(value) + 4:.1f}">{value:.2f}</text>')
        marks.append(f'<text class="below" x="{x(step):.1f}" y="{TOP + HEIGHT + 18}">{step:.0f}')
        marks.append("</text>")
    box = f"0 0 {LEFT + WIDTH + 24} {TOP + HEIGHT + 26}"
    return (
        f'<svg viewBox="{box}" role="img" aria-label="{escape(title)}">'
        f'{"".join(marks)}<polyline points="{line}"/></svg>'
    )


def figures_table(scores: dict) -> str:
    """The classifier's figures of generated images beside the same ones of held-out images."""
    columns = [scores["held_out"], scores["generated"]]
    forms = (
        ("images", "images", "d"),
        ("accuracy of the classifier", "accuracy", ".2%"),
        ("Fr&eacute;chet distance to the training images", "frechet_to_train", ".2f"),
        ("mean distance to the nearest training image", "nearest_training_image", ".3f"),
    )
    rows = [[text, *(format(part[key], form) for part in columns)] for text, key, form in forms]
    return table(["", "held out (the floor)", "generated"], rows)


def read_timings(path: Path) -> list[tuple[str, float]]:
    """(stage, seconds) of the lines of timings.tsv."""
    lines = (line.split("\t") for line in path.read_text().splitlines())
    return [(stage, float(seconds)) for stage, seconds in lines]


def timings_table(timings: list[tuple[str, float]]) -> str:
    total = sum(seconds for _, seconds in timings)
    rows = [[escape(stage), f"{seconds:.0f} s"] for stage, seconds in timings]
    return table(["stage", "time"], [*rows, ["<b>all</b>", f"<b>{total:.0f} s</b>"]])


def machine() -> str:
    """Processor, cores and versions in one line."""
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    system = f"{platform.system()}, Python {platform.python_version()}"
    return escape(f"{processor()}, {cores()} cores, {system}, {versions}")


def cards(scores: dict, timings: list[tuple[str, float]]) -> str:
    """The headline figures."""
    held_out, generated = scores["held_out"], scores["generated"]
    shown = (
        (f"{generated['accuracy']:.1%}", "of generated digits recognised"),
        (f"{held_out['accuracy']:.1%}", "of held-out real digits recognised"),
        (
            f"{generated['frechet_to_train']:.2f}",
            f"Fr&eacute;chet distance (not FID); floor {held_out['frechet_to_train']:.2f}",
        ),
        (f"{sum(s for _, s in timings) / 60:.1f} min", "from images to this page"),
    )
    return "".join(f"<div><strong>{big}</strong><span>{small}</span></div>" for big, small in shown)


def render(
    data_path: Path, generated: Path, reconstructed: Path, log_dir: Path, scores: dict, timings
) -> str:
    """The page. Raises FileNotFoundError if a stage's files are missing."""
    settings = json.loads((generated / "metrics.json").read_text())["settings"]
    loss = read_scalars(log_dir, "train/loss")
    return Template(TEMPLATE.read_text()).substitute(
        cards=cards(scores, timings),
        digits=digits_table(data_path, generated, scores),
        mistakes=mistakes(generated, scores),
        figures=figures_table(scores),
        reconstructions=reconstruction_table(reconstructed),
        curve=curve(loss, "training loss over steps") if loss else "<p>No events found.</p>",
        settings=escape(", ".join(f"{key} {value}" for key, value in settings.items())),
        timings=timings_table(timings),
        machine=machine(),
    )


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add, root = parser.add_argument, Path("output/demo")
    add("--data_path", type=Path, default=root / "data", help="real images, val/CLASS/")
    add("--generated", type=Path, required=True, help="folder that --evaluate wrote")
    add("--reconstructed", type=Path, default=root / "reconstruction", help="results.json in it")
    add("--log_dir", type=Path, default=root / "model", help="TensorBoard events of the training")
    add("--scores", type=Path, default=root / "scores.json", help="of demo/classifier.py")
    add("--timings", type=Path, default=root / "timings.tsv", help="lines: stage, tab, seconds")
    add("--output", type=Path, default=root / "report.html", help="file to write")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    scores = json.loads(args.scores.read_text())
    timings = read_timings(args.timings)
    page = render(args.data_path, args.generated, args.reconstructed, args.log_dir, scores, timings)
    args.output.write_text(page)
    print(f"{args.output}: {len(page) // 1024} KiB, one file, open it in a browser")


if __name__ == "__main__":
    main()
