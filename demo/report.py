"""The demo's page: what its judge says of the digits, above the report that every run has.

Everything shown is read from the files that the stages of demo/run.sh wrote.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from util import dist
from util.args import Parser
from util.data.images import read_image
from util.report.__main__ import write
from util.report.load import load
from util.report.page import Section, picture, render
from util.report.sections import sections

REAL, SHOWN = 4, 8  # images of a class
FONT = ImageFont.load_default(14)
LEAD = (
    "{} on this machine's processor: a masked transformer with an autoregressive "
    "head over the channels of a frozen KL autoencoder, which are quantized one by one."
)
TRAINED = {"digits": "Trained just now", "emoji": "Came trained, and went on just now"}
COMPARED = (
    "Left, held-out images. Right, the first generated ones of each class, not selected; beneath "
    "each the training image whose pixels are nearest, so that a copy shows. The share is that of "
    "all generated images of the class that the judge recognises."
)
JUDGED = (
    "A classifier of the real training images judges both: a small network of its own for digits, "
    "a linear layer on features of EfficientNet-Lite0, which ImageNet has trained, for emoji. The "
    "Fréchet distance is in those features: it is not FID. Its floor is of the held-out images."
)
FIGURES = (
    ("images", "images", "{}"),
    ("accuracy of the classifier", "accuracy", "{:.2%}"),
    ("Fréchet distance to the training images", "frechet", "{:.2f}"),
    ("mean distance to the nearest training image", "nearest_training_image", "{:.3f}"),
)


def row(paths: Sequence[Path]) -> np.ndarray:
    """Images of one size side by side, uint8 [S, N * S, 3]."""
    return np.concatenate([np.asarray(read_image(path)) for path in paths], axis=1)


def comparison(root: Path, scores: dict) -> tuple[Section, Image.Image]:
    """Held-out images beside generated ones, a row for each class; that picture for a README."""
    drawn = sorted(root.glob("generated/*/images/*.png"))
    trained = sorted(root.glob("data/train/*/*.png"))
    labels, nearest = np.array(scores["labels"]), scores["nearest"]
    right = labels == np.array(scores["predictions"])
    rows, sheet = [], []
    for label, folder in enumerate(sorted((root / "data" / "val").iterdir())):
        mine = np.flatnonzero(labels == label)
        first = mine[:SHOWN]
        files = sorted(folder.glob("*.png"))
        real = row([files[i] for i in np.linspace(0, len(files) - 1, REAL).astype(int)])
        new = row([drawn[i] for i in first])
        both = np.concatenate([new, row([trained[nearest[i]] for i in first])])
        shown = (
            picture(Image.fromarray(x), f"{folder.name}, {what}")
            for x, what in zip((real, both), ("held out", "generated"), strict=True)
        )
        rows.append([folder.name, *shown, f"{right[mine].mean():.1%}"])
        title, gap = (Image.new("RGB", (width, len(new)), "white") for width in (104, 12))
        ImageDraw.Draw(title).text((4, len(new) // 2), folder.name, "black", FONT, anchor="lm")
        none = Image.new("RGB", (SHOWN * len(new) - new.shape[1], len(new)), "white")
        sheet.append(np.concatenate([title, real, gap, new, none], axis=1))
    rows.append(["all", "", "", f"{right.mean():.1%}"])
    head = ["class", "held out", "generated, and the nearest of training", "recognised"]
    section = Section("Real and generated", COMPARED, head=head, rows=rows)
    return section, Image.fromarray(np.concatenate(sheet))


def main() -> None:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--root", type=Path, default=Path("output/demo"), help="of all stages")
    add("--subject", choices=TRAINED, default="digits", help="what is drawn")
    args = parser.parse()
    root = args.root
    scores = json.loads((root / "scores.json").read_text())
    timings = [line.split("\t") for line in (root / "timings.tsv").read_text().splitlines()]
    total = sum(float(seconds) for _, seconds in timings)
    both = scores["held_out"], scores["generated"]
    rows = [[text, *(form.format(one[key]) for one in both)] for text, key, form in FIGURES]
    head = ["", "held out (the floor)", "generated"]
    section, sheet = comparison(root, scores["generated"])
    sheet.save(root / "samples.png")
    parts = [
        section,
        Section("Figures", JUDGED, head=head, rows=rows),
        *sections(load(root)),
        Section("Time", head=["stage", "seconds"], rows=[*timings, ("all", f"{total:.0f}")]),
    ]
    lead = LEAD.format(TRAINED[args.subject])
    write(root / "report.html", render(f"TokenBridge draws {args.subject}", parts, lead))


if __name__ == "__main__":
    dist.run(main)
