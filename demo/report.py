"""The demo's page: what its judge says of the digits, above the report that every run has.

Everything shown is read from the files that the stages of demo/run.sh wrote.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from util import dist
from util.args import Parser
from util.report.__main__ import write
from util.report.load import load
from util.report.page import Section, picture, render
from util.report.sections import sections

SHOWN = 8  # images of a class, real and generated
LEAD = (
    "Trained just now on this machine's processor: a frozen KL autoencoder, whose 8 channels are "
    "quantized one by one, and a masked transformer with an autoregressive head over the channels."
)
COMPARED = (
    "Left, digits that no network here was trained on. Right, the first generated ones of each "
    "class, not selected, and the share of all of that class that the classifier recognises."
)
JUDGED = (
    "A classifier trained on the real training digits alone judges both. The Fréchet distance is "
    "in its 64 features: it is not FID. Its floor is the distance from training to held-out digits."
)
FIGURES = (
    ("images", "images", "{}"),
    ("accuracy of the classifier", "accuracy", "{:.2%}"),
    ("Fréchet distance to the training images", "frechet_to_train", "{:.2f}"),
    ("mean distance to the nearest training image", "nearest_training_image", "{:.3f}"),
)


def strip(paths: Sequence[Path], alt: str):
    """Images of one size side by side, as one picture."""
    grey = [np.asarray(Image.open(path).convert("L")) for path in paths]
    return picture(Image.fromarray(np.concatenate(grey, axis=1)), alt)


def digits_section(real: Path, drawn: Sequence[Path], scores: dict) -> Section:
    """Held-out real digits, in CLASS/, beside generated ones, a row for each class."""
    labels = np.array(scores["labels"])
    right = labels == np.array(scores["predictions"])
    rows = []
    for label, folder in enumerate(sorted(real.iterdir())):
        mine = np.flatnonzero(labels == label)
        first = strip(sorted(folder.glob("*.png"))[:SHOWN], f"real digits {folder.name}")
        new = strip([drawn[i] for i in mine[:SHOWN]], f"generated digits {folder.name}")
        rows.append([folder.name, first, new, f"{right[mine].mean():.1%}"])
    rows.append(["all", "", "", f"{right.mean():.1%}"])
    head = ["class", "real, held out", "generated", "recognised"]
    return Section("Real and generated", COMPARED, head=head, rows=rows)


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--root", type=Path, default=Path("output/demo"), help="of all stages")
    root = parser.parse().root
    drawn = sorted(root.glob("generated/*/images/*.png"))
    scores = json.loads((root / "scores.json").read_text())
    timings = [line.split("\t") for line in (root / "timings.tsv").read_text().splitlines()]
    total = sum(float(seconds) for _, seconds in timings)
    both = scores["held_out"], scores["generated"]
    rows = [[text, *(form.format(one[key]) for one in both)] for text, key, form in FIGURES]
    head = ["", "held out (the floor)", "generated"]
    parts = [
        digits_section(root / "data" / "val", drawn, scores["generated"]),
        Section("Figures", JUDGED, head=head, rows=rows),
        *sections(load(root)),
        Section("Time", head=["stage", "seconds"], rows=[*timings, ("all", f"{total:.0f}")]),
    ]
    write(root / "report.html", render("TokenBridge draws digits", parts, LEAD))


if __name__ == "__main__":
    dist.run(main)
