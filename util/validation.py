"""Validation while training: loss on images never trained on, sample images, use of the levels.

What is random about image i (its latents' noise, its order of positions) is a function of i alone,
and nothing is drawn from a global generator: curves are comparable, and training goes on as if
nothing had been measured. The loss is shared by all processes and does not depend on their number.
Letters: N images, R mask ratios, C latent channels, T losses of a position, L positions, K levels,
B images of a batch.
"""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from models.config import TokenBridgeConfig
from models.masking import MaskRatios
from models.quantizer import entropy, level_counts
from models.sampler import SamplingOptions, evaluation_mode, image_randomness, sample_latents
from models.tokenbridge import TokenBridge
from models.tokenizers.kl16 import Posterior
from models.tokenizers.tokenizer import Tokenizer, decode_images
from util import dist, stop
from util.data.images import ImageDataset, grid
from util.data.latent_cache import CachedLatents
from util.device import Precision, unchanged_randomness
from util.evaluation.settings import spread_labels
from util.logging import TrainingLog
from util.optim import EMA

RATIOS = (0.25, 0.5, 0.7, 0.85, 1.0)  # training draws from 0.7 on, sampling goes through all
BATCH = 16  # images; small beside a training batch, which has gradients, too
SEED = 0  # of noise and orders, whatever --seed is: runs of other seeds compare
WEIGHTS = ("raw", "ema")
COUNTED = 64  # training images whose levels are counted
LARGEST, GAP = 128, 12  # pixels of an image as shown, and between raw and averaged

Data = ImageDataset | CachedLatents


@dataclass(frozen=True)
class ValidationSet:
    """dataset: what is never trained on. labels: the training's, by those of the dataset."""

    dataset: Data
    labels: list[int]
    source: str


def evenly_spread(count: int, most: int) -> list[int]:
    """At most so many numbers below count, evenly spread, as lists are sorted by class."""
    most = min(count, most)
    return [(2 * i + 1) * count // (2 * most) for i in range(most)]


def read_latents(
    dataset: Data, numbers: list[int], tokenizer: Tokenizer, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Scaled latents [B, C, h, w] of those images and the dataset's labels [B], on the CPU.

    The noise of image i is a function of i. Images that cannot be read may be left out.
    """
    latents, labels = [], []
    for number in numbers:
        item = dataset[number]
        if item is None:
            continue
        values, label = item
        if isinstance(dataset, ImageDataset):
            values = tokenizer.posterior(values[None].to(device)).parameters[0]
        mixed = int(np.random.SeedSequence([SEED, number]).generate_state(1)[0])
        posterior = Posterior(values[None].float().cpu())
        drawn = posterior.sample(torch.Generator().manual_seed(mixed))
        latents.append(tokenizer.scaled(drawn.to(device)).cpu())
        labels.append(label)
    joined = torch.cat(latents) if latents else torch.empty(0)
    return joined, torch.tensor(labels, dtype=torch.int64)


def validation_masks(numbers: list[int], length: int) -> Tensor:
    """bool [R, B, L]: ceil(L * ratio) positions of each image; a larger mask holds the smaller."""
    orders, _ = image_randomness(SEED, numbers, length, 1)
    masks = torch.zeros(len(RATIOS), len(numbers), length, dtype=torch.bool)
    for mask, ratio in zip(masks, RATIOS, strict=True):
        mask.scatter_(1, orders[:, : math.ceil(length * ratio)], True)
    return masks


def ratio_weights(ratios: MaskRatios) -> list[float]:
    """How often training draws a ratio nearest to each of RATIOS, which add up to 1."""
    middles = [(a + b) / 2 for a, b in zip(RATIOS, RATIOS[1:], strict=False)]
    cdf = [0.0, *(ratios.share_below(middle) for middle in middles), 1.0]
    return [above - below for below, above in zip(cdf, cdf[1:], strict=False)]


def as_scalars(losses: Tensor, weights: str, config: TokenBridgeConfig) -> dict[str, float]:
    """losses: [R, T] -> TensorBoard's names. weights: "raw" or "ema".

    The loss and that of the channels, of a head that has a loss for each scalar of a token, are
    means over the ratios as often as training draws them.
    """
    shares = torch.tensor(ratio_weights(config.mask_ratios), dtype=torch.float64)
    means = shares @ losses  # [T]
    scalars = {f"validation/loss_{weights}": means.mean().item()}
    for ratio, row in zip(RATIOS, losses, strict=True):
        scalars[f"validation_ratio_{weights}/{ratio:.2f}"] = row.mean().item()
    if len(means) == 1:  # of whole tokens
        scalars[f"validation/loss_per_scalar_{weights}"] = means.item() / config.token_dim
    elif len(means) == config.token_dim:  # with patches, p*p scalars of each channel
        for channel, loss in enumerate(means.unflatten(0, (config.vae_embed_dim, -1)).mean(1)):
            scalars[f"validation_channel_{weights}/{channel:02d}"] = loss.item()
    return scalars


@dataclass(frozen=True)
class ValidationSettings:
    """When to validate, in steps (0 is never), and what to draw."""

    loss_every: int
    loss_images: int  # of the validation set, at most
    samples_every: int
    samples: int  # images, of fixed classes and noise
    last_step: int  # of the whole run
    sampling: SamplingOptions
    classes: Sequence[int] | None = None  # that are drawn; None is all of the model's
    names: Sequence[str] = ()  # of all classes


@dataclass
class Validation:
    """training_data: whose levels are counted once. images: what is never trained on, if any."""

    settings: ValidationSettings
    tokenizer: Tokenizer
    device: torch.device
    precision: Precision
    training_data: Data
    images: ValidationSet | None

    @cached_property
    def numbers(self) -> list[int]:
        """Of the validation images."""
        count = len(self.images.dataset) if self.images is not None else 0
        return evenly_spread(count, self.settings.loss_images)

    def due(self, done: int) -> tuple[str, ...]:
        """What to do after so many steps, of "loss" and "samples"; on all processes alike."""
        every = {"loss": self.settings.loss_every if self.numbers else 0}
        every["samples"] = self.settings.samples_every
        ends = done in (1, self.settings.last_step)
        return tuple(name for name, steps in every.items() if steps and (ends or not done % steps))

    def __call__(self, model: TokenBridge, ema: EMA, log: TrainingLog, done: int) -> None:
        """Measure, draw and log. A signal that asks to stop cuts it short, on any process."""
        drawn, due = {}, self.due(done)
        for weights in WEIGHTS:
            with ema.swapped_in() if weights == "ema" else nullcontext():
                losses = self.loss(model) if "loss" in due else None
                if losses is not None:
                    log.scalars(as_scalars(losses, weights, model.config), done)
                if "samples" in due and dist.is_main() and not stop.requested():
                    dist.beat(f"sample images of the {weights} weights")
                    drawn[weights] = self._draw(model)
        if len(drawn) == len(WEIGHTS):
            self._log_samples(model, log, drawn, done)
        dist.barrier()
        log.restart()  # validation is not training time

    @cached_property
    def batches(self) -> list[tuple[int, list[int], Tensor, Tensor]]:
        """This process's, read and encoded once: its number, its images, their latents
        [B, C, h, w] and the training's labels of them [B].
        """
        labels, batches = torch.tensor(self.images.labels), []
        total = math.ceil(len(self.numbers) / BATCH)
        for k in range(dist.rank(), total, dist.world_size()):
            dist.beat(f"reading validation batch {k + 1} of {total}")
            numbers = self.numbers[k * BATCH : (k + 1) * BATCH]
            latents, own = read_latents(self.images.dataset, numbers, self.tokenizer, self.device)
            if len(own):  # as many orders as images that could be read
                batches.append((k, numbers[: len(own)], latents, labels[own]))
        return batches

    @torch.no_grad()
    def loss(self, model: TokenBridge) -> Tensor | None:
        """Losses of a position at every ratio, [R, T] float64, on the main process.

        None elsewhere, and if a signal asks to stop.
        """
        parts = []
        with evaluation_mode(model), unchanged_randomness(self.device):
            for number, images, *inputs in self.batches:
                if stop.requested():  # the others must find this process where they meet
                    break
                dist.beat(f"validation loss, batch {number + 1}")
                torch.manual_seed(number)  # of what a head draws
                masks = validation_masks(images, model.config.seq_len)
                latents, labels, masks = (x.to(self.device) for x in (*inputs, masks))
                with self.precision.autocast(self.device):
                    rows = [model.channel_losses(latents, labels, mask) for mask in masks]
                parts.append((number, len(labels), torch.stack(rows).cpu().double()))
        gathered = dist.gather_to_main((len(parts) == len(self.batches), parts))
        if gathered is None or not all(complete for complete, _ in gathered):
            return None
        ordered = sorted((part for _, own in gathered for part in own), key=lambda part: part[0])
        total = sum(count for _, count, _ in ordered)
        return sum(count * losses for _, count, losses in ordered) / total if ordered else None

    @cached_property
    def data_latents(self) -> Tensor:
        """Of training images [N, C, h, w]."""
        numbers = evenly_spread(len(self.training_data), COUNTED)
        return read_latents(self.training_data, numbers, self.tokenizer, self.device)[0]

    def _labels(self, model: TokenBridge) -> Tensor:
        classes = self.settings.classes or range(model.config.class_num)
        return spread_labels(self.settings.samples, classes)

    def _draw(self, model: TokenBridge) -> tuple[Tensor, Tensor | None]:
        """Latents [N, C, h, w], and images uint8 [N, 3, S, S] if there is a VAE."""
        with self.precision.autocast(self.device):
            latents = sample_latents(model, self._labels(model), **asdict(self.settings.sampling))
        if self.tokenizer.vae is None:
            return latents, None
        parts = latents.split(8)  # training holds most of the memory
        return latents, torch.cat([decode_images(self.tokenizer, part) for part in parts])

    def _log_samples(self, model: TokenBridge, log: TrainingLog, drawn: dict, done: int) -> None:
        (raw_latents, raw), (latents, averaged) = (drawn[weights] for weights in WEIGHTS)
        if model.quantizer is not None:
            sources = {"data": self.data_latents.to(self.device)}
            sources |= {"generated_raw": raw_latents, "generated_ema": latents}
            counts = {name: count_levels(model, source) for name, source in sources.items()}
            for name, levels in counts.items():
                log.histogram(f"levels/{name}", levels.sum(dim=0), done)
            bits = {f"levels/entropy_{n}": entropy(c).mean().item() for n, c in counts.items()}
            log.scalars(bits, done)
        if raw is not None:
            labels, names = self._labels(model).tolist(), self.settings.names
            classes = ", ".join(names[label] if names else str(label) for label in labels)
            log.writer.add_text("validation/classes_row_by_row", classes, done)
            log.image("validation/raw_and_average", side_by_side(raw, averaged), done)


def count_levels(model: TokenBridge, latents: Tensor) -> Tensor:
    """latents: [N, C, h, w] scaled -> how often each channel takes each level, [C, K]."""
    indices = model.quantizer.encode(latents.float().movedim(1, -1))
    return level_counts(indices, model.quantizer.levels).cpu()


def side_by_side(raw: Tensor, averaged: Tensor) -> Tensor:
    """raw, averaged: uint8 [N, 3, S, S] -> one picture uint8 [3, H, W], the raw weights' left.

    Images of more than LARGEST pixels a side are shrunk, lest the logs fill gigabytes.
    """
    columns, grids = math.ceil(len(raw) / math.isqrt(len(raw))), []
    for images in (raw, averaged):
        if images.shape[-1] > LARGEST:
            images = torch.nn.functional.interpolate(images.float(), size=LARGEST, mode="area")
        grids.append(grid(images.round().to(torch.uint8), columns))
    gap = grids[0].new_full((3, grids[0].shape[1], GAP), 255)
    return torch.cat([grids[0], gap, grids[1]], dim=2)
