"""Configuration of a TokenBridge model: sizes, presets, and all published constants.

Source: arXiv 2503.16430 and the released checkpoints.
"""

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields

from models.masking import MASK_RATIO_MIN, MaskRatios

# Multiplying KL-16's posterior samples by this brings them to about unit standard deviation.
PUBLISHED_LATENT_SCALE = 0.2325
# KL-16's channels by their share of low-frequency energy, largest first.
PUBLISHED_CHANNEL_ORDER = (8, 1, 10, 9, 6, 12, 4, 0, 3, 11, 7, 14, 2, 15, 13, 5)

# What the head reads at its first position when it samples: see `ChannelHead.sample_rows`.
HEAD_INPUTS = ("trained", "published")
# The published codebook, or one for each channel, fitted to the latents: see models/quantizer.py.
QUANTIZERS = ("published", "calibrated")
HEADS = ("channel", "parallel", "masked", "mixture", "diffusion", "codebook")  # of models/heads/
# The quantizers of heads that do not take all of those; none: the head reads continuous latents.
HEAD_QUANTIZERS = {"mixture": (None,), "diffusion": (None,), "codebook": ("codebook",)}

# width and depth of encoder and decoder, heads; width, depth and heads of the channel head, or
# width and depth of the diffusion head
_SIZES = {
    "tokenbridge_tiny": (128, 2, 4, 64, 2, 4),
    "tokenbridge_small": (192, 3, 6, 64, 2, 4),
    "tokenbridge_base": (768, 12, 12, 768, 4, 8),
    "tokenbridge_large": (1024, 16, 16, 1024, 4, 8),
    "tokenbridge_huge": (1280, 20, 16, 1024, 6, 8),
    "mar_base": (768, 12, 12, 1024, 6),
    "mar_large": (1024, 16, 16, 1280, 8),
    "mar_huge": (1280, 20, 16, 1536, 12),
}
PRESETS = tuple(_SIZES)


def setting(
    default, help: str, choices: Iterable = (), head: str | None = None, free: bool = False
):
    """A field of the configuration that a flag of its name sets.

    head: whose setting it is; in a model with another head it is None. free: whether it may change
    from one use of the same weights to the next.
    """
    metadata = dict(default=default, help=help, choices=tuple(choices), head=head, free=free)
    return field(default=None if head else default, metadata=metadata)


@dataclass(frozen=True)
class TokenBridgeConfig:
    """All that decides a model's shape and its use; saved in every checkpoint.

    channel_order: in which the head predicts the channels, None is KL-16's published one for its
    count, the natural one for any other.
    quant_min, quant_max: of the published quantizer. quantizer: None is the head's: "published",
    "codebook", or none at all for a continuous head.
    latent_mean, latent_std: of each channel of the VAE's latents, which are then normalised by
    them, (z - mean) / std; None: they are multiplied by latent_scale.
    mask_distribution, mask_ratio_min: see `MaskRatios`; None is the distribution's published one.
    Raises ValueError, naming the value, if the numbers do not fit together.
    """

    img_size: int = setting(256, "pixels, of a side")
    vae_stride: int = setting(16, "pixels a latent position")
    patch_size: int = setting(1, "latent positions a token, along one side")
    encoder_embed_dim: int = 1024
    encoder_depth: int = 16
    encoder_num_heads: int = 16
    decoder_embed_dim: int = 1024
    decoder_depth: int = 16
    decoder_num_heads: int = 16
    channel_embed_dim: int = setting(1024, "width of the channel, parallel and masked heads")
    channel_depth: int = setting(4, "blocks of the channel head")
    channel_heads: int = 8
    mlp_ratio: float = 4.0
    quant_levels: int = 64
    vae_embed_dim: int = setting(16, "latent channels")
    class_num: int = setting(1000, "classes; else as many as data or checkpoint have")
    attn_dropout: float = setting(0.1, "on attention weights", free=True)
    proj_dropout: float = setting(0.1, "after projections", free=True)
    buffer_size: int = setting(64, "slots filled with the class")
    quant_min: float = setting(-5.0, "lowest scaled latent")
    quant_max: float = setting(5.0, "highest scaled latent")
    label_drop_prob: float = setting(0.1, "share of labels dropped in training", free=True)
    mask_distribution: str = setting("normal", "of training's masks", MASK_RATIO_MIN, free=True)
    mask_ratio_min: float | None = setting(None, "the least such share; of exp: 0.2", free=True)
    channel_order: tuple[int, ...] | None = None
    latent_scale: float = PUBLISHED_LATENT_SCALE
    latent_mean: tuple[float, ...] | None = None
    latent_std: tuple[float, ...] | None = None
    head_input: str = setting("trained", "the sampling head's first input", HEAD_INPUTS, free=True)
    quantizer: str | None = setting(None, "or fitted to --cached_path's latents", QUANTIZERS)
    head: str = setting("channel", "what predicts a token; mar_*: diffusion", HEADS)
    head_share: float = setting(1.0, "of the masked positions, whose loss is computed", free=True)
    head_steps: int | tuple[int, ...] | None = setting(
        4, "or the channels of each, as 2,2,5,7", head="masked", free=True
    )
    mixture_components: int | None = setting(16, "normals a token", head="mixture")
    diffloss_d: int | None = setting(3, "blocks; mar_*: as published", head="diffusion")
    diffloss_w: int | None = setting(1024, "width; mar_*: as published", head="diffusion")
    num_sampling_steps: int | None = setting(100, "when sampling", head="diffusion", free=True)
    diffusion_batch_mul: int | None = setting(1, "noises a token", head="diffusion", free=True)
    codebook_size: int | None = setting(16384, "", head="codebook")  # the tokenizer's, no flag's

    def __post_init__(self):
        published = self.vae_embed_dim == len(PUBLISHED_CHANNEL_ORDER)
        defaults = {
            "channel_order": PUBLISHED_CHANNEL_ORDER if published else range(self.vae_embed_dim),
            "mask_ratio_min": MASK_RATIO_MIN.get(self.mask_distribution, 0.0),
            "quantizer": HEAD_QUANTIZERS.get(self.head, QUANTIZERS)[0],
        }
        for own in fields(self):
            value, of_head = getattr(self, own.name), own.metadata.get("head") == (self.head or "")
            if value is None:
                value = own.metadata["default"] if of_head else defaults.get(own.name)
            if isinstance(value, str):
                value = int(value) if of_head and value.isdecimal() else value  # MAR's "100"
            elif isinstance(value, Iterable):  # a list of a JSON file
                value = tuple(map(float, value) if own.name.startswith("latent_") else value)
            object.__setattr__(self, own.name, value)
        for problem in self._problems():
            raise ValueError(problem)

    def _problems(self) -> Iterator[str]:
        """What does not fit together, a sentence each."""
        for own in fields(self):
            value, head = getattr(self, own.name), own.metadata.get("head")
            choices = own.metadata.get("choices")
            numbers = value if isinstance(value, tuple) else (value,)
            if choices and own.name != "quantizer" and value not in choices:
                yield f"{own.name} {value!r} is not one of {', '.join(choices)}"
            if (head or own.type is int) and not all(isinstance(n, int | None) for n in numbers):
                yield f"{own.name} {value!r} is not a whole number"
            if head and head != self.head and value is not None:
                yield f"{own.name} {value} is of the {head} head, not of {self.head}"
            if head and head == self.head and min(numbers, default=0) < 1:
                yield f"{own.name} {value} is not positive"
        for name, most in {"num_sampling_steps": 1000, "head_steps": self.token_dim}.items():
            if isinstance(value := getattr(self, name), int) and value > most:
                yield f"{name} {value} is more than {most}"
        if isinstance(self.head_steps, tuple) and sum(self.head_steps) != self.token_dim:
            yield f"head_steps {self.head_steps} do not sum to {self.token_dim} channels"
        if self.head == "codebook" and self.patch_size != 1:
            yield f"patch_size {self.patch_size}, but a token of the codebook head is one code"
        quantizers = HEAD_QUANTIZERS.get(self.head, QUANTIZERS)
        if self.quantizer not in quantizers:
            known = f"the {self.head} head's, which takes {' or '.join(map(str, quantizers))}"
            yield f"quantizer {self.quantizer!r} is not {known}"
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
        if not 0 < self.head_share <= 1:
            yield f"head_share {self.head_share} is not above 0 and at most 1"
        for name in ("class_num", "vae_embed_dim", "buffer_size", "latent_scale"):
            if not getattr(self, name) > 0:
                yield f"{name} {getattr(self, name)} is not positive"
        mean, std = self.latent_mean, self.latent_std
        if (mean, std) != (None, None):
            if not len(mean or ()) == len(std or ()) == self.vae_embed_dim:
                yield f"latent_mean {mean} and latent_std {std} are not of all latent channels"
            elif min(std) <= 0:
                yield f"latent_std {std} is not positive"
        if sorted(self.channel_order) != list(range(self.vae_embed_dim)):
            permuted = f"a permutation of the {self.vae_embed_dim} latent channels (vae_embed_dim)"
            yield f"channel_order {self.channel_order} is not {permuted}"

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
    def mask_ratios(self) -> MaskRatios:
        """Of training."""
        return MaskRatios(self.mask_distribution, self.mask_ratio_min)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of an image's latents."""
        side = self.img_size // self.vae_stride
        return self.vae_embed_dim, side, side

    @property
    def latent_norm(self) -> tuple[float, tuple[float, ...] | None, tuple[float, ...] | None]:
        """What `Tokenizer` takes beside the VAE."""
        return self.latent_scale, self.latent_mean, self.latent_std

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


def unread_settings(head: str) -> tuple[str, ...]:
    """Settings that a model with that head does not read, whatever they are."""
    unread = () if head == "channel" else ("head_input", "channel_depth", "channel_order")
    of_levels = "quant_bits", "quant_min", "quant_max", "channel_embed_dim"
    return unread + (of_levels if head in HEAD_QUANTIZERS else ())


def preset(name: str) -> dict:
    """Keyword arguments of one of the `PRESETS`."""
    sizes = ("embed_dim", "depth", "num_heads")
    names = [f"{part}_{size}" for part in ("encoder", "decoder") for size in sizes]
    of_head, settings = ("channel_embed_dim", "channel_depth", "channel_heads"), {}
    if name.startswith("mar_"):
        of_head, settings = ("diffloss_w", "diffloss_d"), {"head": "diffusion"}
    return dict(zip((*names, *of_head), _SIZES[name][:3] + _SIZES[name], strict=True)) | settings
