"""What devices can do, from their vendors' data sheets, and how much of it a run uses.

Peaks are those of dense products (data sheets also print twice as much, for sparse ones) and, for
fp32, of full precision, not TF32, as torch multiplies by default. They are the vendors' figures, at
boost clocks and none of them measured: no device reaches its peak in the products of a model.
"""

import re
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from util.device import Precision

GIB = 2**30
STATUS = Path("/proc/self/status")


@dataclass(frozen=True)
class Hardware:
    """pattern: of torch.cuda.get_device_name, without the vendor; a slice of a device (MIG) or a
    relative (GH200, 4090 Laptop) has another name and other peaks.

    bf16 and fp16 (accumulating in fp32), fp32: TFLOP/s, None where the arithmetic is missing.
    memory: GB. bandwidth: of the memory, GB/s. link: to the other devices of a node, GB/s in each
    direction.
    """

    pattern: str
    bf16: float | None
    fp16: float
    fp32: float
    memory: float
    bandwidth: float
    link: float
    source: str

    @property
    def tf32(self) -> float | None:
        """TFLOP/s of torch's fp32 convolutions: half of bf16 on all devices here that have it."""
        return self.bf16 / 2 if self.bf16 is not None else None


# NVIDIA's data sheets, by the titles under which nvidia.com lists them.
HARDWARE = {
    "A100": Hardware(
        "A100-SXM4-(40|80)GB", 312, 312, 19.5, 80, 2039, 300, "A100 Tensor Core GPU, June 2021"
    ),
    "A100-PCIe": Hardware(
        "A100(-PCIE-40GB| 80GB PCIe)", 312, 312, 19.5, 80, 1935, 32, "A100 Tensor Core GPU, 2021"
    ),
    "H100": Hardware(
        "H100 80GB HBM3", 989.4, 989.4, 66.9, 80, 3352, 450, "H100 architecture whitepaper, SXM5"
    ),
    "H100-PCIe": Hardware(
        "H100 PCIe", 756, 756, 51.2, 80, 2039, 64, "H100 architecture whitepaper, PCIe"
    ),
    "H100-NVL": Hardware("H100 NVL", 835.5, 835.5, 60, 94, 3900, 300, "H100 Tensor Core GPU, NVL"),
    "H200": Hardware("H200", 989.4, 989.4, 66.9, 141, 4800, 450, "H200 Tensor Core GPU, SXM"),
    "B200": Hardware("B200", 2250, 2250, 75, 180, 8000, 900, "Blackwell and HGX B200, 2024"),
    "L40S": Hardware("L40S", 362, 362, 91.6, 48, 864, 32, "L40S"),
    "RTX-4090": Hardware(
        "GeForce RTX 4090", 165.2, 165.2, 82.6, 24, 1008, 32, "Ada architecture whitepaper"
    ),
    "V100": Hardware(
        "V100-SXM2-(16|32)GB(-LS)?", None, 125, 15.7, 32, 900, 150, "V100 Tensor Core GPU, 2020"
    ),
}


def find_hardware(name: str) -> Hardware | None:
    """name: as torch.cuda.get_device_name says it. None if it is not in the table."""
    short = re.sub(r"^(NVIDIA|Tesla) ", "", name)
    return next((h for h in HARDWARE.values() if re.fullmatch(h.pattern, short)), None)


def peak_flops(device: torch.device, precision: Precision) -> float | None:
    """The most FLOP/s of matrix products in that precision; None where it is not known."""
    if device.type != "cuda":
        return None
    found = find_hardware(torch.cuda.get_device_name(device))
    tera = getattr(found, precision.name, None)
    return tera * 1e12 if tera is not None else None


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that tensors took on a CUDA device, what MPS holds, else the process's most.

    Counters of the host: nothing waits for the device.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    return _resident_peak()


def _resident_peak() -> int:
    """Of this process. Linux's getrusage would begin with that of the process that started it."""
    if STATUS.exists():
        lines = STATUS.read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024
    import resource  # not on Windows

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


@dataclass(frozen=True)
class Meter:
    """From images a second to the share of a device that is used.

    flops: of one image's training step (see `util.flops`). peak: FLOP/s, None if not known.
    """

    flops: float
    device: torch.device
    peak: float | None = None

    def figures(self, images_per_second: float, processes: int, memory: float) -> dict[str, float]:
        """By their names in TensorBoard. memory: bytes, of the process with most."""
        achieved = self.flops * images_per_second / processes
        found = {
            "speed/tflops_per_device": achieved / 1e12,
            "speed/memory_gib": memory / GIB,
        }
        if self.peak is not None:
            found["speed/percent_of_peak"] = 100 * achieved / self.peak
        return found


def readable(value: float, unit: str) -> str:
    """Three digits and a prefix: 3.97e14 FLOP/s is 397 TFLOP/s."""
    for prefix in ("", "K", "M", "G", "T", "P", "E"):
        if value < 999.5 or prefix == "E":
            return f"{value:.3g} {prefix}{unit}"
        value /= 1000
    raise AssertionError
