"""Images <-> scaled latents: the frozen VAE and the scale that brings latents to unit variance.

The only place that multiplies or divides by the latent scale.
Letters: B batch, C latent channels, h, w latent positions.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from models.tokenizers.kl16 import VAE, Posterior

DECODE_BATCH = 32


def from_uint8(images: Tensor) -> Tensor:
    """Bytes -> float32 in [-1, 1], byte / 255 * 2 - 1 to the bit on every device."""
    # By a tensor: a plain number CUDA would invert and multiply with, which rounds differently.
    whole = torch.full((), 255.0, device=images.device)
    return images.float().div_(whole).mul_(2).sub_(1)


def to_uint8(images: Tensor) -> Tensor:
    """[..., H, W] floats in [-1, 1] -> uint8, rounded and clipped: the bytes of the saved PNG."""
    return (images * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)


class Tokenizer(nn.Module):
    """vae: None if no image is read or decoded. latent_scale: 1 / std of its latents.

    mean, std: of each channel, by which latents are normalised in the place of latent_scale.
    decode_dtype: of the autocast in which it decodes; None is full precision, as in encoding.
    """

    mean: Tensor | None
    std: Tensor | None
    decode_dtype: torch.dtype | None = None

    def __init__(
        self,
        vae: VAE | None,
        latent_scale: float,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ):
        super().__init__()
        self.vae = vae.eval().requires_grad_(False) if vae is not None else None
        self.latent_scale = latent_scale
        for name, values in (("mean", mean), ("std", std)):  # [C, 1, 1]
            column = None if values is None else torch.tensor(values)[:, None, None]
            self.register_buffer(name, column, persistent=False)

    def scaled(self, latents: Tensor) -> Tensor:
        """[..., C, h, w] of the VAE -> as the model reads them."""
        if self.mean is None:
            return latents * self.latent_scale
        return (latents - self.mean) / self.std

    def unscaled(self, latents: Tensor) -> Tensor:
        """The inverse of `scaled`."""
        if self.mean is None:
            return latents / self.latent_scale
        return latents * self.std + self.mean

    def train(self, mode: bool = True) -> "Tokenizer":
        """Frozen: always in evaluation mode."""
        return super().train(False)

    @torch.no_grad()
    def posterior(self, images: Tensor) -> Posterior:
        """images: [B, 3, H, W], floats in [-1, 1] or bytes; computed in full precision."""
        assert self.vae is not None, "this tokenizer was built without a VAE"
        images = from_uint8(images) if images.dtype == torch.uint8 else images.float()
        with torch.autocast(images.device.type, enabled=False):
            return self.vae.encode(images)

    def sample(self, posterior: Posterior, generator: torch.Generator | None = None) -> Tensor:
        """A scaled posterior sample, [B, C, h, w]: what the model is trained on."""
        return self.scaled(posterior.sample(generator))

    def mode(self, posterior: Posterior) -> Tensor:
        """The scaled posterior mean, [B, C, h, w]."""
        return self.scaled(posterior.mean)

    def encode(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """images: [B, 3, H, W], floats in [-1, 1] or bytes -> scaled latents [B, C, h, w]."""
        return self.sample(self.posterior(images), generator)

    def from_moments(self, moments: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """moments: cached posteriors [B, 2C, h, w] -> scaled latents [B, C, h, w]."""
        return self.sample(Posterior(moments.float()), generator)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """latents: [B, C, h, w], scaled -> images [B, 3, H, W], clamped to [-1, 1]."""
        assert self.vae is not None, "this tokenizer was built without a VAE"
        lower = self.decode_dtype
        with torch.autocast(latents.device.type, dtype=lower, enabled=lower is not None):
            return self.vae.decode(self.unscaled(latents.float())).float().clamp(-1.0, 1.0)


def decode_images(tokenizer: Tokenizer, latents: Tensor) -> Tensor:
    """latents: [B, C, h, w], scaled, on any device -> uint8 [B, 3, H, W] on the CPU."""
    device = next(tokenizer.parameters()).device
    # The decoder's first-level maps of 256 images at 256 px would fill a GPU on their own.
    parts = latents.to(device).split(DECODE_BATCH)
    return torch.cat([to_uint8(tokenizer.decode(part)).cpu() for part in parts])
