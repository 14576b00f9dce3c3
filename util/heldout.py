"""Loss on images that training never sees, by mask ratio and by channel: is a run on track?

    choose images -> latents -> the same masks at every ratio -> loss of raw and averaged weights

What is random about image i (its latents' noise, its order of positions) is a function of i alone,
and nothing is drawn from a global generator: curves are comparable over a run and between runs on
the same images, and training goes on as if nobody had looked.
Letters: N images, R mask ratios, C latent channels, L positions, B images of a batch.
"""

import argparse
import math
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from models.config import TokenBridgeConfig
from models.masking import MASK_RATIO_MEAN, MASK_RATIO_STD
from models.sampler import evaluation_mode, image_randomness
from models.tokenbridge import TokenBridge
from models.tokenizers.kl16 import Posterior
from models.tokenizers.tokenizer import Tokenizer
from util import dist, stop
from util.data.images import ImageDataset, list_images
from util.data.latent_cache import CachedLatents, LatentBatch, open_cache
from util.device import Precision
from util.errors import UserError, as_user_error
from util.evaluation.folder import batch_ranges
from util.inputs import Inputs, TrainingData, held_out_folder

RATIOS = (0.25, 0.5, 0.7, 0.85, 1.0)  # training draws from 0.7 on, sampling goes through all
BATCH = 16  # images; small beside a training batch, which has gradients, too
SEED = 0  # of noise and orders, whatever --seed is: runs of other seeds compare

Data = ImageDataset | CachedLatents


@dataclass(frozen=True)
class HeldOut:
    """dataset: what is never trained on. labels: the training's, by those of the dataset."""

    dataset: Data
    labels: list[int]
    source: str


class SomeLatents(CachedLatents):
    """The chosen images of a cache, numbered anew."""

    def __init__(self, whole: CachedLatents, chosen: list[int]):
        self.whole, self.chosen = whole, chosen
        self.manifest, self.classes = whole.manifest, whole.classes
        self.labels, self.latent_shape, self.dtype = (
            whole.labels[chosen],
            whole.latent_shape,
            whole.dtype,
        )
        self.crcs = whole.crcs[chosen] if whole.crcs is not None else None

    def __getitems__(self, keys: list) -> LatentBatch:
        pairs = (key if isinstance(key, tuple) else (key, False) for key in keys)
        return self.whole.__getitems__([(self.chosen[index], flip) for index, flip in pairs])


def spread(count: int, wanted: int) -> list[int]:
    """So many numbers below count, evenly spread: lists of images are sorted by class."""
    wanted = min(count, wanted)
    return [(2 * i + 1) * count // (2 * wanted) for i in range(wanted)]


def some(dataset: Data, chosen: list[int]) -> Data:
    """The images of those numbers."""
    if isinstance(dataset, ImageDataset):
        samples = [dataset.samples[i] for i in chosen]
        return ImageDataset(samples, dataset.size, dataset.on_bad, dataset.max_pixels)
    return SomeLatents(dataset, chosen)


def set_aside(data: TrainingData, count: int) -> tuple[TrainingData, HeldOut]:
    """Take so many images, evenly spread over the classes, out of the training set."""
    total = len(data.dataset)
    if count >= total:
        raise UserError(f"--holdout {count} leaves nothing of the {total} images of {data.source}")
    chosen = spread(total, count)
    kept = sorted(set(range(total)) - set(chosen))
    source = f"{count} images that --holdout takes out of {data.source}"
    held_out = HeldOut(some(data.dataset, chosen), list(range(len(data.classes))), source)
    return replace(data, dataset=some(data.dataset, kept)), held_out


def find_heldout(args: argparse.Namespace, inputs: Inputs) -> tuple[Inputs, HeldOut | None]:
    """What the flags hold out, and the inputs without it.

    Raises UserError, naming the flag, if it does not fit the training.
    """
    given = [name for name in ("val_path", "val_cached_path", "holdout") if getattr(args, name)]
    if len(given) > 1:
        raise UserError(f"--{given[0]} and --{given[1]}: held-out data comes from one of them")
    if args.holdout:
        data, held_out = set_aside(inputs.data, args.holdout)
        return replace(inputs, data=data), held_out
    if args.val_freq == 0:
        return inputs, None
    if args.val_cached_path:
        return inputs, _of_cache(args, inputs)
    folder = held_out_folder(args)
    if folder is None:
        dist.print_main("no held-out loss: --val_path, --val_cached_path or --holdout gives it")
        return inputs, None
    return inputs, _of_folder(args, inputs, folder)


def _of_cache(args: argparse.Namespace, inputs: Inputs) -> HeldOut:
    source = f"--val_cached_path {args.val_cached_path}"
    with as_user_error(source):
        cache = open_cache(args.val_cached_path, inputs.config.img_size, inputs.data.vae_sha256)
    if tuple(cache.latent_shape) != inputs.config.latent_shape:
        raise UserError(
            f"{source} holds latents {tuple(cache.latent_shape)}, the model expects "
            f"{inputs.config.latent_shape}"
        )
    return HeldOut(cache, _labels(cache.classes, inputs.data, source), source)


def _of_folder(args: argparse.Namespace, inputs: Inputs, folder: Path) -> HeldOut | None:
    """Those of --val_path must fit; a folder val/ that does not is told and left alone."""
    try:
        if inputs.vae is None:
            raise UserError(
                f"{folder} holds images, which need the VAE: give --vae_path, or a cache of them "
                "(main_cache.py --split val) as --val_cached_path"
            )
        images = list_images(folder, "", flag="--val_path")
        on_bad = "drop" if args.skip_bad_images else "raise"
        dataset = ImageDataset(
            images.samples, inputs.config.img_size, on_bad, args.max_image_pixels
        )
        return HeldOut(dataset, _labels(images.classes, inputs.data, str(folder)), str(folder))
    except UserError as error:
        if args.val_path:
            raise
        dist.print_main(f"no held-out loss: {error}")
        return None


def _labels(classes: list[str], data: TrainingData, source: str) -> list[int]:
    known = {name: label for label, name in enumerate(data.classes)}
    unknown = [name for name in classes if name not in known]
    if unknown:
        raise UserError(
            f"{source} has class {unknown[0]!r}, which {data.source} has not; name a folder whose "
            "classes are among those trained on"
        )
    return [known[name] for name in classes]


def read_latents(
    dataset: Data, numbers: list[int], tokenizer: Tokenizer, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Scaled latents [B, C, h, w] of those images and the dataset's labels [B], on the CPU.

    The noise of image i is a function of i. Images that cannot be read may be left out.
    """
    found, labels = [], []
    for number in numbers:
        item = dataset[number]
        if item is None:
            continue
        values, label = item
        if isinstance(dataset, ImageDataset):
            values = tokenizer.posterior(values[None].to(device)).parameters[0]
        mixed = int(np.random.SeedSequence([SEED, number]).generate_state(1)[0])
        posterior = Posterior(values[None].float().cpu())
        found.append(tokenizer.sample(posterior, torch.Generator().manual_seed(mixed)))
        labels.append(label)
    return torch.cat(found) if found else torch.empty(0), torch.tensor(labels, dtype=torch.int64)


def masks(numbers: list[int], config: TokenBridgeConfig) -> Tensor:
    """bool [R, B, L]: ceil(L * ratio) positions of each image; a larger mask holds the smaller."""
    length = config.seq_len
    orders, _ = image_randomness(SEED, numbers, length, 1)
    kept = torch.zeros(len(RATIOS), len(numbers), length, dtype=torch.bool)
    for mask, ratio in zip(kept, RATIOS, strict=True):
        mask.scatter_(1, orders[:, : math.ceil(length * ratio)], True)
    return kept


def ratio_weights(minimum: float) -> list[float]:
    """How often training draws a ratio nearest to each of RATIOS, which add up to 1.

    Source: models/masking.py, normal(1.0, 0.25) truncated to [minimum, 1].
    """
    middles = [(a + b) / 2 for a, b in zip(RATIOS, RATIOS[1:], strict=False)]
    edges = torch.tensor([0.0, *middles, 1.0]).clamp(min=minimum)
    mass = torch.special.ndtr((edges - MASK_RATIO_MEAN) / MASK_RATIO_STD).diff()
    if mass.sum() == 0:  # all is masked
        mass[-1] = 1
    return (mass / mass.sum()).tolist()


@dataclass(frozen=True)
class _Batch:
    number: int
    latents: Tensor  # [B, C, h, w]
    labels: Tensor  # [B], the training's
    masks: Tensor  # [R, B, L]


class HeldOutLoss:
    """count: images that are used of the held-out ones, evenly spread."""

    def __init__(
        self,
        held_out: HeldOut,
        count: int,
        config: TokenBridgeConfig,
        tokenizer: Tokenizer,
        device: torch.device,
        precision: Precision,
    ):
        self.held_out, self.config = held_out, config
        self.tokenizer, self.device, self.precision = tokenizer, device, precision
        self.numbers = spread(len(held_out.dataset), count)
        self.ranges = batch_ranges(len(self.numbers), BATCH)

    @cached_property
    def mine(self) -> list[_Batch]:
        """This process's batches, read and encoded once."""
        labels = torch.tensor(self.held_out.labels)
        found = []
        for k in range(dist.rank(), len(self.ranges), dist.world_size()):
            dist.beat(f"reading held-out batch {k + 1} of {len(self.ranges)}")
            numbers = [self.numbers[i] for i in self.ranges[k]]
            latents, own = read_latents(self.held_out.dataset, numbers, self.tokenizer, self.device)
            kept = numbers[: len(own)]  # as many orders as images that could be read
            if kept:
                found.append(_Batch(k, latents, labels[own], masks(kept, self.config)))
        return found

    @torch.no_grad()
    def __call__(self, model: TokenBridge) -> Tensor | None:
        """Loss at every ratio of every channel, [R, C] float64, on the main process.

        The same on any number of processes. None elsewhere, and if a signal asks to stop.
        """
        parts = []
        with evaluation_mode(model):
            for batch in self.mine:
                if stop.requested():  # the others must find this process where they meet
                    break
                dist.beat(f"held-out loss, batch {batch.number + 1} of {len(self.ranges)}")
                parts.append((batch.number, len(batch.labels), self._losses(model, batch)))
        found = dist.gather_to_main((len(parts) == len(self.mine), parts))
        if found is None or not all(whole for whole, _ in found):
            return None
        ordered = sorted((part for _, own in found for part in own), key=lambda part: part[0])
        if not ordered:
            return None
        total = sum(count for _, count, _ in ordered)
        return sum(count * losses for _, count, losses in ordered) / total

    def _losses(self, model: TokenBridge, batch: _Batch) -> Tensor:
        """[R, C] float64, means over the batch."""
        latents, labels = batch.latents.to(self.device), batch.labels.to(self.device)
        rows = []
        for mask in batch.masks.to(self.device):
            with self.precision.autocast(self.device):
                losses = model.channel_losses(latents, labels, mask)
            # with patches, a token holds p*p scalars of each channel
            rows.append(losses.cpu().double().unflatten(0, (self.config.vae_embed_dim, -1)).mean(1))
        return torch.stack(rows)


def as_scalars(losses: Tensor, weights: str, config: TokenBridgeConfig) -> dict[str, float]:
    """losses: [R, C] -> TensorBoard's names. weights: "raw" or "ema".

    The loss and that of the channels are means over the ratios as often as training draws them.
    """
    drawn = torch.tensor(ratio_weights(config.mask_ratio_min), dtype=torch.float64)
    channels = drawn @ losses
    found = {f"heldout/loss_{weights}": channels.mean().item()}
    for ratio, row in zip(RATIOS, losses, strict=True):
        found[f"heldout_ratio_{weights}/{ratio:.2f}"] = row.mean().item()
    for channel, loss in enumerate(channels.tolist()):
        found[f"heldout_channel_{weights}/{channel:02d}"] = loss
    for place, channel in enumerate(config.channel_order):
        name = f"heldout_order_{weights}/{place:02d}_channel_{channel:02d}"
        found[name] = channels[channel].item()
    return found
