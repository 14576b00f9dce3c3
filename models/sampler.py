"""Iterative decoding: from all positions masked to an image's latents.

sampling: mask schedule -> backbone (guided) -> channel head -> quantizer values -> unpatchify
What is random about image i (the order of its positions, the uniform numbers that a head draws
a position from) is a function of (seed, i) alone, whatever the batch and the number of processes.
Letters: B batch, L positions, C channels of a token, U uniforms of a position, m positions still
masked, n of them predicted.
Source: MAR, arXiv 2406.11838, section 3.4; arXiv 2503.16430; MaskGIT, arXiv 2202.04200, for the
order by confidence.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from models.backbone import unpatchify
from models.config import HEAD_INPUTS
from models.layers import take
from models.masking import Mask, mask_schedule
from models.token_cache import CachedBackbone
from models.tokenbridge import TokenBridge

CFG_SCHEDULES = ("linear", "constant")
ORDERS = ("random", "confidence", "raster")


@dataclass(frozen=True)
class SamplingOptions:
    """How to decode. Raises ValueError, naming the value, on what cannot be done.

    num_iter: iterations S. cfg: guidance g, 1 is none.
    temperature: of the softmax over levels; 0 takes the most likely one.
    order: "random", each image's own; "raster", row by row; "confidence": every iteration draws
    all masked positions and keeps those whose channels were the most likely together.
    head_input: see `ChannelHead.sample`; None is the model's own.
    token_cache: 0 is none; else all features are computed in every so many iterations, and reused
    in between: an approximation, see models/token_cache.py.
    """

    num_iter: int = 64
    cfg: float = 1.0
    cfg_schedule: str = "linear"
    temperature: float = 1.0
    order: str = "random"
    seed: int = 0
    head_input: str | None = None
    token_cache: int = 0

    def __post_init__(self):
        for name, least in (("num_iter", 1), ("temperature", 0), ("cfg", 0), ("token_cache", 0)):
            if not least <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} {getattr(self, name)} is not a number from {least} on")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed {self.seed} is not between 0 and 2^63")
        known = dict(cfg_schedule=CFG_SCHEDULES, order=ORDERS, head_input=(*HEAD_INPUTS, None))
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


def guidance_scale(cfg: float, schedule: str, length: int, m: int) -> float:
    """g_s of an iteration after which m of L positions stay masked."""
    return 1 + (cfg - 1) * (length - m) / length if schedule == "linear" else cfg


def sample_latents(
    model: TokenBridge,
    labels: Tensor | None,
    *,
    batch_size: int | None = None,
    image_ids: Sequence[int] | None = None,
    orders: Tensor | None = None,
    uniforms: Tensor | None = None,
    **options,
) -> Tensor:
    """[B, C, H, W] scaled latents, every value a level of the quantizer if there is one.

    labels: [B] int64 classes; None, with `batch_size`, for images of no class.
    image_ids: B numbers that name the images, default 0..B-1. orders: [B, L] permutations, the
    positions in the reverse order of their prediction. uniforms: [B, L, U], what the head draws
    from. options: those of `SamplingOptions`. Raises ValueError on values out of range.
    """
    how = SamplingOptions(**options), batch_size, image_ids, (orders, uniforms)
    *_, last = sampling_steps(model, labels, *how)
    return unpatchify(last.values, model.config.patch_size, model.config.grid_size)


@torch.no_grad()
def sampling_steps(
    model: TokenBridge,
    labels: Tensor | None,
    options: SamplingOptions,
    batch_size: int | None = None,
    image_ids: Sequence[int] | None = None,
    given: tuple[Tensor | None, Tensor | None] = (None, None),
) -> Iterator[SamplingStep]:
    """The same, one iteration after the other: at least one. given: orders and uniforms."""
    config, device = model.config, model.backbone.fake_latent.device
    if labels is None and batch_size is None:
        raise ValueError("labels=None needs batch_size, the number of images")
    if labels is not None and ((labels < 0) | (labels >= config.class_num)).any():
        raise ValueError(f"labels {labels.tolist()} are not all in [0, {config.class_num})")
    if options.order == "confidence" and model.quantizer is None:
        raise ValueError(f"order confidence needs probabilities, which {config.head} has not")
    batch = batch_size if labels is None else len(labels)
    ids = range(batch) if image_ids is None else image_ids
    if len(ids) != batch:
        raise ValueError(f"{len(ids)} image_ids for a batch of {batch}")
    drawn = image_randomness(options.seed, ids, config.seq_len, model.head.draws)
    if options.order == "raster":
        drawn = torch.arange(config.seq_len).flip(0).expand(batch, -1), drawn[1]
    orders, uniforms = (
        (own if other is None else other).to(device)
        for own, other in zip(drawn, given, strict=True)
    )
    conditions = _Conditions(model, None if labels is None else labels.to(device), options)
    how = {"temperature": options.temperature}
    if config.head == "channel":
        how["head_input"] = options.head_input or config.head_input

    values = torch.zeros(batch, config.seq_len, config.token_dim, device=device)
    filled = orders[:, :0]
    with evaluation_mode(model):
        for before, after, m in mask_schedule(config.seq_len, options.num_iter):
            if before == after:
                continue
            # Those to fill now come last; by confidence, any of those left may be.
            positions = orders[:, (0 if options.order == "confidence" else after) : before]
            scale = guidance_scale(options.cfg, options.cfg_schedule, config.seq_len, m)
            mask = Mask.from_orders(orders, before)
            z = conditions(values, mask, positions, filled, scale).flatten(0, 1)
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
            masked = torch.ones(values.shape[:2], dtype=torch.bool, device=device)
            masked.scatter_(1, orders[:, after:], False)
            yield SamplingStep(values, filled, log_probs, masked)


class _Conditions:
    """z of the positions to predict; guided, z_uncond + g (z_cond - z_uncond), both in one pass.

    For a head that guides, [B, n, 2, D]: both.
    """

    def __init__(self, model: TokenBridge, labels: Tensor | None, options: SamplingOptions):
        self.backbone, self.labels, self.head = model.backbone, labels, model.head
        self.guided = labels is not None and options.cfg != 1
        refresh = options.token_cache
        self.cached = CachedBackbone(model.backbone, refresh) if refresh else None

    def __call__(
        self, values: Tensor, mask: Mask, positions: Tensor, filled: Tensor, scale: float
    ) -> Tensor:
        """values: [B, L, C], positions: [B, n], filled: [B, F], the last ones -> [B, n, D]."""
        # Whether a batch is doubled must not change between two iterations that share features.
        guided = self.guided and (scale != 1 or self.cached is not None)
        choices = [self.labels, None] if guided else [self.labels]
        classes = [self.backbone.class_embedding(choice, len(values)) for choice in choices]
        values, masked, visible, positions, filled = (
            torch.cat([x] * len(choices))
            for x in (values, mask.masked, mask.visible, positions, filled)
        )
        inputs = values, torch.cat(classes), Mask(masked, visible), positions
        z = self.backbone(*inputs) if self.cached is None else self.cached(*inputs, filled)
        if not guided:
            return z
        cond, uncond = z.chunk(2)
        if self.head.guides:
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
