"""Iterative decoding: from all positions masked to an image's latents.

sampling: mask schedule -> backbone (guided) -> channel head -> quantizer values -> unpatchify
What is random about image i (the order of its positions, one uniform number for each position
and channel) is a function of (seed, i) alone, so it is the same in any batch and on any number
of processes.
Letters: B batch, L positions, C channels of a token, m positions still masked.
Source: MAR, arXiv 2406.11838, section 3.4; arXiv 2503.16430.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from models.layers import take
from models.masking import Mask, mask_schedule
from models.patchify import unpatchify
from models.tokenbridge import TokenBridge

CFG_SCHEDULES = ("linear", "constant")


def image_randomness(
    seed: int, image_ids: Sequence[int], length: int, channels: int
) -> tuple[Tensor, Tensor]:
    """For each image, from (seed, id): a random order [B, L] and uniforms [B, L, C] in [0, 1)."""
    shape = (length, channels + 1)
    # Raw Philox words: numpy promises that these stay as they are in later releases.
    words = [np.random.Philox(key=[seed, i]).random_raw(math.prod(shape)) for i in image_ids]
    draws = (np.stack(words) >> np.uint64(40)).astype(np.float32) * np.float32(2**-24)
    draws = torch.from_numpy(draws.reshape(-1, *shape))
    return draws[..., 0].argsort(dim=1, stable=True), draws[..., 1:]


def guidance_scale(cfg: float, schedule: str, length: int, m: int) -> float:
    """g_s of an iteration after which m of L positions stay masked."""
    return 1 + (cfg - 1) * (length - m) / length if schedule == "linear" else cfg


@torch.no_grad()
def sample_latents(
    model: TokenBridge,
    labels: Tensor | None,
    *,
    num_iter: int,
    cfg: float = 1.0,
    cfg_schedule: str = "linear",
    temperature: float = 1.0,
    orders: Tensor | None = None,
    seed: int = 0,
    head_input: str | None = None,
    batch_size: int | None = None,
    image_ids: Sequence[int] | None = None,
) -> Tensor:
    """Generate latents.

    labels: [B] int64 classes; None, with `batch_size`, for images of no class.
    num_iter: iterations S. cfg: guidance g, 1 is none. cfg_schedule: "linear" or "constant".
    temperature: of the softmax over levels; 0 takes the most likely one.
    orders: [B, L] permutations, the positions in the reverse order of their prediction; drawn
    from (seed, image id) if None. image_ids: B numbers that name the images, default 0..B-1.
    head_input: "trained" or "published", default the model's own (see `ChannelHead.sample`).
    Returns [B, C, H, W] scaled latents, every value a level of the quantizer.
    Raises ValueError on values out of range.
    """
    batch = _check(model, labels, batch_size, num_iter, cfg_schedule, temperature)
    config, device = model.config, model.backbone.fake_latent.device
    if image_ids is None:
        image_ids = range(batch)
    if len(image_ids) != batch:
        raise ValueError(f"{len(image_ids)} image_ids for a batch of {batch}")
    drawn_orders, uniforms = image_randomness(seed, image_ids, config.seq_len, config.token_dim)
    orders = (drawn_orders if orders is None else orders).to(device)
    uniforms = uniforms.to(device)
    labels = labels.to(device) if labels is not None else None

    values = torch.zeros(batch, config.seq_len, config.token_dim, device=device)
    with evaluation_mode(model):
        for before, after, m in mask_schedule(config.seq_len, num_iter):
            if before == after:
                continue
            positions = orders[:, after:before]  # [B, n], uncovered in this iteration
            scale = guidance_scale(cfg, cfg_schedule, config.seq_len, m)
            mask = Mask.from_orders(orders, before)
            z = _conditions(model, values, labels, mask, positions, scale)
            indices = model.head.sample(
                z.flatten(0, 1),
                take(uniforms, positions).flatten(0, 1),
                temperature,
                head_input or config.head_input,
            )
            drawn = model.quantizer.decode(indices).unflatten(0, positions.shape)
            values.scatter_(1, positions[..., None].expand_as(drawn), drawn)
    return unpatchify(values, config.patch_size, config.grid_size)


def _conditions(
    model: TokenBridge,
    values: Tensor,
    labels: Tensor | None,
    mask: Mask,
    positions: Tensor,
    scale: float,
) -> Tensor:
    """z of the positions [B, n], [B, n, D]; with guidance, both halves in one pass:

    z_uncond + g (z_cond - z_uncond).
    """
    batch, backbone = len(values), model.backbone
    if labels is None or scale == 1:
        return backbone(values, backbone.class_embedding(labels, batch), mask, positions)
    classes = [backbone.class_embedding(choice, batch) for choice in (labels, None)]
    doubled = Mask(mask.masked.repeat(2, 1), mask.visible.repeat(2, 1))
    z = backbone(values.repeat(2, 1, 1), torch.cat(classes), doubled, positions.repeat(2, 1))
    cond, uncond = z.chunk(2)
    return uncond + scale * (cond - uncond)


def _check(model, labels, batch_size, num_iter, cfg_schedule, temperature) -> int:
    """The batch size. Raises ValueError, naming the value, on what cannot be sampled."""
    if num_iter < 1:
        raise ValueError(f"num_iter {num_iter} is not at least 1")
    if cfg_schedule not in CFG_SCHEDULES:
        raise ValueError(f"cfg_schedule {cfg_schedule!r} is not one of {CFG_SCHEDULES}")
    if temperature < 0:
        raise ValueError(f"temperature {temperature} is negative")
    if labels is None:
        if batch_size is None:
            raise ValueError("labels=None needs batch_size, the number of images")
        return batch_size
    class_num = model.config.class_num
    if bool(((labels < 0) | (labels >= class_num)).any()):
        raise ValueError(f"labels {labels.tolist()} are not all in [0, {class_num})")
    return len(labels)


@contextmanager
def evaluation_mode(model: torch.nn.Module) -> Iterator[None]:
    """Switch dropout off for a while."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
