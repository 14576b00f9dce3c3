"""Validation while training: loss on images never trained on, sample images, use of the levels.

What is random about image i (its latents' noise, its order of positions) is a function of i alone,
and nothing is drawn from a global generator: curves are comparable, and training goes on as if
nothing had been measured. All processes share the work; figures do not depend on their number.
Letters: N images, R mask ratios, C latent channels, L positions, K levels, B images of a batch.
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
from models.generate import decode_images, spread_labels
from models.masking import share_below
from models.quantizer import entropy, level_counts
from models.sampler import SamplingOptions, evaluation_mode, image_randomness, sample_latents
from models.tokenbridge import TokenBridge
from models.tokenizers.kl16 import Posterior
from models.tokenizers.tokenizer import Tokenizer
from util import dist, stop
from util.data.images import ImageDataset, grid
from util.data.latent_cache import CachedLatents
from util.device import Precision, unchanged_randomness
from util.logging import TrainingLog
from util.optim import EMA

RATIOS = (0.25, 0.5, 0.7, 0.85, 1.0)  # training draws from 0.7 on, sampling goes through all
BATCH = 16  # images; small beside a training batch, which has gradients, too
SEED = 0  # of noise and orders, whatever --seed is: runs of other seeds compare
WEIGHTS = ("raw", "ema")
COUNTED = 64  # training images whose levels are counted
LARGEST, GAP = 128, 12  # pixels of an image as shown, and between raw and averaged
FORGOTTEN = 0.01  # share of the initial weights below which nobody sees it

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
        latents.append(tokenizer.sample(posterior, torch.Generator().manual_seed(mixed)))
        labels.append(label)
    joined = torch.cat(latents) if latents else torch.empty(0)
    return joined, torch.tensor(labels, dtype=torch.int64)


def validation_masks(numbers: list[int], config: TokenBridgeConfig) -> Tensor:
    """bool [R, B, L]: ceil(L * ratio) positions of each image; a larger mask holds the smaller."""
    length = config.seq_len
    orders, _ = image_randomness(SEED, numbers, length, 1)
    masks = torch.zeros(len(RATIOS), len(numbers), length, dtype=torch.bool)
    for mask, ratio in zip(masks, RATIOS, strict=True):
        mask.scatter_(1, orders[:, : math.ceil(length * ratio)], True)
    return masks


def ratio_weights(minimum: float) -> list[float]:
    """How often training draws a ratio nearest to each of RATIOS, which add up to 1."""
    middles = [(a + b) / 2 for a, b in zip(RATIOS, RATIOS[1:], strict=False)]
    cdf = [0.0, *(share_below(middle, minimum) for middle in middles), 1.0]
    return [above - below for below, above in zip(cdf, cdf[1:], strict=False)]


def as_scalars(losses: Tensor, weights: str, config: TokenBridgeConfig) -> dict[str, float]:
    """losses: [R, C] -> TensorBoard's names. weights: "raw" or "ema".

    The loss and that of the channels are means over the ratios as often as training draws them.
    """
    shares = torch.tensor(ratio_weights(config.mask_ratio_min), dtype=torch.float64)
    channels = shares @ losses
    scalars = {f"validation/loss_{weights}": channels.mean().item()}
    for ratio, row in zip(RATIOS, losses, strict=True):
        scalars[f"validation_ratio_{weights}/{ratio:.2f}"] = row.mean().item()
    if len(channels) == 1:  # of a head whose loss is of whole positions
        return scalars
    for channel, loss in enumerate(channels.tolist()):
        scalars[f"validation_channel_{weights}/{channel:02d}"] = loss
    for rank, channel in enumerate(config.channel_order):
        name = f"validation_order_{weights}/{rank:02d}_channel_{channel:02d}"
        scalars[name] = channels[channel].item()
    return scalars


@dataclass(frozen=True)
class ValidationBatch:
    number: int
    latents: Tensor  # [B, C, h, w]
    labels: Tensor  # [B], the training's
    masks: Tensor  # [R, B, L]


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

    def due(self, done: int, every: int) -> bool:
        return bool(every) and (done % every == 0 or done in (1, self.last_step))

    def labels(self, class_num: int) -> Tensor:
        return spread_labels(self.samples, self.classes or range(class_num))

    def describe(self, class_num: int) -> str:
        labels = self.labels(class_num).tolist()
        shown = (self.names[label] if self.names else str(label) for label in labels)
        return f"The images, row by row, are of the classes {', '.join(shown)}."


class Validation:
    """training_data: whose levels are counted once. images: what is never trained on, if any."""

    def __init__(
        self,
        settings: ValidationSettings,
        tokenizer: Tokenizer,
        device: torch.device,
        precision: Precision,
        training_data: Data,
        images: ValidationSet | None,
    ):
        self.settings, self.tokenizer, self.device = settings, tokenizer, device
        self.precision, self.training_data, self.images = precision, training_data, images
        self.levels_of_data: Tensor | None = None
        count = len(images.dataset) if images is not None else 0
        self.numbers = evenly_spread(count, settings.loss_images)

    def due(self, done: int) -> bool:
        """Whether to validate after so many steps, on all processes alike."""
        return self.loss_due(done) or self.settings.due(done, self.settings.samples_every)

    def loss_due(self, done: int) -> bool:
        return bool(self.numbers) and self.settings.due(done, self.settings.loss_every)

    def __call__(self, model: TokenBridge, ema: EMA, log: TrainingLog, done: int) -> None:
        """Measure, draw and log. A signal that asks to stop cuts it short, on any process."""
        with torch.no_grad(), unchanged_randomness(self.device), evaluation_mode(model):
            if self.loss_due(done):
                for weights in WEIGHTS:
                    with ema.swapped_in() if weights == "ema" else nullcontext():
                        losses = self.loss(model)
                    if losses is not None:
                        log.scalars(as_scalars(losses, weights, model.config), done)
            if self.settings.due(done, self.settings.samples_every):
                self._draw(model, ema, log, done)
        dist.barrier()
        log.restart()  # validation is not training time

    @cached_property
    def batches(self) -> list[ValidationBatch]:
        """This process's, read and encoded once."""
        labels, batches = torch.tensor(self.images.labels), []
        total = math.ceil(len(self.numbers) / BATCH)
        for k in range(dist.rank(), total, dist.world_size()):
            dist.beat(f"reading validation batch {k + 1} of {total}")
            numbers = self.numbers[k * BATCH : (k + 1) * BATCH]
            latents, own = read_latents(self.images.dataset, numbers, self.tokenizer, self.device)
            if len(own):  # as many orders as images that could be read
                masks = validation_masks(numbers[: len(own)], self.config)
                batches.append(ValidationBatch(k, latents, labels[own], masks))
        return batches

    @torch.no_grad()
    def loss(self, model: TokenBridge) -> Tensor | None:
        """Loss at every ratio of every channel, [R, C] float64, on the main process.

        None elsewhere, and if a signal asks to stop.
        """
        self.config, parts = model.config, []
        with evaluation_mode(model), unchanged_randomness(self.device):
            for batch in self.batches:
                if stop.requested():  # the others must find this process where they meet
                    break
                dist.beat(f"validation loss, batch {batch.number + 1}")
                parts.append((batch.number, len(batch.labels), self._losses(model, batch)))
        gathered = dist.gather_to_main((len(parts) == len(self.batches), parts))
        if gathered is None or not all(complete for complete, _ in gathered):
            return None
        ordered = sorted((part for _, own in gathered for part in own), key=lambda part: part[0])
        total = sum(count for _, count, _ in ordered)
        return sum(count * losses for _, count, losses in ordered) / total if ordered else None

    def _losses(self, model: TokenBridge, batch: ValidationBatch) -> Tensor:
        """[R, C] float64, means over the batch."""
        latents, labels = batch.latents.to(self.device), batch.labels.to(self.device)
        torch.manual_seed(batch.number)  # of what a head draws
        rows = []
        for mask in batch.masks.to(self.device):
            with self.precision.autocast(self.device):
                losses = model.channel_losses(latents, labels, mask)
            # with patches, a token holds p*p scalars of each channel
            channels = model.config.vae_embed_dim if len(losses) > 1 else 1
            rows.append(losses.cpu().double().unflatten(0, (channels, -1)).mean(1))
        return torch.stack(rows)

    def _draw(self, model: TokenBridge, ema: EMA, log: TrainingLog, done: int) -> None:
        """Raw and averaged weights are two jobs, each for one process."""
        drawn, settings = {}, self.settings
        labels = settings.labels(model.config.class_num)
        for number, weights in enumerate(WEIGHTS):
            if number % dist.world_size() == dist.rank() and not stop.requested():
                dist.beat(f"sample images of the {weights} weights")
                averaged = ema.swapped_in() if weights == "ema" else nullcontext()
                with averaged, self.precision.autocast(self.device):
                    latents = sample_latents(model, labels, **asdict(settings.sampling))
                images = None
                if self.tokenizer.vae is not None:
                    parts = latents.split(8)  # training holds most of the memory
                    images = torch.cat([decode_images(self.tokenizer, p) for p in parts])
                    images = shrunk(images)
                drawn[weights] = (count_levels(model, latents), images)
        gathered = dist.gather_to_main(drawn)
        if gathered is None:
            return
        drawn = {weights: part for own in gathered for weights, part in own.items()}
        if set(drawn) == set(WEIGHTS):  # else somebody was asked to stop
            self._log_samples(model, ema.rate, log, drawn, done)

    def _log_samples(
        self, model: TokenBridge, rate: float, log: TrainingLog, drawn: dict, done: int
    ) -> None:
        if self.levels_of_data is None and model.quantizer is not None:
            numbers = evenly_spread(len(self.training_data), COUNTED)
            latents, _ = read_latents(self.training_data, numbers, self.tokenizer, self.device)
            self.levels_of_data = count_levels(model, latents.to(self.device))
        counts = {"data": self.levels_of_data}
        counts |= {f"generated_{weights}": levels for weights, (levels, _) in drawn.items()}
        counts = {} if model.quantizer is None else counts
        for name, levels in counts.items():
            log.histogram(f"levels/{name}", levels.sum(dim=0), done)
        bits = {f"levels/entropy_{name}": entropy(c).mean().item() for name, c in counts.items()}
        log.scalars(bits, done)
        text = f"{about_average(rate, done)} {self.settings.describe(model.config.class_num)}"
        log.text("validation/about_the_average", text, done)
        (_, raw), (_, averaged) = (drawn[weights] for weights in WEIGHTS)
        if raw is not None:
            log.image("validation/raw_and_average", side_by_side(raw, averaged), done)


def count_levels(model: TokenBridge, latents: Tensor) -> Tensor | None:
    """latents: [N, C, h, w] scaled -> how often each channel takes each level, [C, K]."""
    if model.quantizer is None:
        return None
    indices = model.quantizer.encode(latents.float().movedim(1, -1))
    return level_counts(indices, model.quantizer.levels).cpu()


def shrunk(images: Tensor) -> Tensor:
    """uint8 [N, 3, H, H] -> at most LARGEST pixels a side, lest the logs fill gigabytes."""
    if images.shape[-1] <= LARGEST:
        return images
    smaller = torch.nn.functional.interpolate(images.float(), size=(LARGEST,) * 2, mode="area")
    return smaller.round().to(torch.uint8)


def about_average(rate: float, steps: int) -> str:
    """The age of the average, in words that explain what its images look like."""
    share = rate**steps  # of the initial weights
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


def side_by_side(raw: Tensor, averaged: Tensor) -> Tensor:
    """raw, averaged: uint8 [N, 3, S, S] -> one picture uint8 [3, H, W], the raw weights' left."""
    columns = math.ceil(len(raw) / math.isqrt(len(raw)))
    left, right = (grid(part, columns) for part in (raw, averaged))
    return torch.cat([left, left.new_full((3, left.shape[1], GAP), 255), right], dim=2)
