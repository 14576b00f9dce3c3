"""Images from a model and a VAE: labels -> latents -> uint8 pixels, in batches.

Letters: B images, H, W pixels.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor

from models.sampler import SamplingOptions, sample_latents
from models.tokenbridge import TokenBridge
from models.tokenizers.kl16 import VAE
from models.tokenizers.tokenizer import Tokenizer

DECODE_BATCH = 32
PRECISIONS = ("auto", "bf16", "fp16", "fp32")


@dataclass(frozen=True)
class Precision:
    """The arithmetic of a model; its weights, an optimizer and an EMA are fp32 in all of them."""

    name: str
    dtype: torch.dtype | None  # of the autocast, None for full precision

    @classmethod
    def of(cls, name: str, device: torch.device) -> "Precision":
        """auto: bf16 where CUDA has it, else fp16; fp32 on a CPU or MPS. Raises ValueError."""
        if name == "auto":
            name = "fp32"
            if device.type == "cuda":
                name = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
        dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}
        if name not in dtypes:
            raise ValueError(f"precision {name!r} is not one of {', '.join(PRECISIONS)}")
        return cls(name, dtypes[name])

    @property
    def needs_scaler(self) -> bool:
        """fp16 gradients underflow unless the loss is scaled."""
        return self.dtype is torch.float16

    def autocast(self, device: torch.device):
        return torch.autocast(device.type, dtype=self.dtype) if self.dtype else nullcontext()


def spread_labels(count: int, classes: Sequence[int]) -> Tensor:
    """[count] labels, class by class in that order; of no class two more than of another."""
    return torch.tensor(classes)[torch.arange(count) * len(classes) // count]


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
