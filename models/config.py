"""Configuration of a TokenBridge model: sizes, presets, and all published constants.

Source: arXiv 2503.16430 and the released checkpoints.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields

# Multiplying KL-16's posterior samples by this brings them to about unit standard deviation.
PUBLISHED_LATENT_SCALE = 0.2325
# KL-16's channels by their share of low-frequency energy, largest first.
PUBLISHED_CHANNEL_ORDER = (8, 1, 10, 9, 6, 12, 4, 0, 3, 11, 7, 14, 2, 15, 13, 5)

# What the head reads at its first position when it samples: see `ChannelHead.sample`.
HEAD_INPUTS = ("trained", "published")
# The published codebook, or one for each channel, fitted to the latents: see models/quantizer.py.
QUANTIZERS = ("published", "calibrated")

# width and depth of encoder and decoder, heads; width, depth and heads of the channel head
_SIZES = {
    "tokenbridge_tiny": (128, 2, 4, 64, 2, 4),
    "tokenbridge_base": (768, 12, 12, 768, 4, 8),
    "tokenbridge_large": (1024, 16, 16, 1024, 4, 8),
    "tokenbridge_huge": (1280, 20, 16, 1024, 6, 8),
}
PRESETS = tuple(_SIZES)


@dataclass(frozen=True)
class TokenBridgeConfig:
    """All that decides a model's shape and its use; saved in every checkpoint.

    img_size in pixels, vae_stride in pixels per latent position, patch_size in latent positions.
    channel_order: in which the head predicts the channels, None is `default_channel_order`.
    quant_min, quant_max: of the published quantizer.
    Raises ValueError, naming the value, if the numbers do not fit together.
    """

    img_size: int = 256
    vae_stride: int = 16
    patch_size: int = 1
    encoder_embed_dim: int = 1024
    encoder_depth: int = 16
    encoder_num_heads: int = 16
    decoder_embed_dim: int = 1024
    decoder_depth: int = 16
    decoder_num_heads: int = 16
    channel_embed_dim: int = 1024
    channel_depth: int = 4
    channel_heads: int = 8
    mlp_ratio: float = 4.0
    quant_levels: int = 64
    vae_embed_dim: int = 16
    class_num: int = 1000
    attn_dropout: float = 0.1
    proj_dropout: float = 0.1
    buffer_size: int = 64
    quant_min: float = -5.0
    quant_max: float = 5.0
    label_drop_prob: float = 0.1
    mask_ratio_min: float = 0.7
    channel_order: tuple[int, ...] | None = None
    latent_scale: float = PUBLISHED_LATENT_SCALE
    head_input: str = "trained"
    quantizer: str = "published"

    def __post_init__(self):
        order = self.channel_order
        order = default_channel_order(self.vae_embed_dim) if order is None else tuple(order)
        object.__setattr__(self, "channel_order", order)
        for problem in self._problems():
            raise ValueError(problem)

    def _problems(self) -> Iterator[str]:
        token_pixels = self.vae_stride * self.patch_size
        if token_pixels <= 0 or self.img_size <= 0 or self.img_size % token_pixels:
            product = f"vae_stride {self.vae_stride} x patch_size {self.patch_size}"
            yield f"img_size {self.img_size} is not a multiple of {product}"
        for part in ("encoder", "decoder", "channel"):
            width = getattr(self, f"{part}_embed_dim")
            heads = getattr(self, f"{part}_num_heads", self.channel_heads)
            if heads <= 0 or width % heads:
                yield f"{part}_embed_dim {width} is not a multiple of its {heads} heads"
        if not self.quant_min < self.quant_max:
            yield f"quant_min {self.quant_min} is not below quant_max {self.quant_max}"
        for name in ("attn_dropout", "proj_dropout", "label_drop_prob", "mask_ratio_min"):
            if not 0 <= getattr(self, name) <= 1:
                yield f"{name} {getattr(self, name)} is not between 0 and 1"
        for name in ("class_num", "vae_embed_dim", "buffer_size", "latent_scale"):
            if not getattr(self, name) > 0:
                yield f"{name} {getattr(self, name)} is not positive"
        if sorted(self.channel_order) != list(range(self.vae_embed_dim)):
            permuted = f"a permutation of the {self.vae_embed_dim} latent channels (vae_embed_dim)"
            yield f"channel_order {self.channel_order} is not {permuted}"
        for name, known in (("head_input", HEAD_INPUTS), ("quantizer", QUANTIZERS)):
            if getattr(self, name) not in known:
                yield f"{name} {getattr(self, name)!r} is not one of {known}"

    @property
    def grid_size(self) -> int:
        """Token positions along one side."""
        return self.img_size // (self.vae_stride * self.patch_size)

    @property
    def seq_len(self) -> int:
        """L, the token positions of an image."""
        return self.grid_size**2

    @property
    def token_dim(self) -> int:
        """C * p * p, the latent scalars of one token."""
        return self.vae_embed_dim * self.patch_size**2

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of an image's latents."""
        side = self.img_size // self.vae_stride
        return self.vae_embed_dim, side, side

    def to_dict(self) -> dict:
        """Plain values, as a checkpoint or a JSON file holds them."""
        return asdict(self) | {"channel_order": list(self.channel_order)}

    @classmethod
    def from_dict(cls, values: dict) -> "TokenBridgeConfig":
        """The inverse of `to_dict`. Raises ValueError on names it does not know."""
        unknown = sorted(set(values) - {field.name for field in fields(cls)})
        if unknown:
            raise ValueError(f"unknown model settings {unknown}")
        return cls(**values)


def default_channel_order(channels: int) -> tuple[int, ...]:
    """KL-16's published order for its channel count, the natural order for any other."""
    published = PUBLISHED_CHANNEL_ORDER
    return published if channels == len(published) else tuple(range(channels))


def preset(name: str) -> dict:
    """Keyword arguments of one of the `PRESETS`."""
    sizes = ("embed_dim", "depth", "num_heads")
    names = [f"{part}_{size}" for part in ("encoder", "decoder") for size in sizes]
    names += ["channel_embed_dim", "channel_depth", "channel_heads"]
    return dict(zip(names, _SIZES[name][:3] + _SIZES[name], strict=True))
