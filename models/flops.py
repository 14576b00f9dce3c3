"""What a training step takes: operations, and the share of a device that is used.

Operations are those of matrix products, a multiply-add being two; attention is counted as if no
position were hidden: as torch.utils.flop_counter does, which counts those of the head, any head.
Letters: L positions, V of them visible, S class slots.
"""

import math
import re
import resource
import sys
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from models.config import TokenBridgeConfig
from models.precision import Precision
from models.sampler import SamplingOptions, iterations
from models.tokenbridge import HEADS

GIB = 2**30


def vit_block(width: int, mlp_ratio: float, tokens: int, leaving: int) -> int:
    """Forward; leaving: how many of the tokens are read afterwards."""
    projections = 4 * (tokens + leaving) * width * width
    return projections + 4 * leaving * width * (tokens + int(width * mlp_ratio))


def backbone(config: TokenBridgeConfig, visible: int, predicted: int) -> int:
    """Forward: encoder blocks of S + V, decoder blocks of S + L; those predicted leave the last."""
    width, out, ratio = config.encoder_embed_dim, config.decoder_embed_dim, config.mlp_ratio
    some, every = config.buffer_size + visible, config.buffer_size + config.seq_len
    total = 2 * width * (config.seq_len * config.token_dim + some * out)
    total += config.encoder_depth * vit_block(width, ratio, some, some)
    total += (config.decoder_depth - 1) * vit_block(out, ratio, every, every)
    return total + vit_block(out, ratio, every, predicted)


def count(compute: Callable[[], object]) -> int:
    """Of what it computes; attention is written out, for torch counts no fused one of a CPU."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        compute()
    return counter.get_total_flops()


@lru_cache
def head(config: TokenBridgeConfig, sampled: bool = False, guided: bool = False) -> int:
    """Of one position: forward and backward, or one draw; counted on a head without memory.

    guided: as a head does that guides itself.
    """
    with torch.device("meta"):
        model = HEADS[config.head](config).to("meta").eval()
        model.chunk = 0
        shape = (1, 2) if guided and model.guides else (1,)
        z = torch.zeros(*shape, config.decoder_embed_dim, requires_grad=not sampled)
        if sampled:
            return count(lambda: model.sample(z, torch.zeros(1, model.draws)))
        kind = torch.int64 if config.quantizer else torch.float32
        targets = torch.zeros(1, 1 if config.codebook_size else config.token_dim, dtype=kind)
        return count(lambda: model(z, targets, *model.noise(targets)).mean().backward())


def training_step(config: TokenBridgeConfig, masked: int | None = None) -> float:
    """Forward and backward of one image, without recomputation; masked None: a mean over masks."""
    if masked is None:
        counts = config.mask_ratios.counts(config.seq_len)
        return sum(share * training_step(config, count) for count, share in counts)
    predicted = math.ceil(masked * config.head_share)
    both = 3 * backbone(config, config.seq_len - masked, predicted) + predicted * head(config)
    gradient_of_input = 2 * config.seq_len * config.token_dim * config.encoder_embed_dim
    return both - gradient_of_input  # which nobody needs


def sampling(config: TokenBridgeConfig, options: SamplingOptions) -> int:
    """All iterations of one image; a guided one is a doubled batch of the backbone.

    Of random order, without the token cache.
    """
    total = 0
    for before, after, scale in iterations(options, config.seq_len):
        total += (1 + (scale != 1)) * backbone(config, config.seq_len - before, before - after)
        total += (before - after) * head(config, True, scale != 1)
    return total


class Hardware(NamedTuple):
    """pattern: of torch.cuda.get_device_name, without the vendor. TFLOP/s of dense products at
    boost clocks in fp16 (accumulated in fp32) or bf16, and in fp32 (not TF32).
    Source: NVIDIA's data sheets and architecture whitepapers of each.
    """

    pattern: str
    half: float
    fp32: float


HARDWARE = {
    "A100": Hardware("A100.*", 312, 19.5),
    "H100": Hardware("H100 80GB HBM3", 989.4, 66.9),
    "H100-PCIe": Hardware("H100 PCIe", 756, 51.2),
    "H200": Hardware("H200", 989.4, 66.9),
    "B200": Hardware("B200", 2250, 75),
    "L40S": Hardware("L40S", 362, 91.6),
    "RTX-4090": Hardware("GeForce RTX 4090", 165.2, 82.6),
}


def peak_flops(device: torch.device, precision: Precision) -> float | None:
    """The most FLOP/s of matrix products in that precision; None where it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device).removeprefix("NVIDIA ")
    known = next((h for h in HARDWARE.values() if re.fullmatch(h.pattern, name)), None)
    return known and 1e12 * (known.half if precision.dtype else known.fp32)


def peak_memory(device: torch.device) -> int:
    """The most bytes of tensors on a CUDA device; what MPS holds; else the most of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    if (status := Path("/proc/self/status")).exists():  # Linux, whose getrusage counts the parent
        return int(re.search(r"VmHWM:\s*(\d+)", status.read_text())[1]) * 1024
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
        share = {"speed/percent_of_peak": 100 * achieved / self.peak} if self.peak else {}
        return figures | share


def readable(value: float, unit: str) -> str:
    """Three digits and a prefix: 3.97e14 FLOP/s is 397 TFLOP/s."""
    power = next((p for p in range(7) if value < 999.5 * 1000**p), 6)
    return f"{value / 1000**power:.3g} {' KMGTPE'[power].strip()}{unit}"
