"""Memory of a training step, from the model's configuration.

Parameters, gradients, AdamW and EMA are counted; activations are estimated, operation by operation,
as eager torch keeps them for backward with fused attention (tests/test_memory.py compares them with
the bytes alive in real steps: 0.9 to 1.2 times as many). Not in it: the CUDA context, what the
allocator cannot use, the VAE, the loader.
Letters: L positions, M masked, T channels of a token, D width, a bytes of an activation.
"""

import math
from dataclasses import dataclass, fields
from functools import cache

import torch

from models.config import TokenBridgeConfig
from models.heads.channel import CHUNK_ROWS, CHUNK_ROWS_ELSEWHERE
from models.tokenbridge import TokenBridge

FULL = 4  # bytes of fp32: weights, optimizer, EMA, and the sums that run through the blocks
ACTIVATION = {"bf16": 2, "fp16": 2, "fp32": 4}


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters. head_tables: of the head, those that no product multiplies."""

    backbone: int
    head: int
    backbone_tables: int
    head_tables: int

    @property
    def total(self) -> int:
        return self.backbone + self.head

    @property
    def multiplied(self) -> int:
        """Those that autocast makes copies of."""
        return self.total - self.backbone_tables - self.head_tables


@cache
def count_parameters(config: TokenBridgeConfig) -> Parameters:
    """Of a model that takes no memory."""
    with torch.device("meta"):
        model = TokenBridge(**config.to_dict())
    found = []
    for part in (model.backbone, model.head):
        linear = (m for m in part.modules() if isinstance(m, torch.nn.Linear))
        weights = sum(m.weight.numel() for m in linear)
        total = sum(p.numel() for p in part.parameters())
        found.append((total, total - weights))
    (backbone, backbone_tables), (head, head_tables) = found
    return Parameters(backbone, head, backbone_tables, head_tables)


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes on one device.

    casts: copies of the weights in half precision. backbone: what encoder and decoder keep for
    backward. head: what one chunk of the head takes, and the gradients of its weights beside those
    that micro-batches before, or DDP's buckets, already hold.
    """

    parameters: int
    gradients: int
    optimizer: int
    ema: int
    casts: int
    backbone: int
    head: int

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))


def training_memory(
    config: TokenBridgeConfig,
    batch_size: int,
    precision: str = "bf16",
    grad_checkpointing: bool = False,
    head_chunk: int | None = None,
    device_type: str = "cuda",
) -> TrainingMemory:
    """batch_size: of a micro-batch. precision: bf16, fp16 or fp32. head_chunk: as the model's.

    The most that any mask ratio of the training takes.
    """
    parameters = count_parameters(config)
    positions = batch_size * config.seq_len
    chunk = min(chunk_positions(config, head_chunk, device_type), positions)
    masked = (math.ceil(config.seq_len * config.mask_ratio_min), config.seq_len)
    a = ACTIVATION[precision]
    backbone = max(backbone_bytes(config, count, a, grad_checkpointing) for count in masked)
    head = chunk * head_bytes(config, a, grad_checkpointing)
    return TrainingMemory(
        parameters=FULL * parameters.total,
        gradients=FULL * parameters.total,
        optimizer=2 * FULL * parameters.total,
        ema=FULL * parameters.total,
        casts=a * parameters.multiplied if a < FULL else 0,
        backbone=round(batch_size * backbone),
        head=round(head + FULL * parameters.head),
    )


def chunk_positions(config: TokenBridgeConfig, head_chunk: int | None, device_type: str) -> int:
    """Positions that the head works on at once, of `models.heads.channel`."""
    if head_chunk is None:
        rows = CHUNK_ROWS.get(device_type, CHUNK_ROWS_ELSEWHERE)
        return max(1, rows // config.token_dim)
    return head_chunk or 2**62


def _vit_block_bytes(config: TokenBridgeConfig, width: int, rows: float, a: int) -> float:
    """The sums before both norms; their outputs, q, k, v and the result of attention; twice the
    MLP's width before and after GELU; dropout's masks of one byte."""
    hidden = int(width * config.mlp_ratio)
    kept = width * (2 * FULL + 6 * a) + hidden * 2 * a
    masks = 2 * width + hidden if config.proj_dropout else 0
    return rows * (kept + masks)


def backbone_bytes(
    config: TokenBridgeConfig, masked: float, a: int, grad_checkpointing: bool = False
) -> float:
    """Kept of one image. The last block works on fewer positions: as many as are masked."""
    tokens, visible = config.buffer_size + config.seq_len, config.seq_len - masked
    parts = (
        (config.encoder_embed_dim, config.buffer_size + visible, config.encoder_depth),
        (config.decoder_embed_dim, tokens, config.decoder_depth),
    )
    kept, largest = 0.0, 0.0
    for width, rows, depth in parts:
        block = _vit_block_bytes(config, width, rows, a)
        kept += depth * (FULL * rows * width if grad_checkpointing else block)
        largest = max(largest, block)
    ends = 2 * FULL * (tokens * config.encoder_embed_dim + masked * config.decoder_embed_dim)
    return kept + ends + (largest if grad_checkpointing else 0)


def head_bytes(config: TokenBridgeConfig, a: int, grad_checkpointing: bool = False) -> float:
    """Kept of a position: forward, and the gradients in flight at the beginning of its backward."""
    width, depth = config.channel_embed_dim, config.channel_depth
    block = width * (4 * FULL + 12 * a) + int(width * config.mlp_ratio) * 2 * a
    blocks = depth * FULL * width + block if grad_checkpointing else depth * block
    modulations = (6 * depth + 2) * width * a
    ends = width * (5 * FULL + 4 * a) + config.quant_levels * (2 * FULL + a)
    in_flight = width * 2 * FULL
    return config.token_dim * (blocks + modulations + ends + in_flight)
