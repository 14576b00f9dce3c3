"""How many images of two folders differ, and by how much.

python tools/compare_images.py FIRST/images SECOND/images
Two evaluations with the same seed and another --eval_bsz (or device, or precision) draw the same
images but for rounding. Rounding moves a pixel by a level or so, unless it decides between two
levels of a latent: then the rest of that image is drawn differently.
"""

import sys
from pathlib import Path
from typing import NoReturn

import numpy as np
from PIL import Image

VISIBLE = 8  # levels of 255: more than rounding alone


def differences(first: Path, second: Path) -> np.ndarray:
    """The largest difference of a pixel of each image that both folders have: [N] int."""
    names = sorted({path.name for path in first.glob("*.png")} & set(_names(second)))
    found = [np.abs(_pixels(first / name) - _pixels(second / name)).max() for name in names]
    return np.array(found, dtype=int)


def _names(folder: Path) -> list[str]:
    return [path.name for path in folder.glob("*.png")]


def _pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path), dtype=int)


def refuse(message: str) -> NoReturn:
    print(f"{sys.argv[0]}: error: {message}", file=sys.stderr)
    sys.exit(2)


def main() -> None:
    if len(sys.argv) != 3 or not all(Path(path).is_dir() for path in sys.argv[1:]):
        refuse("name two folders of PNG files")
    found = differences(*map(Path, sys.argv[1:]))
    if not len(found):
        refuse("the folders share no name of a PNG file")
    print(
        f"{len(found)} images: {(found > 0).sum()} differ at all, {(found > VISIBLE).sum()} by "
        f"more than {VISIBLE} levels somewhere; largest difference {found.max()}"
    )


if __name__ == "__main__":
    main()
