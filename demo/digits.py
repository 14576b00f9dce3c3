"""Real images for the demo: scikit-learn's handwritten digits as PNG files in class folders.

The 1797 digits of 8 x 8 pixels with 17 grey levels that scikit-learn ships (UCI "Optical
Recognition of Handwritten Digits") become OUTPUT/{train,val}/{0..9}/NNNN.png, NNNN being the
digit's number in that set. The split is stratified by class and a function of the seed.
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from util.args import positive_int, seed
from util.dist import run
from util.errors import as_user_error
from util.files import check_writable
from util.parser import Parser

BRIGHTEST = 16  # of the 17 grey levels


def enlarge(digit: np.ndarray, size: int) -> Image.Image:
    """digit: [8, 8] in [0, 16] -> grey image of size x size pixels, bicubic."""
    grey = Image.fromarray(digit.astype(np.float32) * (255 / BRIGHTEST))
    smooth = np.asarray(grey.resize((size, size), Image.Resampling.BICUBIC))
    return Image.fromarray(smooth.round().clip(0, 255).astype(np.uint8))


def split(labels: np.ndarray, val_share: float, seed: int) -> dict[str, np.ndarray]:
    """{"train": indices, "val": indices}: disjoint, together all, each class in proportion."""
    train, val = train_test_split(
        np.arange(len(labels)), test_size=val_share, stratify=labels, random_state=seed
    )
    return {"train": np.sort(train), "val": np.sort(val)}


def write_digits(output: Path, size: int, val_share: float, seed: int) -> dict[str, int]:
    """Write all PNG files below `output`; returns the number of files of each part."""
    digits = load_digits()
    parts = split(digits.target, val_share, seed)
    for part, indices in parts.items():
        for index in indices:
            folder = output / part / str(digits.target[index])
            folder.mkdir(parents=True, exist_ok=True)
            enlarge(digits.images[index], size).save(folder / f"{index:04d}.png")
    return {part: len(indices) for part, indices in parts.items()}


def parse_args() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--output", type=Path, default=Path("output/demo/data"), help="folder")
    parser.add_argument("--size", type=positive_int, default=32, help="pixels along a side")
    parser.add_argument("--val_share", type=float, default=0.2, help="held out, in every class")
    parser.add_argument("--seed", type=seed, default=0, help="of the split")
    return parser.parse()


def main() -> None:
    args = parse_args()
    check_writable(args.output, "--output")
    with as_user_error(f"--val_share {args.val_share}, --seed {args.seed}"):
        counts = write_digits(args.output, args.size, args.val_share, args.seed)
    print(f"{args.output}: {counts['train']} training and {counts['val']} held-out digits")


if __name__ == "__main__":
    run(main)
