"""Generated images on their way to a file: rounding, PNG, grids, PSNR."""

from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from models.generate import to_uint8 as to_uint8
from util.files import atomic_write


def save_png(image: Tensor | np.ndarray, path: str | Path) -> None:
    """image: uint8 [3, H, W]. The file is whole or absent."""
    # Waiting for the disk 50,000 times would take longer than some of the images.
    with atomic_write(path, durable=False) as file:
        Image.fromarray(np.moveaxis(np.asarray(image), 0, -1)).save(file, format="PNG")


def grid(images: Tensor, columns: int) -> Tensor:
    """images: uint8 [N, 3, H, W] -> one uint8 [3, H', W'], row by row."""
    from torchvision.utils import make_grid  # slow to import

    return make_grid(images, nrow=columns, padding=2, pad_value=255)


def psnr(images: Tensor, reference: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of uint8 images [N, 3, H, W] in dB: [N]; 100 where identical."""
    error = (images.double() - reference.double()).square().mean(dim=(1, 2, 3)) / 255**2
    return -10 * error.clamp_min(1e-10).log10()
