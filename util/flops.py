"""What a training step takes: operations, memory, and the share of a device that is used.

Operations are those of matrix products, a multiply-add being two; attention is counted as if no
position were hidden, a backward pass as two forward ones: as torch.utils.flop_counter does.
Letters: L positions, V of them visible, S class slots, T channels of a token, a bytes of a number.
"""

import math
import re
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from models.config import TokenBridgeConfig
from models.heads import CHUNK_ROWS, CHUNK_ROWS_ELSEWHERE
from models.masking import mask_schedule, masked_counts
from models.tokenbridge import TokenBridge
from util.device import Precision

GIB = 2**30
FULL = 4  # bytes of fp32: weights, optimizer, EMA, and the sums that run through the blocks
ACTIVATION = {"bf16": 2, "fp16": 2, "fp32": 4}


def linear(rows: float, inputs: int, outputs: int) -> float:
    """[rows, inputs] x [inputs, outputs]."""
    return 2 * rows * inputs * outputs


def vit_block(width: int, mlp_ratio: float, tokens: int, leaving: int) -> float:
    """leaving: how many of the tokens are read afterwards."""
    projections = linear(tokens + leaving, width, 2 * width)
    attention = 2 * linear(leaving, width, tokens)
    return projections + attention + 2 * linear(leaving, width, int(width * mlp_ratio))


def backbone(config: TokenBridgeConfig, visible: int, predicted: int) -> float:
    """Encoder blocks of S + V, decoder blocks of S + L; only those predicted leave the last one."""
    width, out, ratio = config.encoder_embed_dim, config.decoder_embed_dim, config.mlp_ratio
    some, every = config.buffer_size + visible, config.buffer_size + config.seq_len
    total = linear(config.seq_len, config.token_dim, width) + linear(some, width, out)
    total += config.encoder_depth * vit_block(width, ratio, some, some)
    total += (config.decoder_depth - 1) * vit_block(out, ratio, every, every)
    return total + vit_block(out, ratio, every, predicted)


def head(config: TokenBridgeConfig, positions: int) -> float:
    """All T channels of so many positions, at once or one by one."""
    width, depth = config.channel_embed_dim, config.channel_depth
    tokens = positions * config.token_dim
    attention = linear(tokens, width, 4 * width + 2 * config.token_dim)
    block = attention + linear(tokens, width, 2 * int(width * config.mlp_ratio))
    modulations = linear(tokens, width, (6 * depth + 2) * width)
    ends = linear(positions, config.decoder_embed_dim, width)
    return ends + depth * block + modulations + linear(tokens, width, config.quant_levels)


def training_step(config: TokenBridgeConfig, masked: int | None = None) -> float:
    """Forward and backward of one image, without recomputation; masked None: a mean over masks."""
    if masked is None:
        counts = masked_counts(config.seq_len, config.mask_ratio_min)
        return sum(share * training_step(config, count) for count, share in counts)
    forward = backbone(config, config.seq_len - masked, masked) + head(config, masked)
    gradient_of_input = linear(config.seq_len, config.token_dim, config.encoder_embed_dim)
    return 3 * forward - gradient_of_input  # which nobody needs


def sampling(config: TokenBridgeConfig, num_iter: int, guided: bool) -> float:
    """All iterations of one image; guidance is a doubled batch of the backbone."""
    total, passes = 0.0, 2 if guided else 1
    for before, after, _ in mask_schedule(config.seq_len, num_iter):
        if before > after:
            total += passes * backbone(config, config.seq_len - before, before - after)
            total += head(config, before - after)
    return total


def count_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def training_memory(
    model: TokenBridge, batch_size: int, precision: str = "bf16", device_type: str = "cuda"
) -> dict[str, int]:
    """Bytes on a device, by part; without VAE, loader, CUDA context and the allocator's losses.

    model: on any device, meta too. batch_size: of a micro-batch. precision: bf16, fp16 or fp32.
    states: weights, gradients, AdamW's moments, EMA. casts: weights in half precision.
    backbone, head: what they keep for backward, an estimate; the head's are of a chunk, and a
    second time the gradients of its weights.
    """
    config, head, a = model.config, model.head, ACTIVATION[precision]
    multiplied = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    positions, chunk = batch_size * config.seq_len, head.chunk
    if chunk is None:
        rows = CHUNK_ROWS.get(device_type, CHUNK_ROWS_ELSEWHERE)
        chunk = max(1, rows // config.token_dim)
    image, position = _activations(config, a, head.grad_checkpointing)
    in_head = min(chunk or positions, positions) * position + FULL * count_parameters(head)
    return {
        "states": 5 * FULL * count_parameters(model),
        "casts": a * multiplied if a < FULL else 0,
        "backbone": round(batch_size * image),
        "head": round(in_head),
    }


def _activations(config: TokenBridgeConfig, a: int, recompute: bool) -> tuple[float, float]:
    """Bytes of an image in the backbone, and of a position in the head.

    A block keeps the sums before both norms, their outputs, q, k, v, what attention gives, twice
    the MLP's width around GELU, and dropout's masks of one byte.
    """
    masked, tokens = math.ceil(config.seq_len * config.mask_ratio_min), config.seq_len
    image = 2 * FULL * (config.buffer_size + tokens) * config.encoder_embed_dim
    image += 2 * FULL * masked * config.decoder_embed_dim
    largest = 0.0
    for width, positions, depth in (
        (config.encoder_embed_dim, tokens - masked, config.encoder_depth),
        (config.decoder_embed_dim, tokens, config.decoder_depth),
    ):
        rows, hidden = config.buffer_size + positions, int(width * config.mlp_ratio)
        masks = 2 * width + hidden if config.proj_dropout else 0
        block = rows * (width * (2 * FULL + 6 * a) + hidden * 2 * a + masks)
        image += depth * (FULL * rows * width if recompute else block)
        largest = max(largest, block)
    width, depth = config.channel_embed_dim, config.channel_depth
    block = width * (4 * FULL + 12 * a) + int(width * config.mlp_ratio) * 2 * a
    channel = depth * FULL * width + block if recompute else depth * block
    channel += (6 * depth + 2) * width * a  # modulations
    channel += width * (6 * FULL + 4 * a) + config.quant_levels * (2 * FULL + a)  # two in flight
    return image + (largest if recompute else 0), config.token_dim * channel


class Hardware(NamedTuple):
    """TFLOP/s of dense products at boost clocks, None where there are none, and GB of memory.

    pattern: of torch.cuda.get_device_name, without the vendor. fp16: accumulated in fp32.
    """

    pattern: str
    bf16: float | None
    fp16: float
    fp32: float  # not TF32
    memory: float
    source: str  # NVIDIA's data sheet or whitepaper, by its title


HARDWARE = {
    "A100": Hardware("A100-SXM4-(40|80)GB", 312, 312, 19.5, 80, "A100, June 2021"),
    "A100-PCIe": Hardware("A100(-PCIE-40GB| 80GB PCIe)", 312, 312, 19.5, 80, "A100, 2021"),
    "H100": Hardware("H100 80GB HBM3", 989.4, 989.4, 66.9, 80, "H100 architecture, SXM5"),
    "H100-PCIe": Hardware("H100 PCIe", 756, 756, 51.2, 80, "H100 architecture, PCIe"),
    "H100-NVL": Hardware("H100 NVL", 835.5, 835.5, 60, 94, "H100, NVL"),
    "H200": Hardware("H200", 989.4, 989.4, 66.9, 141, "H200, SXM"),
    "B200": Hardware("B200", 2250, 2250, 75, 180, "Blackwell and HGX B200, 2024"),
    "L40S": Hardware("L40S", 362, 362, 91.6, 48, "L40S"),
    "RTX-4090": Hardware("GeForce RTX 4090", 165.2, 165.2, 82.6, 24, "Ada architecture"),
    "V100": Hardware("V100-SXM2-(16|32)GB(-LS)?", None, 125, 15.7, 32, "V100, 2020"),
}


def peak_flops(device: torch.device, precision: Precision) -> float | None:
    """The most FLOP/s of matrix products in that precision; None where it is not known."""
    if device.type != "cuda":
        return None
    name = re.sub(r"^(NVIDIA|Tesla) ", "", torch.cuda.get_device_name(device))
    hardware = next((h for h in HARDWARE.values() if re.fullmatch(h.pattern, name)), None)
    tera = getattr(hardware, precision.name, None)
    return tera * 1e12 if tera is not None else None


def peak_memory(device: torch.device) -> int:
    """The most bytes of tensors on a CUDA device; what MPS holds; else the most of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    if (status := Path("/proc/self/status")).exists():  # Linux, whose getrusage counts the parent
        return int(re.search(r"VmHWM:\s*(\d+)", status.read_text())[1]) * 1024
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


class Meter(NamedTuple):
    """flops: of an image's `training_step`. peak: FLOP/s of the device, None if not known."""

    flops: float
    device: torch.device
    peak: float | None = None

    def figures(self, images_per_second: float, processes: int, memory: float) -> dict[str, float]:
        """memory: bytes, of the process with most."""
        achieved = self.flops * images_per_second / processes
        figures = {"speed/tflops_per_device": achieved / 1e12, "speed/memory_gib": memory / GIB}
        if self.peak is not None:
            figures["speed/percent_of_peak"] = 100 * achieved / self.peak
        return figures


def readable(value: float, unit: str) -> str:
    """Three digits and a prefix: 3.97e14 FLOP/s is 397 TFLOP/s."""
    prefixes = ["", "K", "M", "G", "T", "P", "E"]
    while value >= 999.5 and len(prefixes) > 1:
        value /= 1000
        prefixes.pop(0)
    return f"{value:.3g} {prefixes[0]}{unit}"
