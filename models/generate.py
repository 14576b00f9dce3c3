"""Images from a model and a VAE: labels -> latents -> uint8 pixels, in batches.

generate: sample_latents -> VAE decode -> round and clip
Letters: B images, H, W pixels.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from models.precision import arithmetic
from models.sampler import SamplingOptions, sample_latents
from models.tokenbridge import TokenBridge
from models.tokenizers.kl16 import VAE
from models.tokenizers.tokenizer import Tokenizer

DECODE_BATCH = 32


def spread_labels(count: int, classes: Sequence[int]) -> Tensor:
    """[count] labels, class by class in that order; of no class two more than of another."""
    return torch.tensor(classes)[torch.arange(count) * len(classes) // count]


@torch.no_grad()
def generate(
    model: TokenBridge,
    vae: VAE | Tokenizer,
    labels: Sequence[int | str] | Tensor,
    *,
    num_iter: int = 64,
    cfg: float = 1.0,
    cfg_schedule: str = "linear",
    temperature: float = 1.0,
    order: str = "random",
    seed: int = 0,
    image_ids: Sequence[int] | None = None,
    batch_size: int = 64,
    precision: str = "auto",
    progress: bool = False,
    **options,
) -> np.ndarray:
    """One image for each label.

    vae: the one that the model was trained with; a VAE, whose latents are scaled by the model's
    latent_scale, or a Tokenizer, which has its own. labels: B classes, by number or by name.
    num_iter, cfg, cfg_schedule, temperature, order and options: see `SamplingOptions`.
    seed, image_ids: image i is made of the noise of (seed, image_ids[i]), default i, so it is the
    same in any batch, but for rounding. batch_size: images at once, of the memory's size only.
    precision: "auto", "bf16", "fp16" or "fp32" of the model; the VAE decodes in fp32.
    Model and VAE stay where they are, each on a device of its own if need be; a VAE is frozen.
    Returns uint8 [B, H, W, 3] on the CPU, as PIL.Image.fromarray and matplotlib take them.
    Raises ValueError on values out of range, or a VAE that does not fit the model.
    """
    labels = _labels(labels, model.origin.classes or ())
    ids = range(len(labels)) if image_ids is None else image_ids
    if len(ids) != len(labels) or batch_size < 1:
        raise ValueError(f"{len(ids)} image_ids, {len(labels)} labels, batch_size {batch_size}")
    device = model.backbone.fake_latent.device
    _, dtype = arithmetic(precision, device)
    tokenizer = _tokenizer(vae, model)
    sampling = SamplingOptions(num_iter, cfg, cfg_schedule, temperature, order, seed, **options)
    images = np.empty((len(labels), model.config.img_size, model.config.img_size, 3), np.uint8)
    starts = range(0, len(labels), batch_size)
    for start in tqdm(starts, desc="generating", disable=not progress):
        batch = slice(start, start + batch_size)
        with torch.autocast(device.type, dtype=dtype) if dtype else nullcontext():
            latents = sample_latents(model, labels[batch], image_ids=ids[batch], **asdict(sampling))
        images[batch] = decode_images(tokenizer, latents).permute(0, 2, 3, 1).numpy()
    return images


def decode_images(tokenizer: Tokenizer, latents: Tensor) -> Tensor:
    """latents: [B, C, h, w], scaled, on any device -> uint8 [B, 3, H, W] on the CPU."""
    device = next(tokenizer.parameters()).device
    # The decoder's first-level maps of 256 images at 256 px would fill a GPU on their own.
    parts = latents.to(device).split(DECODE_BATCH)
    return torch.cat([to_uint8(tokenizer.decode(part)).cpu() for part in parts])


def to_uint8(images: Tensor) -> Tensor:
    """[..., H, W] floats in [-1, 1] -> uint8, rounded and clipped: the bytes of the saved PNG."""
    return (images * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)


def _labels(labels: Sequence[int | str] | Tensor, names: tuple[str, ...]) -> Tensor:
    """[B] int64. Raises ValueError on what is no list of classes, and on classes never trained."""
    wanted = f"class numbers, or of the names {str(names)[:200]}" if names else "class numbers"
    problem = f"labels {str(labels)[:80]} are no list of {wanted}"
    try:
        if not isinstance(labels, Tensor):
            labels = [names.index(x) if isinstance(x, str) else x for x in labels]
        found = torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ValueError(problem) from error
    if found.dim() != 1 or len(found) == 0 or found.is_floating_point() or found.is_complex():
        raise ValueError(problem)
    if names and int(found.max()) >= len(names):
        raise ValueError(f"{problem}: class {int(found.max())} was never trained")
    return found.to(torch.int64)


def _tokenizer(vae: VAE | Tokenizer, model: TokenBridge) -> Tokenizer:
    """Raises ValueError unless the VAE's latents are of the model's shape."""
    tokenizer = vae if isinstance(vae, Tokenizer) else Tokenizer(vae, model.config.latent_scale)
    if tokenizer.vae is None:
        raise ValueError("this tokenizer has no VAE, which would decode the latents")
    found = (tokenizer.vae.channels, tokenizer.vae.stride)
    expected = (model.config.vae_embed_dim, model.config.vae_stride)
    if found != expected:
        raise ValueError(
            f"the VAE has {found[0]} channels and stride {found[1]}, the model was trained on "
            f"{expected[0]} and {expected[1]}"
        )
    return tokenizer
