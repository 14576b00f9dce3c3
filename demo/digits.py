"""Real images for the demo: scikit-learn's handwritten digits as PNG files in class folders.

The 1797 digits of 8 x 8 pixels with 17 grey levels that scikit-learn ships (UCI "Optical
Recognition of Handwritten Digits") become OUTPUT/{train,val}/{0..9}/NNNN.png, NNNN being the
digit's number in that set. The split is stratified by class and a function of the seed.
"""

from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from util import dist
from util.args import Parser, positive_int, random_seed
from util.files import check_writable


def enlarge(digit: np.ndarray, size: int) -> Image.Image:
    """digit: [8, 8] in [0, 16] -> grey image of size x size pixels, bicubic."""
    grey = Image.fromarray(digit.astype(np.float32) * (255 / 16))
    smooth = np.asarray(grey.resize((size, size), Image.Resampling.BICUBIC))
    return Image.fromarray(smooth.round().clip(0, 255).astype(np.uint8))


def write_digits(output: Path, size: int = 32, seed: int = 0) -> dict[str, int]:
    """Write all PNG files below `output`, a fifth of each class to val/; returns the counts."""
    digits = load_digits()
    parts = train_test_split(
        np.arange(len(digits.target)), test_size=0.2, stratify=digits.target, random_state=seed
    )
    for part, indices in zip(("train", "val"), parts, strict=True):
        for index in indices:
            folder = output / part / str(digits.target[index])
            folder.mkdir(parents=True, exist_ok=True)
            enlarge(digits.images[index], size).save(folder / f"{index:04d}.png")
    return {"train": len(parts[0]), "val": len(parts[1])}


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--output", type=Path, default=Path("output/demo/data"), help="folder")
    parser.add_argument("--size", type=positive_int, default=32, help="pixels along a side")
    parser.add_argument("--seed", type=random_seed, default=0, help="of the split")
    args = parser.parse()
    check_writable(args.output, "--output")
    counts = write_digits(args.output, args.size, args.seed)
    print(f"{args.output}: {counts['train']} training and {counts['val']} held-out digits")


if __name__ == "__main__":
    dist.run(main)
