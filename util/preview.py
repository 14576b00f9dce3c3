"""A few images from fixed seeds while a model trains, raw and averaged weights side by side.

Early in a run the average still holds much of the initial weights, and draws grey or black: how
much stands above its images.
Letters: N images, S side of a tile in pixels.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from models.generate import spread_labels, to_uint8
from models.sampler import SamplingOptions, sample_latents
from models.tokenbridge import TokenBridge
from models.tokenizers.tokenizer import Tokenizer
from util.data.images import grid
from util.device import Precision

TILE = (64, 128)  # least and largest side of an image as shown
GAP = 12  # pixels between raw and averaged
CAPTION = 22  # pixels above them
FORGOTTEN = 0.01  # share of the initial weights below which nobody sees it


@dataclass(frozen=True)
class PreviewSettings:
    """What decides the images beside the weights. Image i is always of the same class and noise.

    classes: that are drawn, evenly; None is all of the model's. names: of all, if they are known.
    """

    images: int
    sampling: SamplingOptions
    classes: Sequence[int] | None = None
    names: Sequence[str] = ()

    def labels(self, class_num: int) -> Tensor:
        return spread_labels(self.images, self.classes or range(class_num))

    def described(self, class_num: int) -> str:
        shown = (self.names[c] if self.names else str(c) for c in self.labels(class_num).tolist())
        return f"The images, row by row, are of the classes {', '.join(shown)}."


def draw(
    model: TokenBridge, settings: PreviewSettings, device: torch.device, precision: Precision
) -> Tensor:
    """Latents [N, C, h, w] of the model as it is; nothing global is drawn from."""
    with precision.autocast(device):
        labels = settings.labels(model.config.class_num)
        return sample_latents(model, labels, **asdict(settings.sampling))


def decode(tokenizer: Tokenizer, latents: Tensor) -> Tensor:
    """uint8 [N, 3, S, S] on the CPU, tiles of a size to look at."""
    images = torch.cat([to_uint8(tokenizer.decode(part)).cpu() for part in latents.split(8)])
    return as_tiles(images)


def as_tiles(images: Tensor) -> Tensor:
    """uint8 [N, 3, H, H] -> [N, 3, S, S]: small images enlarged pixel by pixel, large ones shrunk.

    At 256 px, a grid of whole images at every look would fill gigabytes of logs.
    """
    side, (least, most) = images.shape[-1], TILE
    if side < least:
        factor = math.ceil(least / side)
        return images.repeat_interleave(factor, -1).repeat_interleave(factor, -2)
    if side <= most:
        return images
    smaller = torch.nn.functional.interpolate(images.float(), size=(most, most), mode="area")
    return smaller.round().to(torch.uint8)


def initial_share(rate: float, steps: int) -> float:
    """How much of an average over so many steps is still the initial weights."""
    return rate**steps


def about_average(rate: float, steps: int) -> str:
    """The age of the average, in words that explain what its images look like."""
    share = initial_share(rate, steps)
    counted = f"{steps:,} step{'s' * (steps != 1)}"
    text = f"The average at --ema_rate {rate:g} after {counted}: "
    if share < FORGOTTEN:
        return f"{text}less than 1 % of it are the initial weights."
    forgets = math.ceil(math.log(FORGOTTEN) / math.log(rate)) if 0 < rate < 1 else None
    until = f" until about step {forgets:,}" if forgets else ""
    return (
        f"{text}{share:.0%} of it are still the weights that training began with "
        f"({rate:g}^{steps}). Where those were random, its images are grey or black and its loss "
        f"is high{until}. That is no fault: the raw weights show what the model has learnt."
    )


def side_by_side(raw: Tensor, averaged: Tensor, rate: float, steps: int) -> Tensor:
    """raw, averaged: uint8 [N, 3, S, S] -> one picture uint8 [3, H, W] with captions."""
    columns = math.ceil(len(raw) / math.isqrt(len(raw)))
    left, right = (grid(part, columns) for part in (raw, averaged))
    height, width = left.shape[1:]
    canvas = torch.full((3, height + CAPTION, 2 * width + GAP), 255, dtype=torch.uint8)
    canvas[:, CAPTION:, :width] = left
    canvas[:, CAPTION:, width + GAP :] = right
    picture = Image.fromarray(canvas.permute(1, 2, 0).numpy())
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(size=14)
    share = initial_share(rate, steps)
    note = f"average: {share:.0%} initial weights" if share >= FORGOTTEN else "average (EMA)"
    pen.text((3, 2), "raw weights", fill=(40, 40, 40), font=font)
    pen.text((width + GAP + 3, 2), note, fill=(40, 40, 40), font=font)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)
