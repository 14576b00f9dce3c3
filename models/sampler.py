"""Iterative decoding: from all positions masked to an image's latents.

sampling: mask schedule -> backbone (guided) -> channel head -> quantizer values -> unpatchify
What is random about image i (the order of its positions, the uniform numbers that a head draws
a position from) is a function of (seed, i) alone, whatever the batch and the number of processes.
Letters: B batch, L positions, C channels of a token, U uniforms of a position, m positions still
masked, n of them predicted.
Source: MAR, arXiv 2406.11838, section 3.4; arXiv 2503.16430; MaskGIT, arXiv 2202.04200, for the
order by confidence; RAR, arXiv 2411.00776, for cosine guidance; eMIGM, arXiv 2503.07197, for
the interval of guidance and the exponential mask schedule.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from models.backbone import CachedBackbone, patchify, unpatchify
from models.config import HEAD_INPUTS
from models.layers import take
from models.masking import MASK_SCHEDULES, mask_schedule
from models.tokenbridge import TokenBridge

CFG_SCHEDULES = ("linear", "constant", "cosine")
ORDERS = ("random", "confidence", "raster")


@dataclass(frozen=True)
class SamplingOptions:
    """How to decode. Raises ValueError, naming the value, on what cannot be done.

    num_iter: iterations S. cfg: guidance g, 1 is none; see `guidance_scale`.
    cfg_power: of the cosine schedule, None is 1. cfg_interval: guide only while the share of the
    iterations that are done lies in it, both ends included; elsewhere g is 1 and the unconditional
    half is not computed. None is always. mask_schedule: of `MASK_SCHEDULES`.
    temperature: of the softmax over levels; 0 takes the most likely one.
    order: "random", each image's own; "raster", row by row; "confidence": every iteration draws
    all masked positions and keeps those whose channels were the most likely together.
    head_input: see `ChannelHead.sample_rows`; None is the model's own.
    token_cache: 0 is none; else all features are computed in every so many iterations, and reused
    in between: an approximation, see `CachedBackbone`.
    """

    num_iter: int = 64
    cfg: float = 1.0
    cfg_schedule: str = "linear"
    temperature: float = 1.0
    order: str = "random"
    seed: int = 0
    head_input: str | None = None
    token_cache: int = 0
    cfg_power: float | None = None
    cfg_interval: tuple[float, float] | None = None
    mask_schedule: str = "cosine"

    def __post_init__(self):
        for name, least in (("num_iter", 1), ("temperature", 0), ("cfg", 0), ("token_cache", 0)):
            if not least <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} {getattr(self, name)} is not a number from {least} on")
        cosine = self.cfg_schedule == "cosine"
        if self.cfg_power is not None and not (cosine and 0 < self.cfg_power < math.inf):
            raise ValueError(f"cfg_power {self.cfg_power} is no power of cfg_schedule cosine")
        if self.cfg_interval is not None:
            ends = np.ravel(self.cfg_interval)
            if len(ends) != 2 or not 0 <= ends[0] <= ends[1] <= 1:
                raise ValueError(f"cfg_interval {self.cfg_interval} is not 0 <= LOW <= HIGH <= 1")
            if not any(ends[0] <= i / self.num_iter <= ends[1] for i in range(self.num_iter)):
                raise ValueError(f"cfg_interval {self.cfg_interval}: no iteration lies in it")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed {self.seed} is not between 0 and 2^63")
        known = dict(cfg_schedule=CFG_SCHEDULES, order=ORDERS, head_input=(*HEAD_INPUTS, None))
        known["mask_schedule"] = tuple(MASK_SCHEDULES)
        for name, values in known.items():
            if getattr(self, name) not in values:
                raise ValueError(f"{name} {getattr(self, name)!r} is not one of {values}")


@dataclass(frozen=True)
class SamplingStep:
    """What an iteration filled: the positions [B, n].

    values: [B, L, C] of all positions so far, 0 elsewhere. masked: [B, L], true where nothing is.
    log_probs: [B, n, C], in nats, of what was drawn at the temperature; see models/heads.
    """

    values: Tensor
    positions: Tensor
    log_probs: Tensor
    masked: Tensor


def image_randomness(
    seed: int, image_ids: Sequence[int], length: int, draws: int
) -> tuple[Tensor, Tensor]:
    """For each image, from (seed, id): a random order [B, L] and uniforms [B, L, U] in [0, 1)."""
    shape = (length, draws + 1)
    # Raw Philox words: numpy promises that these stay as they are in later releases.
    words = (np.random.Philox(key=[seed, i]).random_raw(math.prod(shape)) for i in image_ids)
    draws = np.stack([(of_one >> np.uint64(40)).astype(np.float32) for of_one in words])
    draws = torch.from_numpy(draws.reshape(-1, *shape)) * 2**-24
    return draws[..., 0].argsort(dim=1, stable=True), draws[..., 1:]


def guidance_scale(options: SamplingOptions, length: int, m: int, done: float = 0.0) -> float:
    """g_s of an iteration after which m of L positions stay masked. done: the share of the
    iterations that come before it.
    """
    low, high = options.cfg_interval or (0, 1)
    if not low <= done <= high:
        return 1.0
    if options.cfg_schedule == "linear":
        return 1 + (options.cfg - 1) * (length - m) / length
    if options.cfg_schedule == "cosine":
        angle = math.pi * done ** (options.cfg_power or 1)
        return 1 + (options.cfg - 1) * (1 - math.cos(angle)) / 2
    return options.cfg


def iterations(options: SamplingOptions, length: int) -> list[tuple[int, int, float]]:
    """Of each iteration that fills any of `length` positions: how many are masked before and after
    it, and g_s.
    """
    steps = mask_schedule(length, options.num_iter, options.mask_schedule) if length else ()
    return [
        (before, after, guidance_scale(options, length, m, number / options.num_iter))
        for number, (before, after, m) in enumerate(steps)
        if before > after
    ]


def sample_latents(
    model: TokenBridge,
    labels: Tensor | None,
    *,
    batch_size: int | None = None,
    image_ids: Sequence[int] | None = None,
    orders: Tensor | None = None,
    uniforms: Tensor | None = None,
    known: Tensor | None = None,
    known_mask: Tensor | None = None,
    **options,
) -> Tensor:
    """[B, C, H, W] scaled latents, every value a level of the quantizer if there is one.

    labels: [B] int64 classes; None, with `batch_size`, for images of no class.
    image_ids: B numbers that name the images, default 0..B-1. orders: [B, L] permutations, the
    positions in the reverse order of their prediction. uniforms: [B, L, U], what the head draws
    from. known: [B, C, H, W] scaled latents, which stay, as the quantizer has them, where
    known_mask [B, G, G] is true: at as many positions in every image; all iterations are for the
    others. options: those of `SamplingOptions`. Raises ValueError on values out of range.
    """
    given = Given(orders, uniforms, known, known_mask)
    how = SamplingOptions(**options), batch_size, image_ids, given
    *_, last = sampling_steps(model, labels, *how)
    return unpatchify(last.values, model.config.patch_size, model.config.grid_size)


class Given(NamedTuple):
    """What is not drawn, or not predicted: see `sample_latents`."""

    orders: Tensor | None = None
    uniforms: Tensor | None = None
    known: Tensor | None = None
    known_mask: Tensor | None = None


NOTHING = Given()


@torch.no_grad()
def sampling_steps(
    model: TokenBridge,
    labels: Tensor | None,
    options: SamplingOptions,
    batch_size: int | None = None,
    image_ids: Sequence[int] | None = None,
    given: Given = NOTHING,
) -> Iterator[SamplingStep]:
    """The same, one iteration after the other: at least one, of no position if all are known."""
    config, device = model.config, model.backbone.fake_latent.device
    if labels is not None:
        check_labels(labels, config.class_num)
        labels, batch_size = labels.to(device), len(labels)
    elif batch_size is None:
        raise ValueError("labels=None needs batch_size, the number of images")
    if options.order == "confidence" and model.quantizer is None:
        raise ValueError(f"order confidence needs probabilities, which {config.head} has not")
    ids = range(batch_size) if image_ids is None else image_ids
    if len(ids) != batch_size:
        raise ValueError(f"{len(ids)} image_ids for a batch of {batch_size}")
    orders, uniforms = image_randomness(options.seed, ids, config.seq_len, model.head.draws)
    if options.order == "raster":
        orders = torch.arange(config.seq_len).flip(0).expand(batch_size, -1)
    orders = (orders if given.orders is None else given.orders).to(device)
    uniforms = (uniforms if given.uniforms is None else given.uniforms).to(device)
    backbone = CachedBackbone(model.backbone, options.token_cache)
    how = {"temperature": options.temperature}
    if config.head == "channel":
        how["head_input"] = options.head_input or config.head_input

    values = torch.zeros(batch_size, config.seq_len, config.token_dim, device=device)
    filled, unknown = orders[:, :0], config.seq_len
    if given.known is not None or given.known_mask is not None:
        values, orders, unknown = _begun(model, given, orders)
    masked = torch.zeros(values.shape[:2], dtype=torch.bool, device=device)
    masked.scatter_(1, orders[:, :unknown], True)
    if not unknown:
        yield SamplingStep(values, filled, values[:, :0], masked)
    with evaluation_mode(model):
        for before, after, scale in iterations(options, unknown):
            # Those to fill now come last; by confidence, any of those left may be.
            positions = orders[:, (0 if options.order == "confidence" else after) : before]
            visible = orders[:, before:].sort(dim=1).values
            inputs = values, visible, positions, filled
            z = _conditions(model, backbone, labels, scale, *inputs).flatten(0, 1)
            if z.dim() == 3:  # [M, 2, D]: the head guides
                how["guidance"] = scale
            drawn = model.head.sample(z, take(uniforms, positions).flatten(0, 1), **how)
            tokens, log_probs = (x.unflatten(0, positions.shape) for x in drawn)
            if options.order == "confidence":
                ranks = log_probs.sum(dim=-1).argsort(dim=1)  # the least certain first
                orders = torch.cat([positions.gather(1, ranks), orders[:, before:]], dim=1)
                tokens, log_probs = (take(x, ranks[:, after:]) for x in (tokens, log_probs))
            filled = orders[:, after:before]
            if model.quantizer is not None:
                tokens = model.quantizer.decode(tokens)
            values.scatter_(1, filled[..., None].expand_as(tokens), tokens)
            masked = masked.scatter(1, filled, False)
            yield SamplingStep(values, filled, log_probs, masked)


def check_labels(labels: Tensor, classes: int) -> None:
    """Reads them on the host, before any iteration."""
    if ((labels < 0) | (labels >= classes)).any():
        raise ValueError(f"labels {labels.tolist()} are not all in [0, {classes})")


def _begun(model: TokenBridge, given: Given, orders: Tensor) -> tuple[Tensor, Tensor, int]:
    """Values [B, L, C] and orders [B, L] in which known positions are filled; how many are not."""
    config, device = model.config, orders.device
    shapes = (len(orders), *config.latent_shape), (len(orders), config.grid_size, config.grid_size)
    found = tuple(None if x is None else tuple(x.shape) for x in (given.known, given.known_mask))
    if found != shapes:
        raise ValueError(f"known and known_mask are of {found}, expected {shapes}")
    mask = given.known_mask.to(device).bool().flatten(1)
    counts = mask.sum(dim=1).tolist()
    if len(set(counts)) != 1:
        raise ValueError(f"images of one batch have {counts} known positions: draw them apart")
    values = patchify(given.known.to(device).float(), config.patch_size)
    if model.quantizer is not None:
        values = model.quantizer.decode(model.quantizer.encode(values))
    last = mask.gather(1, orders).int().argsort(dim=1, stable=True)
    return values * mask[..., None], orders.gather(1, last), config.seq_len - counts[0]


def _conditions(
    model: TokenBridge, backbone: CachedBackbone, labels: Tensor | None, scale: float, *inputs
) -> Tensor:
    """z of the positions to predict [B, n, D]; guided, z_uncond + g (z_cond - z_uncond), both in
    one pass. For a head that guides, [B, n, 2, D]: both. inputs: of `CachedBackbone`, but classes.
    """
    choices = [labels] if labels is None or scale == 1 else [labels, None]
    classes = [model.backbone.class_embedding(choice, len(inputs[0])) for choice in choices]
    values, *others = (torch.cat([x] * len(choices)) for x in inputs)
    z = backbone(values, torch.cat(classes), *others)
    if len(choices) == 1:
        return z
    cond, uncond = z.chunk(2)
    if model.head.guides:
        return torch.stack([cond, uncond], dim=2)
    return uncond + scale * (cond - uncond)


@contextmanager
def evaluation_mode(model: torch.nn.Module) -> Iterator[None]:
    """Switch dropout off for a while."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
