"""Latent maps <-> token sequences: row-major tokens, channel-major inside a token.

Letters: B batch, C latent channels, p patch size, L = (H / p) * (W / p) tokens.
"""

from torch import Tensor


def patchify(latents: Tensor, patch_size: int) -> Tensor:
    """[B, C, H, W] -> [B, L, C*p*p]."""
    b, c, h, w = latents.shape
    p = patch_size
    x = latents.reshape(b, c, h // p, p, w // p, p)
    x = x.permute(0, 2, 4, 1, 3, 5)  # [B, H/p, W/p, C, p, p]
    return x.reshape(b, (h // p) * (w // p), c * p * p)


def unpatchify(tokens: Tensor, patch_size: int, grid_size: int) -> Tensor:
    """[B, L, C*p*p] with L = grid_size^2 -> [B, C, H, W]."""
    b, _, d = tokens.shape
    p, g = patch_size, grid_size
    x = tokens.reshape(b, g, g, d // (p * p), p, p)
    x = x.permute(0, 3, 1, 4, 2, 5)  # [B, C, H/p, p, W/p, p]
    return x.reshape(b, d // (p * p), g * p, g * p)
