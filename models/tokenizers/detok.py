"""l-DeTok: a transformer whose latents a generator finds easy, trained to undo noise in them.

image -> patches -> blocks -> posterior of each patch; latent -> blocks -> pixels of the patch
An image is of the size that the positional embeddings were trained for. Tensor names are those of
the published files, which hold no statistics of the latents.
Letters: B images, L = h w patches, D width, N heads, d = D / N, C latent channels.
Source: arXiv 2507.15856; rotary angles for two axes: arXiv 2403.13298.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.layers import learned
from models.tokenizers.kl16 import VAE, numbers, shape_of

HEAD = 64  # width of a head in the published sizes
LOWEST, HIGHEST = 7e-4, 7.0  # rotary frequencies, in turns over the image
ANCHOR = "encoder.latent_head.weight"  # by which its files are known


def rotary_angles(width: int, side: int) -> Tensor:
    """Of each patch, row by row, and each entry of a head: [L, d]."""
    falling = (HIGHEST / LOWEST) ** torch.linspace(0, -1, width // 4)
    turns = HIGHEST * torch.cat([falling, falling])  # [d / 2]
    place = torch.linspace(0, 1, side)
    row, column = torch.meshgrid(place, place, indexing="ij")
    both = [2 * math.pi * axis.flatten()[:, None] * turns for axis in (row, column)]
    return torch.cat(both, dim=1)


def rotated(x: Tensor, angles: Tensor) -> Tensor:
    """x: [B, N, L, d]; neighbours (a, b) become (a cos - b sin, b cos + a sin)."""
    turned = torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)
    return x * angles.cos() + turned * angles.sin()


class Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor, angles: Tensor) -> Tensor:
        """x: [B, L, D] -> [B, L, D]."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(rotated(q, angles), rotated(k, angles), v)
        return self.proj(x.transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        hidden = int(2 / 3 * 4 * width)
        self.w12, self.w3 = nn.Linear(width, 2 * hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        gate, x = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * x)


class Block(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(width, eps=1e-6), nn.RMSNorm(width, eps=1e-6)
        self.attn, self.mlp = Attention(width, heads), SwiGLU(width)

    def forward(self, x: Tensor, angles: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x), angles)
        return x + self.mlp(self.norm2(x))


class Transformer(nn.Module):
    """What encoder and decoder share: [B, L, D] -> [B, L, D]."""

    angles: Tensor

    def __init__(self, width: int, depth: int, heads: int, side: int):
        super().__init__()
        self.positional_embedding = learned(1, side * side, width)
        self.ln_pre, self.ln_post = nn.RMSNorm(width, eps=1e-6), nn.RMSNorm(width, eps=1e-6)
        self.transformer = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.register_buffer("angles", rotary_angles(width // heads, side), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.ln_pre(x + self.positional_embedding)
        for block in self.transformer:
            x = block(x, self.angles)
        return self.ln_post(x)


class Encoder(Transformer):
    def __init__(self, channels: int, patch: int, *sizes: int):
        super().__init__(*sizes)
        self.patch_embed = nn.Sequential(nn.Conv2d(3, sizes[0], patch, stride=patch))
        self.latent_head = nn.Linear(sizes[0], 2 * channels)

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] -> mean and log-variance [B, L, 2C]."""
        return self.latent_head(super().forward(self.patch_embed(images).flatten(2).mT))


class Decoder(Transformer):
    def __init__(self, channels: int, patch: int, *sizes: int):
        super().__init__(*sizes)
        self.patch = patch
        self.mask_token = learned(1, 1, sizes[0])  # of its training alone
        self.decoder_embed = nn.Linear(channels, sizes[0])
        self.ffn = nn.Sequential(nn.Identity(), nn.Conv2d(sizes[0], 3 * patch * patch, 1))
        self.conv_out = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, latents: Tensor) -> Tensor:
        """[B, C, h, w] -> [B, 3, H, W]."""
        grid = latents.shape[2:]
        x = super().forward(self.decoder_embed(latents.flatten(2).mT))
        x = self.ffn(x.mT.unflatten(2, grid))  # [B, p p 3, h, w]
        x = x.unflatten(1, (self.patch, self.patch, 3)).permute(0, 3, 4, 1, 5, 2)
        return self.conv_out(x.flatten(4, 5).flatten(2, 3))


class DeTok(VAE):
    """img_size, patch_size: in pixels. encoder, decoder: width, depth and heads of each."""

    normalised = True

    def __init__(
        self,
        img_size: int = 256,
        patch_size: int = 16,
        embed_dim: int = 16,
        encoder: tuple[int, int, int] = (768, 12, 12),
        decoder: tuple[int, int, int] = (768, 12, 12),
    ):
        side, sizes = img_size // patch_size, {"encoder": encoder, "decoder": decoder}
        sizes = {name: tuple(size) for name, size in sizes.items()}
        config = {"img_size": img_size, "patch_size": patch_size, "embed_dim": embed_dim}
        super().__init__(config | sizes, embed_dim, patch_size)
        self.img_size = img_size
        self.encoder = Encoder(embed_dim, patch_size, *sizes["encoder"], side)
        self.decoder = Decoder(embed_dim, patch_size, *sizes["decoder"], side)

    @staticmethod
    def settings_of(state: dict[str, Tensor]) -> dict:
        """If its heads are as wide as the published ones."""
        patch = shape_of(state, "encoder.patch_embed.0.weight")[-1]
        channels, sizes = shape_of(state, "decoder.decoder_embed.weight")[1], {}
        for part in ("encoder", "decoder"):
            depth = len(numbers(state, rf"{part}\.transformer\.(\d+)\."))
            length, width = shape_of(state, f"{part}.positional_embedding")[1:]
            sizes[part] = (width, depth, max(width // HEAD, 1))
        img_size = math.isqrt(length) * patch
        return {"img_size": img_size, "patch_size": patch, "embed_dim": channels, **sizes}

    def moments(self, images: Tensor) -> Tensor:
        size = self.img_size
        if images.shape[-2:] != (size, size):
            found = " x ".join(map(str, images.shape[-2:]))
            raise ValueError(f"images of {found}, but this tokenizer is of {size} x {size} alone")
        grid = (size // self.stride,) * 2
        return self.encoder(images).mT.unflatten(2, grid)

    def decode(self, latents: Tensor) -> Tensor:
        return self.decoder(latents)
