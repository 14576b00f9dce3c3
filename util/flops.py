"""Floating-point operations of the model, counted from its configuration, per image.

Matrix products and convolutions only, a multiply-add being two operations; attention is counted as
if no position were hidden, and a backward pass as two forward ones. That is the convention of
torch.utils.flop_counter, with which tests/test_flops.py compares every part.
Letters: L positions, V of them visible, M masked, S class slots, T channels of a token, K levels,
D width.
"""

from dataclasses import dataclass
from functools import reduce
from operator import add

from models.config import TokenBridgeConfig
from models.masking import mask_schedule, masked_counts


@dataclass(frozen=True)
class Flops:
    """linear: products with weights, without adaln: the head's modulations. attention: q k, p v."""

    linear: float = 0
    attention: float = 0
    adaln: float = 0

    @property
    def total(self) -> float:
        return self.linear + self.attention + self.adaln

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(
            self.linear + other.linear,
            self.attention + other.attention,
            self.adaln + other.adaln,
        )

    def __rmul__(self, times: float) -> "Flops":
        return Flops(times * self.linear, times * self.attention, times * self.adaln)


@dataclass(frozen=True)
class ModelFlops:
    encoder: Flops = Flops()
    decoder: Flops = Flops()
    head: Flops = Flops()

    @property
    def total(self) -> float:
        return self.encoder.total + self.decoder.total + self.head.total

    def __add__(self, other: "ModelFlops") -> "ModelFlops":
        return ModelFlops(
            self.encoder + other.encoder, self.decoder + other.decoder, self.head + other.head
        )

    def __rmul__(self, times: float) -> "ModelFlops":
        return ModelFlops(times * self.encoder, times * self.decoder, times * self.head)


def linear(rows: float, inputs: int, outputs: int) -> float:
    """[rows, inputs] x [inputs, outputs]."""
    return 2 * rows * inputs * outputs


def vit_block(width: int, mlp_ratio: float, tokens: int, leaving: int | None = None) -> Flops:
    """leaving: how many of the tokens are read afterwards; all keys and values are needed."""
    leaving = tokens if leaving is None else leaving
    products = linear(tokens, width, 2 * width) + linear(leaving, width, 2 * width)
    products += 2 * linear(leaving, width, int(width * mlp_ratio))
    return Flops(products, attention=2 * linear(leaving, width, tokens))


def encoder(config: TokenBridgeConfig, visible: int) -> Flops:
    """The projection of all tokens; blocks on the slots and the visible ones, S + V."""
    width = config.encoder_embed_dim
    block = vit_block(width, config.mlp_ratio, config.buffer_size + visible)
    return Flops(_input_projection(config)) + config.encoder_depth * block


def _input_projection(config: TokenBridgeConfig) -> float:
    return linear(config.seq_len, config.token_dim, config.encoder_embed_dim)


def decoder(config: TokenBridgeConfig, visible: int, predicted: int) -> Flops:
    """The projection of the encoder's output, S + V; blocks on all S + L.

    Only the positions to predict leave the last block.
    """
    width, tokens = config.decoder_embed_dim, config.buffer_size + config.seq_len
    blocks = (config.decoder_depth - 1) * vit_block(width, config.mlp_ratio, tokens)
    last = vit_block(width, config.mlp_ratio, tokens, leaving=predicted)
    return Flops(_decoder_projection(config, visible)) + blocks + last


def _decoder_projection(config: TokenBridgeConfig, visible: int) -> float:
    rows = config.buffer_size + visible
    return linear(rows, config.encoder_embed_dim, config.decoder_embed_dim)


def head(config: TokenBridgeConfig, positions: int) -> Flops:
    """Teacher-forced: all T channels of so many positions."""
    tokens = positions * config.token_dim
    attention = 2 * linear(tokens, config.channel_embed_dim, config.token_dim)
    return _head_products(config, positions) + Flops(attention=config.channel_depth * attention)


def head_sampling(config: TokenBridgeConfig, positions: int) -> Flops:
    """Channel after channel, over keys and values of all T, those to come hidden: the same."""
    return head(config, positions)


def _head_products(config: TokenBridgeConfig, positions: int) -> Flops:
    width, tokens = config.channel_embed_dim, positions * config.token_dim
    products = linear(positions, config.decoder_embed_dim, width)
    products += linear(tokens, width, config.quant_levels)
    products += config.channel_depth * _head_block_linear(config, tokens)
    return Flops(products, adaln=linear(tokens, width, (6 * config.channel_depth + 2) * width))


def _head_block_linear(config: TokenBridgeConfig, tokens: int) -> float:
    width = config.channel_embed_dim
    return linear(tokens, width, 4 * width + 2 * int(width * config.mlp_ratio))


def forward(config: TokenBridgeConfig, masked: int) -> ModelFlops:
    """Latents -> logits of the masked positions."""
    visible = config.seq_len - masked
    return ModelFlops(
        encoder(config, visible), decoder(config, visible, masked), head(config, masked)
    )


def recomputed(config: TokenBridgeConfig, masked: int) -> ModelFlops:
    """What gradient checkpointing computes once more: the blocks, the head's modulations apart."""
    whole, rows = forward(config, masked), masked * config.token_dim
    outside = linear(masked, config.decoder_embed_dim, config.channel_embed_dim)
    outside += linear(rows, config.channel_embed_dim, config.quant_levels)
    return whole + (-1) * ModelFlops(
        Flops(_input_projection(config)),
        Flops(_decoder_projection(config, config.seq_len - masked)),
        Flops(outside, adaln=whole.head.adaln),
    )


def training_step(
    config: TokenBridgeConfig, masked: int | None = None, grad_checkpointing: bool = False
) -> ModelFlops:
    """Forward and backward of one image; the mean over the training's masks if masked is None.

    Twice the forward pass for backward, but that the input needs no gradient. Without
    grad_checkpointing these are the model's FLOPs, of which utilisation is a share by definition.
    """
    if masked is None:
        counts = masked_counts(config.seq_len, config.mask_ratio_min)
        steps = (p * training_step(config, m, grad_checkpointing) for m, p in counts)
        return reduce(add, steps)
    step = 3 * forward(config, masked)
    step += ModelFlops(encoder=Flops(-_input_projection(config)))
    return step + recomputed(config, masked) if grad_checkpointing else step


def sampling_iteration(
    config: TokenBridgeConfig, before: int, after: int, guided: bool
) -> ModelFlops:
    """From `before` masked positions to `after`; guidance is a doubled batch of the backbone."""
    visible = config.seq_len - before
    passes = 2 if guided else 1
    return ModelFlops(
        passes * encoder(config, visible),
        passes * decoder(config, visible, before - after),
        head_sampling(config, before - after),
    )


def sampling(config: TokenBridgeConfig, num_iter: int, guided: bool) -> ModelFlops:
    """All iterations of one image; those that predict nothing are passed over."""
    schedule = mask_schedule(config.seq_len, num_iter)
    iterations = (
        sampling_iteration(config, before, after, guided)
        for before, after, _ in schedule
        if before > after
    )
    return reduce(add, iterations)


def _conv(size: int, inputs: int, outputs: int, positions: int) -> float:
    return linear(positions, size**2 * inputs, outputs)


def _res_block(inputs: int, outputs: int, positions: int) -> float:
    shortcut = _conv(1, inputs, outputs, positions) if inputs != outputs else 0
    convs = _conv(3, inputs, outputs, positions) + _conv(3, outputs, outputs, positions)
    return convs + shortcut


def _vae_attention(width: int, positions: int) -> float:
    return 4 * _conv(1, width, width, positions) + 2 * linear(positions, width, positions)


@dataclass(frozen=True)
class VaeShape:
    """widths of the levels, the first at full resolution; blocks of an encoder's level.

    last_attends: attention after each block of the encoder's last level. moments, latents: 1x1
    convolutions of them at the ends.
    """

    widths: tuple[int, ...]
    blocks: int
    channels: int
    last_attends: bool = True
    middle_attends: bool = True
    moments: bool = True
    latents: bool = True

    @classmethod
    def of(cls, vae: dict) -> "VaeShape":
        """vae: settings of `AutoencoderKL` (KL16 for example), or of diffusers' one.

        Raises ValueError on a diffusers VAE with other levels than plain ones.
        """
        if "block_out_channels" not in vae:
            widths = tuple(vae["ch"] * mult for mult in vae["ch_mult"])
            last = len(widths) - 1
            return cls(
                widths,
                vae["num_res_blocks"],
                vae["embed_dim"],
                last_attends=last in vae.get("encoder_attention", (last,)),
                moments=vae.get("quant_conv", True),
                latents=vae.get("quant_conv", True),
            )
        kinds = {*vae["down_block_types"], *vae["up_block_types"]}
        others = kinds - {"DownEncoderBlock2D", "UpDecoderBlock2D"}
        if others:
            raise ValueError(f"a VAE with {min(others)[:60]!r} has no count here")
        return cls(
            tuple(vae["block_out_channels"]),
            vae["layers_per_block"],
            vae["latent_channels"],
            last_attends=False,
            middle_attends=vae.get("mid_block_add_attention", True),
            moments=vae.get("use_quant_conv", True),
            latents=vae.get("use_post_quant_conv", True),
        )

    def middle(self, positions: int) -> float:
        width = self.widths[-1]
        attention = _vae_attention(width, positions) if self.middle_attends else 0
        return 2 * _res_block(width, width, positions) + attention


def vae_encode(vae: dict, img_size: int) -> float:
    """Image -> moments. vae: see `VaeShape.of`."""
    shape = VaeShape.of(vae)
    positions, width, last = img_size**2, shape.widths[0], len(shape.widths) - 1
    flops = _conv(3, 3, width, positions)
    for i, outputs in enumerate(shape.widths):
        for _ in range(shape.blocks):
            flops += _res_block(width, outputs, positions)
            flops += _vae_attention(outputs, positions) if i == last and shape.last_attends else 0
            width = outputs
        if i < last:
            positions //= 4
            flops += _conv(3, width, width, positions)
    moments = 2 * shape.channels
    flops += shape.middle(positions) + _conv(3, width, moments, positions)
    return flops + (_conv(1, moments, moments, positions) if shape.moments else 0)


def vae_decode(vae: dict, img_size: int) -> float:
    """Latents -> image."""
    shape = VaeShape.of(vae)
    widths, channels, width = shape.widths, shape.channels, shape.widths[-1]
    positions = (img_size // 2 ** (len(widths) - 1)) ** 2
    flops = _conv(1, channels, channels, positions) if shape.latents else 0
    flops += _conv(3, channels, width, positions) + shape.middle(positions)
    for i in reversed(range(len(widths))):
        for _ in range(shape.blocks + 1):
            flops += _res_block(width, widths[i], positions)
            width = widths[i]
        if i > 0:
            positions *= 4
            flops += _conv(3, width, width, positions)
    return flops + _conv(3, width, 3, positions)
