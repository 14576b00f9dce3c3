"""Images <-> scaled latents: the frozen VAE and the scale that brings latents to unit variance.

The only place that multiplies or divides by the latent scale.
Letters: B batch, C latent channels, h, w latent positions.
"""

import torch
from torch import Tensor, nn

from models.tokenizers.kl16 import VAE, Posterior


def from_uint8(images: Tensor) -> Tensor:
    """Bytes -> float32 in [-1, 1], byte / 255 * 2 - 1 to the bit on every device."""
    # By a tensor: a plain number CUDA would invert and multiply with, which rounds differently.
    whole = torch.full((), 255.0, device=images.device)
    return images.float().div_(whole).mul_(2).sub_(1)


class Tokenizer(nn.Module):
    """vae: None if no image is read or decoded. latent_scale: 1 / std of its latents."""

    def __init__(self, vae: VAE | None, latent_scale: float):
        super().__init__()
        self.vae = vae.eval().requires_grad_(False) if vae is not None else None
        self.latent_scale = latent_scale

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
        return posterior.sample(generator) * self.latent_scale

    def mode(self, posterior: Posterior) -> Tensor:
        """The scaled posterior mean, [B, C, h, w]."""
        return posterior.mean * self.latent_scale

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
        with torch.autocast(latents.device.type, enabled=False):
            return self.vae.decode(latents.float() / self.latent_scale).clamp(-1.0, 1.0)
