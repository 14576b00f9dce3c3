"""Photographs of 256 px, for reconstruction.py, the doctor, or a VAE: those of two packages.

scikit-learn's china and flower, scikit-image's astronaut, cat, coffee, motorcycle and rocket. The
packages name their authors.
"""

from pathlib import Path

import skimage

from util import dist
from util.args import Parser, positive_int
from util.data.images import center_crop, read_image
from util.doctor import sample_photos
from util.files import check_writable

NAMES = "astronaut.png chelsea.png coffee.png rocket.jpg motorcycle_left.png"  # scikit-image's


def main() -> None:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--output", type=Path, default=Path("output/photos"), help="folder")
    add("--size", type=positive_int, default=256, help="pixels along a side")
    args = parser.parse()
    check_writable(args.output, "--output")
    args.output.mkdir(parents=True, exist_ok=True)
    folder = Path(skimage.__file__).parent / "data"
    for path in map(Path, (*sample_photos(), *map(folder.joinpath, NAMES.split()))):
        image = center_crop(read_image(path), args.size)
        image.save(args.output / f"{path.stem}.png")
    print(f"{args.output}: {len(list(args.output.glob('*.png')))} photographs")


if __name__ == "__main__":
    dist.run(main)
