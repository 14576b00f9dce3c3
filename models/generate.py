"""Images from a model and a VAE: labels -> latents -> uint8 pixels, in batches.

Letters: B images, H, W pixels.
"""

from collections.abc import Sequence
from dataclasses import asdict

import numpy as np
import torch
from torch import Tensor

from models.precision import Precision
from models.sampler import SamplingOptions, sample_latents
from models.tokenbridge import TokenBridge
from models.tokenizers.kl16 import VAE
from models.tokenizers.tokenizer import Tokenizer, decode_images


@torch.no_grad()
def generate(
    model: TokenBridge,
    vae: VAE | Tokenizer,
    labels: Sequence[int | str] | Tensor,
    *,
    image_ids: Sequence[int] | None = None,
    batch_size: int = 64,
    precision: str = "auto",
    **options,
) -> np.ndarray:
    """One image for each label.

    vae: the one of the training; a VAE, whose latents are scaled by the model's latent_scale, or a
    Tokenizer, which has its own; it is frozen. labels: B classes, by number or by name.
    options: num_iter, cfg, cfg_schedule, temperature, order, seed, ... of `SamplingOptions`; known
    and known_mask of `sample_latents`, of one image for all.
    image_ids: image i is made of the noise of (seed, image_ids[i]), default i, so it is the
    same in any batch, but for rounding. batch_size: images at once.
    precision: one of `PRECISIONS`, of the model; the VAE decodes in fp32.
    Returns uint8 [B, H, W, 3] on the CPU, as PIL.Image.fromarray and matplotlib take them.
    Raises ValueError on values out of range, or a VAE that does not fit the model.
    """
    labels = _labels(labels, model.origin.classes or ())
    ids = range(len(labels)) if image_ids is None else image_ids
    if len(ids) != len(labels) or batch_size < 1:
        raise ValueError(f"{len(ids)} image_ids, {len(labels)} labels, batch_size {batch_size}")
    device = model.backbone.fake_latent.device
    chosen = Precision.of(precision, device)
    given = {name: options.pop(name, None) for name in ("known", "known_mask")}
    given = {name: tensor for name, tensor in given.items() if tensor is not None}
    if any(len(tensor) != 1 for tensor in given.values()):
        raise ValueError("known and known_mask are not of one image")
    tokenizer, sampling = _tokenizer(vae, model), asdict(SamplingOptions(**options))
    images = []
    for start in range(0, len(labels), batch_size):
        batch = slice(start, start + batch_size)
        with chosen.autocast(device):
            same = {k: x.expand(len(labels[batch]), *x.shape[1:]) for k, x in given.items()}
            latents = sample_latents(model, labels[batch], image_ids=ids[batch], **same, **sampling)
        images.append(decode_images(tokenizer, latents))
    return torch.cat(images).permute(0, 2, 3, 1).contiguous().numpy()


def edit(
    model: TokenBridge,
    vae: VAE | Tokenizer,
    image: np.ndarray,
    mask: np.ndarray,
    labels: Sequence[int | str] | Tensor,
    **settings,
) -> np.ndarray:
    """The image as an image of each label, drawn anew where the mask is true.

    image: uint8 [S, S, 3] of the model's size, an array or PIL image. mask: bool [S, S]. settings:
    of `generate`. What is not drawn anew comes back as VAE and quantizer have it.
    Returns uint8 [B, S, S, 3]. Raises ValueError on values out of range.
    """
    tokenizer = _tokenizer(vae, model)
    known = known_positions(model, tokenizer, image, mask)
    return generate(model, tokenizer, labels, **known, **settings)


def known_positions(
    model: TokenBridge, tokenizer: Tokenizer, image: np.ndarray, mask: np.ndarray
) -> dict[str, Tensor]:
    """What `sample_latents` takes as known, of one image; see `edit`.

    A position is drawn anew if one of its pixels is: the mask is rounded outwards.
    """
    config, pixels, mask = model.config, np.array(image), np.array(mask, bool)
    size, grid = config.img_size, config.grid_size
    if pixels.shape != (size, size, 3) or pixels.dtype != np.uint8 or mask.shape != (size, size):
        found = f"image of {pixels.shape} {pixels.dtype} and mask of {mask.shape}"
        raise ValueError(f"{found}: expected uint8 ({size}, {size}, 3) and ({size}, {size})")
    drawn = mask.reshape(grid, size // grid, grid, size // grid).any(axis=(1, 3))
    batch = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    posterior = tokenizer.posterior(batch.to(next(tokenizer.parameters()).device))
    return {"known": tokenizer.mode(posterior), "known_mask": torch.from_numpy(~drawn)[None]}


def _labels(labels: Sequence[int | str] | Tensor, names: tuple[str, ...]) -> Tensor:
    """[B] int64. Raises ValueError on what is no list of classes that were trained."""
    numbers = {name: number for number, name in enumerate(names)}
    known = np.array([numbers.get(x, x) if isinstance(x, str) else x for x in labels])
    if known.ndim != 1 or known.dtype.kind not in "iu":
        of_names = f", or of the names {str(names)[:200]}" if names else ""
        raise ValueError(f"labels {str(labels)[:80]} are no list of class numbers{of_names}")
    if names and known.max() >= len(names):
        raise ValueError(f"class {known.max()} was never trained, of {len(names)} classes")
    return torch.from_numpy(known).long()


def _tokenizer(vae: VAE | Tokenizer, model: TokenBridge) -> Tokenizer:
    """Raises ValueError unless the VAE's latents are of the model's shape."""
    tokenizer = vae if isinstance(vae, Tokenizer) else Tokenizer(vae, *model.config.latent_norm)
    if tokenizer.vae is None:
        raise ValueError("this tokenizer has no VAE, which would decode the latents")
    tokenizer.vae.check_fits(model.config)
    return tokenizer
