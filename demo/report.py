"""The demo's page: what its judge says of the digits, above the report that every run has.

Everything shown is read from the files that the stages of demo/run.sh wrote: images, scores.json
of demo/classifier.py, timings.tsv, and what `util.report` finds in the folder. Beside the page,
digits.png has some of the generated digits.
"""

import argparse
import json
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image

from util.parser import Parser
from util.report import __main__ as report
from util.report.html import Section, cards, page, picture, table
from util.report.run import find

SHOWN = 8  # images of a class, real and generated
LEAD = """<p>A class-conditional generator, trained just now on this machine's processor: a small,
frozen KL autoencoder turns each 32&nbsp;px image into 4&nbsp;&times;&nbsp;4 positions of 8
continuous channels, every channel is quantized by itself, and a masked transformer with an
autoregressive head over the channels learns to predict the resulting tokens.</p>"""
COMPARED = """<p>Left, handwritten digits that no network here was trained on. Right, the first
generated ones of each class, not selected; the last column is the share of all generated ones of
that class that the classifier recognises.</p>"""
JUDGED = """<p>A convolutional classifier trained on the real training digits alone judges both
sets. The Fr&eacute;chet distance compares Gaussians fitted to its 64 penultimate features; it is
not FID, which is defined in the features of the Inception network, and compares with nothing
outside this page. Its floor is the distance between the training and the held-out digits. The
distance to the nearest training image (root mean square of pixel differences, pixels in [0, 1])
would be near 0 if the generator repeated training images.</p>"""


def strip(paths: list[Path], alt: str) -> str:
    """Images of one size side by side, as one <img>."""
    grey = [np.asarray(Image.open(path).convert("L")) for path in paths]
    return picture(np.concatenate(grey, axis=1), alt)


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


def sheet(generated: Path, scores: dict) -> Image.Image:
    """The first generated digits of each class, not selected, a column a class."""
    labels = np.array(scores["generated"]["labels"])
    drawn = sorted((generated / "images").glob("*.png"))
    columns = [np.flatnonzero(labels == label)[:SHOWN] for label in np.unique(labels)]
    tiles = [
        np.pad(np.asarray(Image.open(path).convert("L")), 1, constant_values=255) for path in drawn
    ]
    image = Image.fromarray(
        np.block([[tiles[i] for i in row] for row in zip(*columns, strict=True)])
    )
    return image.resize((2 * image.width, 2 * image.height), Image.Resampling.BICUBIC)


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


def headline(scores: dict, timings: list[tuple[str, float]]) -> str:
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
    return cards(shown)


def render(root: Path, data_path: Path, generated: Path, scores: dict, timings) -> str:
    """The page. Raises FileNotFoundError if a stage's files are missing."""
    found = find(root)
    own = [
        Section(
            "Real and generated",
            COMPARED + digits_table(data_path, generated, scores) + mistakes(generated, scores),
        ),
        Section("Figures", JUDGED + figures_table(scores)),
    ]
    took = Section("Time", timings_table(timings))
    sections = [*own, *report.sections(found), took]
    lead = headline(scores, timings)
    return page("TokenBridge draws digits", LEAD, lead, sections, report.foot(found))


def parse_args() -> argparse.Namespace:
    parser = Parser(__doc__)
    add, root = parser.add_argument, Path("output/demo")
    add("--root", type=Path, default=root, help="folder of all stages, for the general sections")
    add("--data_path", type=Path, default=root / "data", help="real images, val/CLASS/")
    add("--generated", type=Path, required=True, help="folder that --evaluate wrote")
    add("--scores", type=Path, default=root / "scores.json", help="of demo/classifier.py")
    add("--timings", type=Path, default=root / "timings.tsv", help="lines: stage, tab, seconds")
    add("--output", type=Path, default=root / "report.html", help="file to write")
    return parser.parse()


def main() -> None:
    args = parse_args()
    scores = json.loads(args.scores.read_text())
    timings = read_timings(args.timings)
    text = render(args.root, args.data_path, args.generated, scores, timings)
    report.write(args.output, text)
    sheet(args.generated, scores).save(args.output.with_name("digits.png"), optimize=True)


if __name__ == "__main__":
    main()
