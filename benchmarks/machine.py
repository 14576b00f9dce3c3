"""Clock, speed and memory of the machine that a benchmark runs on.

A shared machine's speed drifts by tens of percent within minutes, so every figure comes with the
rate of a matrix product measured beside it, on the same device in the same minute.
"""

import ctypes
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

MATRIX = {"cpu": 2048, "mps": 2048, "cuda": 8192}  # a GPU is not filled by less
COPY_BYTES = 2**28
PRODUCTS = {"fp32": torch.float32, "bf16": torch.bfloat16}
RATE_RUNS = 3  # the median of so many products
STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass
class Peak:
    """Bytes in use before a run, and the most during it; None where nobody counts them."""

    before: int | None = None
    highest: int | None = None


class Machine:
    def __init__(self, device: torch.device, matrix: int | None = None):
        """matrix: side of the matrices whose product is timed; the default is the device's."""
        self.device = device
        self.side = matrix or MATRIX[device.type]
        self.operands = {
            name: [torch.randn(self.side, self.side, device=device, dtype=dtype) for _ in range(3)]
            for name, dtype in PRODUCTS.items()
        }
        for name in PRODUCTS:  # the first product of a kind also chooses its kernel
            self.matrix_rate(name)

    def synchronize(self) -> None:
        if self.device.type != "cpu":
            getattr(torch, self.device.type).synchronize()

    def seconds(self, call: Callable[[], object]) -> float:
        """How long a call takes until the device is done with it."""
        self.synchronize()
        if self.device.type != "cuda":
            started = time.perf_counter()
            call()
            self.synchronize()
            return time.perf_counter() - started
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000

    def matrix_rate(self, precision: str) -> float:
        """FLOP/s of a product of two square matrices, 2 n^3 operations."""
        a, b, out = self.operands[precision]
        calls = 20 if self.device.type == "cuda" else 1  # a single one is soon over

        def products() -> None:
            for _ in range(calls):
                torch.mm(a, b, out=out)

        taken = sorted(self.seconds(products) for _ in range(RATE_RUNS))
        return calls * 2 * self.side**3 / taken[RATE_RUNS // 2]

    def rates(self) -> dict[str, float]:
        return {name: self.matrix_rate(name) for name in PRODUCTS}

    def copy_rate(self) -> float:
        """Bytes/s of a copy from memory to memory, what is read and what is written together."""
        source = torch.empty(COPY_BYTES, dtype=torch.uint8, device=self.device).fill_(1)
        target = source.clone()
        taken = sorted(self.seconds(lambda: target.copy_(source)) for _ in range(RATE_RUNS))
        return 2 * COPY_BYTES / taken[RATE_RUNS // 2]

    @contextmanager
    def peak(self) -> Iterator[Peak]:
        """Filled in at the end: CUDA's allocator, or on Linux what the kernel saw as resident."""
        found = Peak()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            found.before = torch.cuda.memory_allocated(self.device)
            yield found
            found.highest = torch.cuda.max_memory_allocated(self.device)
        elif self.device.type == "cpu" and _reset_resident_peak():
            found.before = _resident("VmRSS")
            yield found
            found.highest = _resident("VmHWM")
        else:
            yield found


def _reset_resident_peak() -> bool:
    """Give freed memory back and begin a new peak; False where the system has no such thing."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
        CLEAR_REFS.write_text("5")
    except (OSError, AttributeError):
        return False
    return True


def _resident(name: str) -> int:
    """Bytes of this process, VmRSS: now, VmHWM: at most since the peak was reset."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024
