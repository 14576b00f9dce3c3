"""Images while they are made: after every iteration the pixels so far, the order and confidence.

    sampling_steps -> values so far -> VAE decode -> Frame
Letters: B images, L positions, K levels, S side of an image in pixels.
"""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Event

import numpy as np
import torch
from torch import Tensor

from demo.app_models import Loaded
from models.backbone import unpatchify
from models.generate import decode_images
from models.masking import mask_schedule
from models.sampler import SamplingOptions, SamplingStep, sampling_steps
from util.args import seed as seed_number
from util.data.images import grid, save_png
from util.device import resolve_precision
from util.errors import UserError

MOST_IMAGES = 16
PAUSE = 0.05  # seconds: more pictures a second than that no browser shows


@dataclass(frozen=True)
class Frame:
    """After `step` of `steps` iterations that fill something.

    pixels: uint8 [B, S, S, 3]; where nothing is filled yet they mean nothing.
    order: int [B, L], the iteration that filled a position, 0 where none has.
    confidence: float [B, L], mean log-probability of the position's channels in nats, nan where
    nothing is. Positions are row by row.
    """

    step: int
    steps: int
    pixels: np.ndarray
    order: np.ndarray
    confidence: np.ndarray

    @property
    def done(self) -> bool:
        return self.step == self.steps


class Record:
    """Which iteration filled a position and how sure it was, [B, L] each."""

    def __init__(self, batch: int, length: int):
        self.order = torch.zeros(batch, length, dtype=torch.int64)
        self.confidence = torch.full((batch, length), math.nan)

    def add(self, step: SamplingStep, number: int) -> None:
        positions = step.positions.cpu()
        self.order.scatter_(1, positions, number)
        means = step.log_probs.float().mean(dim=-1).cpu()
        self.confidence.scatter_(1, positions, means)


def draw(
    loaded: Loaded,
    labels: Sequence[int],
    options: SamplingOptions,
    watch: float = 0.0,
    stop: Event | None = None,
) -> Iterator[Frame]:
    """Frames of the images that `models.generate.generate` makes of the same labels and options.

    Every iteration has one, but those that would take longer to show than to compute are left
    out; never the last. watch: seconds to take at least, evenly, so that eyes can follow.
    stop: ends it before the next iteration.
    """
    stop = stop or Event()
    model, config = loaded.model, loaded.model.config
    schedule = mask_schedule(config.seq_len, options.num_iter)
    steps = sum(before != after for before, after, _ in schedule)
    record = Record(len(labels), config.seq_len)
    began = shown = time.monotonic()
    cost = 0.0
    states = _autocast(sampling_steps(model, torch.tensor(labels), options), model)
    for number, state in enumerate(states, 1):
        record.add(state, number)
        now = time.monotonic()
        if stop.is_set():
            return
        if number < steps and now - shown < max(cost, PAUSE if watch == 0 else 0):
            continue
        yield Frame(
            number,
            steps,
            _decode(loaded, state.values),
            record.order.numpy().copy(),
            record.confidence.numpy().copy(),
        )
        shown = time.monotonic()
        cost = shown - now
        if stop.wait(max(0.0, began + watch * number / steps - shown)):
            return


def _autocast(steps: Iterator[SamplingStep], model: torch.nn.Module) -> Iterator[SamplingStep]:
    """The steps in `generate`'s arithmetic, entered for each of them: threads may change."""
    device = next(model.parameters()).device
    precision = resolve_precision("auto", device)
    while True:
        with precision.autocast(device):
            step = next(steps, None)
        if step is None:
            return
        yield step


def _decode(loaded: Loaded, values: Tensor) -> np.ndarray:
    config = loaded.model.config
    latents = unpatchify(values, config.patch_size, config.grid_size)
    return decode_images(loaded.tokenizer, latents).permute(0, 2, 3, 1).numpy()


def parse_seed(text: str) -> int:
    """Raises UserError, naming the value, on what is no seed."""
    try:
        return seed_number(str(text).strip())
    except Exception as error:
        raise UserError(
            f"seed {str(text)[:40]!r} is not a whole number of at least 0; try 1"
        ) from error


def labels_of(chosen: Sequence[int], images: int) -> list[int]:
    """The class of every image: the chosen ones in turn. Raises UserError if there are none."""
    if not chosen:
        raise UserError("no class is chosen: pick at least one")
    if not 1 <= images <= MOST_IMAGES:
        raise UserError(f"{images} images are not between 1 and {MOST_IMAGES}")
    return [chosen[i % len(chosen)] for i in range(images)]


def save(pixels: np.ndarray, path: Path) -> None:
    """One image as it is, several as one sheet. pixels: uint8 [B, S, S, 3]."""
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    sheet = images[0] if len(images) == 1 else grid(images, columns_of(len(images)))
    save_png(sheet, path)


def columns_of(count: int) -> int:
    """Of a sheet of so many images that is about square."""
    return math.ceil(math.sqrt(count))
