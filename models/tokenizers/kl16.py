"""KL-regularised convolutional autoencoder of latent diffusion (KL-16 by default).

Images in [-1, 1] -> diagonal Gaussian posterior over unscaled latents -> images. Tensor names are
those of the published `kl16.ckpt`.
Letters: B batch, C latent channels, S stride, h = H / S.
Source: Rombach et al., arXiv 2112.10752; Li et al. (MAR), arXiv 2406.11838.
"""

import re
from collections import OrderedDict
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.config import TokenBridgeConfig

# The published VAE: 66,456,019 parameters, stride 16.
KL16 = {"embed_dim": 16, "ch_mult": (1, 1, 2, 2, 4), "ch": 128, "num_res_blocks": 2}
GROUPS = 32
LOGVAR_RANGE = (-30.0, 20.0)


class Posterior:
    """Diagonal Gaussian over latents. `parameters` [B, 2C, h, w]: mean, then log-variance."""

    def __init__(self, parameters: Tensor):
        self.parameters = parameters
        self.mean, logvar = parameters.chunk(2, dim=1)
        self.logvar = logvar.clamp(*LOGVAR_RANGE)

    @property
    def std(self) -> Tensor:
        return torch.exp(0.5 * self.logvar)

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        like = {"device": self.mean.device, "dtype": self.mean.dtype}
        return self.mean + self.std * torch.randn(self.mean.shape, generator=generator, **like)

    def kl(self) -> Tensor:
        """KL divergence from N(0, I) in nats, summed over each image: [B]."""
        terms = self.mean.square() + self.logvar.exp() - 1.0 - self.logvar
        return 0.5 * terms.sum(dim=(1, 2, 3))


class VAE(nn.Module):
    """All that the rest of the program knows of an autoencoder, whatever network it is.

    config: its settings. channels: C. stride: S, pixels per latent position along one side.
    is_kl16: whether the published constants of `models.config` hold for it. codebook: [K, C], of
    a VQ tokenizer, whose latents are its entries. normalised: whether models read its latents
    normalised by mean and std of each channel's posterior means. img_size: the only one, if so.
    """

    is_kl16, normalised = False, False
    img_size: int | None = None
    codebook: Tensor | None = None

    def __init__(self, config: dict, channels: int, stride: int):
        super().__init__()
        self.config, self.channels, self.stride = config, channels, stride

    def encode(self, images: Tensor) -> Posterior:
        """images: [B, 3, H, W] in [-1, 1], sides multiples of the stride -> posterior [B, C, h, w].

        Raises ValueError on other sizes.
        """
        sides = tuple(images.shape[-2:])
        if any(side % self.stride for side in sides):
            raise ValueError(f"image sides {sides} are not multiples of stride {self.stride}")
        return Posterior(self.moments(images))

    @staticmethod
    def settings_of(state: dict[str, Tensor]) -> dict:
        """The settings, from the names and shapes of tensors. Raises ValueError where they lack."""
        raise NotImplementedError

    def moments(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] in [-1, 1] -> [B, 2C, h, w], mean and log-variance."""
        raise NotImplementedError

    def decode(self, latents: Tensor) -> Tensor:
        """[B, C, h, w], unscaled -> images [B, 3, H, W], about [-1, 1], not clamped."""
        raise NotImplementedError

    def check_fits(self, config: TokenBridgeConfig) -> None:
        """Raise ValueError unless its latents are of the model's kind and shape."""
        codes = None if self.codebook is None else len(self.codebook)
        own = self.channels, self.stride, codes
        models = config.vae_embed_dim, config.vae_stride, config.codebook_size
        if own != models:
            raise ValueError(f"channels, stride, codes of the VAE: {own}, of the model: {models}")
        if self.img_size not in (None, config.img_size):
            raise ValueError(f"the VAE takes images of {self.img_size} px alone")

    def load_published(self, state: dict[str, Tensor]) -> None:
        """Load tensors by their published names; all must match. Raises ValueError."""
        check_layout(state, self.state_dict())
        self.load_state_dict(state)


group_norm = partial(nn.GroupNorm, GROUPS, eps=1e-6)
conv1x1 = partial(nn.Conv2d, kernel_size=1)
conv3x3 = partial(nn.Conv2d, kernel_size=3, padding=1)


def silu(x: Tensor) -> Tensor:
    """Of a tensor that nobody else holds: without gradients it is overwritten."""
    return F.silu(x, inplace=not torch.is_grad_enabled())


def fastest_layout(x: Tensor) -> Tensor:
    """x: [B, C, H, W], in the memory format in which convolutions run fastest on its device.

    A CPU's backward pass of group norms in bf16 takes 2.5 times as long in it; MPS: not measured.
    """
    known = x.device.type == "cuda" or (x.device.type == "cpu" and not torch.is_grad_enabled())
    return x.contiguous(memory_format=torch.channels_last) if known else x


class ResBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), with a 1x1 shortcut where the width changes."""

    def __init__(self, channels_in: int, channels_out: int):
        super().__init__()
        self.norm1 = group_norm(channels_in)
        self.conv1 = conv3x3(channels_in, channels_out)
        self.norm2 = group_norm(channels_out)
        self.conv2 = conv3x3(channels_out, channels_out)
        self.nin_shortcut = nn.Identity()
        if channels_in != channels_out:
            self.nin_shortcut = conv1x1(channels_in, channels_out)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(silu(self.norm1(x)))
        h = self.conv2(silu(self.norm2(h)))
        x = self.nin_shortcut(x)
        return x + h if torch.is_grad_enabled() else h.add_(x)


class AttnBlock(nn.Module):
    """Single-head self-attention over all h*w positions, scale channels^-0.5."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = group_norm(channels)
        self.q, self.k, self.v = (conv1x1(channels, channels) for _ in range(3))
        self.proj_out = conv1x1(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (f(h).flatten(2).transpose(1, 2) for f in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
        return x + self.proj_out(h.transpose(1, 2).reshape(x.shape))


def downsample(channels: int) -> nn.Module:
    """Zero-pad right and bottom by one, then 3x3 with stride 2."""
    conv = nn.Conv2d(channels, channels, kernel_size=3, stride=2)
    return nn.Sequential(OrderedDict(pad=nn.ZeroPad2d((0, 1, 0, 1)), conv=conv))


def upsample(channels: int) -> nn.Module:
    """Nearest x2, then 3x3."""
    nearest = nn.Upsample(scale_factor=2.0, mode="nearest")
    return nn.Sequential(OrderedDict(nearest=nearest, conv=conv3x3(channels, channels)))


def middle(channels: int) -> nn.Module:
    first, attention = ResBlock(channels, channels), AttnBlock(channels)
    last = ResBlock(channels, channels)
    return nn.Sequential(OrderedDict(block_1=first, attn_1=attention, block_2=last))


class Level(nn.Module):
    """The residual blocks of one resolution, attention after each, then a change of resolution.

    name: under which the published file has the blocks.
    """

    def __init__(self, channels_in: int, channels: int, blocks: int, attends: bool, name: str):
        super().__init__()
        widths, self.name = [channels_in] + [channels] * (blocks - 1), name
        setattr(self, name, nn.ModuleList(ResBlock(width, channels) for width in widths))
        self.attn = nn.ModuleList(AttnBlock(channels) for _ in widths if attends)
        self.downsample = self.upsample = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(getattr(self, self.name)):
            x = block(x)
            x = self.attn[i](x) if self.attn else x
        return self.upsample(self.downsample(x))


def encoder(widths: list[int], blocks: int, out: int, attends: tuple, name: str) -> nn.Module:
    """Images [B, 3, H, W] -> [B, out, h, w]. widths: of the first convolution and of each level.
    attends: the levels that do. name: see `Level`. Raises ValueError on a width of no whole groups.
    """
    if widths[0] <= 0 or widths[0] % GROUPS:
        raise ValueError(f"ch {widths[0]} is not a multiple of {GROUPS}, the group norms' groups")
    conv_in, down = conv3x3(3, widths[0]), nn.Sequential()
    for i, (before, width) in enumerate(pairwise(widths)):
        level = Level(before, width, blocks, i in attends, name)
        if i + 2 < len(widths):
            level.downsample = downsample(width)
        down.append(level)
    return network(conv_in, {"down": down, "mid": middle(width)}, conv3x3(width, out))


def decoder(widths: list[int], blocks: int, channels: int, attends: tuple, name: str) -> nn.Module:
    """[B, channels, h, w] -> images [B, 3, H, W]."""
    conv_in, mid, up = conv3x3(channels, widths[-1]), middle(widths[-1]), FromLast()
    for i, width in reversed(list(enumerate(widths))):
        before = widths[min(i + 1, len(widths) - 1)]
        level = Level(before, width, blocks, i in attends, name)
        if i > 0:
            level.upsample = upsample(width)
        up.insert(0, level)  # the published names count from the finest level
    return network(conv_in, {"mid": mid, "up": up}, conv3x3(widths[0], 3))


class FromLast(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        for part in reversed(self):
            x = part(x)
        return x


def network(conv_in: nn.Module, inner: dict[str, nn.Module], conv_out: nn.Module) -> nn.Module:
    norm = group_norm(conv_out.in_channels)
    outer = {"norm_out": norm, "silu": nn.SiLU(), "conv_out": conv_out}
    return nn.Sequential(OrderedDict({"conv_in": conv_in} | inner | outer))


class AutoencoderKL(VAE):
    """The VAE. The defaults are KL-16.

    embed_dim: C, latent channels. ch: width of the finest level, a multiple of 32.
    ch_mult: width multiplier of each level, finest first; the stride is 2^(levels - 1).
    num_res_blocks: residual blocks a level in the encoder; the decoder has one more.
    variant: encoder_attention and decoder_attention, the levels that attend, in KL-16 the encoder's
    coarsest alone; quant_conv, whether there are 1x1 convolutions around the latents, which the
    VAEs of Flux and SD 3 have not. Raises ValueError if ch does not fit the group norms.
    """

    def __init__(
        self,
        embed_dim: int = KL16["embed_dim"],
        ch_mult: tuple[int, ...] = KL16["ch_mult"],
        ch: int = KL16["ch"],
        num_res_blocks: int = KL16["num_res_blocks"],
        **variant,
    ):
        coarsest = len(ch_mult) - 1
        usual = {"encoder_attention": (coarsest,), "decoder_attention": (), "quant_conv": True}
        if unknown := set(variant) - set(usual):
            raise ValueError(f"unknown VAE settings {sorted(unknown)}")
        config = dict(zip(KL16, (embed_dim, tuple(ch_mult), ch, num_res_blocks), strict=True))
        config |= {name: value for name, value in variant.items() if value != usual[name]}
        super().__init__(config, channels=embed_dim, stride=2**coarsest)
        attends_in, attends_out, quant_conv = (usual | variant).values()
        widths = [ch * mult for mult in ch_mult]
        self.encoder = encoder([ch, *widths], num_res_blocks, 2 * embed_dim, attends_in, "block")
        self.decoder = decoder(widths, num_res_blocks + 1, embed_dim, attends_out, "block")
        self.quant_conv, self.post_quant_conv = nn.Identity(), nn.Identity()
        if quant_conv:
            self.quant_conv = conv1x1(2 * embed_dim, 2 * embed_dim)
            self.post_quant_conv = conv1x1(embed_dim, embed_dim)

    @staticmethod
    def settings_of(state: dict[str, Tensor]) -> dict:
        return sizes_of(state, "down", "block") | {
            "embed_dim": shape_of(state, "decoder.conv_in.weight")[1],
            "encoder_attention": numbers(state, r"encoder\.down\.(\d+)\.attn\."),
            "decoder_attention": numbers(state, r"decoder\.up\.(\d+)\.attn\."),
            "quant_conv": "quant_conv.weight" in state,
        }

    @property
    def is_kl16(self) -> bool:
        return self.config == KL16

    def moments(self, images: Tensor) -> Tensor:
        return self.quant_conv(self.encoder(fastest_layout(images))).contiguous()

    def decode(self, latents: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(fastest_layout(latents))).contiguous()


def shape_of(state: dict[str, Tensor], name: str) -> torch.Size:
    """Raises ValueError without that tensor."""
    if name not in state:
        raise ValueError(f"it has no tensor {name}")
    return state[name].shape


def numbers(state: dict[str, Tensor], pattern: str) -> tuple[int, ...]:
    """Those in the names of tensors that begin so, ascending."""
    matches = (re.match(pattern, name) for name in state)
    return tuple(sorted({int(match[1]) for match in matches if match}))


def sizes_of(state: dict[str, Tensor], level: str, block: str) -> dict:
    """ch, ch_mult and num_res_blocks, from the encoder's tensors. level, block: their names in it.

    Raises ValueError without a tensor that tells them.
    """
    levels = numbers(state, rf"encoder\.{level}\.(\d+)\.{block}\.") or (0,)
    names = ["encoder.conv_in.weight"]
    names += [f"encoder.{level}.{i}.{block}.0.conv2.weight" for i in levels]
    ch, *widths = (shape_of(state, name)[0] for name in names)
    return {
        "ch_mult": tuple(width // max(ch, 1) for width in widths),
        "ch": ch,
        "num_res_blocks": len(numbers(state, rf"encoder\.{level}\.0\.{block}\.(\d+)\.")),
    }


def check_layout(state: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Raise ValueError naming the tensors that are missing, unexpected or of another shape."""
    shapes = {name: tuple(tensor.shape) for name, tensor in expected.items()}
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    both = [name for name in shapes if name in found and found[name] != shapes[name]]
    problems = {
        "missing": sorted(set(shapes) - set(found)),
        "unexpected": sorted(set(found) - set(shapes)),
        "of another shape": [f"{name} is {found[name]}, not {shapes[name]}" for name in both],
    }
    parts = [f"{len(ns)} {kind} (first: {ns[0]})" for kind, ns in problems.items() if ns]
    if parts:
        raise ValueError("tensors do not match: " + "; ".join(parts))
