"""Real images for the demo: scikit-learn's handwritten digits as PNG files in class folders.

The 1797 digits of 8 x 8 pixels with 17 grey levels that scikit-learn ships (UCI "Optical
Recognition of Handwritten Digits") become OUTPUT/{train,val}/{0..9}/NNNN.png, NNNN being the
digit's number in that set. A fifth of each class goes to val/.
"""

from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from util import dist
from util.args import Parser, positive_int
from util.files import check_writable


def enlarge(digit: np.ndarray, size: int) -> Image.Image:
    """digit: [8, 8] in [0, 16] -> grey image of size x size pixels, bicubic."""
    grey = Image.fromarray(digit.astype(np.float32) * (255 / 16))
    smooth = np.asarray(grey.resize((size, size), Image.Resampling.BICUBIC))
    return Image.fromarray(smooth.round().clip(0, 255).astype(np.uint8))


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--output", type=Path, default=Path("output/demo/data"), help="folder")
    parser.add_argument("--size", type=positive_int, default=32, help="pixels along a side")
    args = parser.parse()
    check_writable(args.output, "--output")
    digits = load_digits()
    numbers, labels = np.arange(len(digits.target)), digits.target
    parts = train_test_split(numbers, test_size=0.2, stratify=labels, random_state=0)
    for part, indices in zip(("train", "val"), parts, strict=True):
        for index in indices:
            folder = args.output / part / str(labels[index])
            folder.mkdir(parents=True, exist_ok=True)
            enlarge(digits.images[index], args.size).save(folder / f"{index:04d}.png")
    print(f"{args.output}: {len(parts[0])} training and {len(parts[1])} held-out digits")


if __name__ == "__main__":
    dist.run(main)
