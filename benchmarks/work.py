"""What a benchmark consists of: works, each in several variants that are timed in turn."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from benchmarks.machine import PRODUCTS, Machine
from models.config import TokenBridgeConfig, preset
from util.device import Precision, resolve_precision

FAST, PLAIN = "fast", "plain"  # as the project computes it; as benchmarks/plain.py does
SHORTEST = 0.2  # seconds: what is over sooner is called several times
FEWEST = 2  # runs of a variant, if so many are asked for
NO_WARM_UP = 30.0  # seconds: a first run on a CPU that took longer counts, with its few first costs


@dataclass(frozen=True)
class Settings:
    """The sizes of everything.

    long_model: the model of samplings of more than 8 iterations and of the evaluation.
    precisions: the switches are timed in the last one. mask_ratio: of training and forward.
    """

    model: str
    long_model: str
    batch_size: int
    img_size: int
    device: torch.device
    precisions: tuple[str, ...]
    mask_ratio: float
    compile: bool = False
    switches: bool = True
    sampled: int = 2  # images of a sampling
    iterations: tuple[int, ...] = (8, 64, 256)
    head_tokens: int = 64
    quantized: tuple[int, ...] = (64, 16, 16, 16)
    cached: int = 4  # images of the caching
    evaluated: int = 2  # images of the evaluation
    read: int = 2048  # samples of the loaders' caches, batch 64
    photos: int = 256  # JPEG images of the image loader

    @property
    def published_conditions(self) -> bool:
        """Whether these are the sizes at which the published code's seconds are known."""
        sizes = self.model, self.batch_size, self.img_size, self.mask_ratio, self.sampled
        return sizes == ("tokenbridge_base", 2, 256, 0.85, 2) and self.device.type == "cpu"

    def config(self, model: str) -> TokenBridgeConfig:
        return TokenBridgeConfig(**preset(model), img_size=self.img_size)

    @property
    def masked(self) -> int:
        """Masked positions of an image in training and forward."""
        return math.ceil(self.config(self.model).seq_len * self.mask_ratio)

    def precision(self, name: str) -> Precision:
        return resolve_precision(name, self.device)


@dataclass(frozen=True)
class Variant:
    """run: once; a float that it returns are the seconds that it measured itself.

    around: what holds while it runs, not timed. warm_up: however long its first run takes.
    counted: whether it computes what the work's analytic count says.
    """

    name: str
    precision: str
    run: Callable[[], object]
    around: Callable[[], AbstractContextManager] = nullcontext
    warm_up: bool = False
    counted: bool = True


@dataclass(frozen=True)
class Work:
    """items: of that unit, done in one run. flops: of one run, where the count is analytic."""

    name: str
    title: str
    items: float
    unit: str
    variants: Sequence[Variant]
    flops: float | None = None


class Timing:
    """The runs of one variant."""

    def __init__(self, variant: Variant, machine: Machine):
        self.variant, self.machine = variant, machine
        self.calls, self.spent = 1, 0.0
        self.seconds: list[float] = []
        self.rates: dict[str, list[float]] = {name: [] for name in PRODUCTS}
        self.before = self.highest = None

    def run(self) -> None:
        """One run: rates of the machine before and after it, of which the mean counts."""
        with self.variant.around():
            before = self.machine.rates()
            seconds = self._timed()
            after = self.machine.rates()
        self.seconds.append(seconds)
        for name, rates in self.rates.items():
            rates.append((before[name] + after[name]) / 2)

    def warm_up(self) -> None:
        """First costs are not counted; what takes long anyway is counted from the first run on."""
        started = time.perf_counter()
        self.run()
        slow = self.machine.device.type == "cpu" and time.perf_counter() - started > NO_WARM_UP
        if slow and not self.variant.warm_up:
            return
        self.calls, self.spent = max(1, math.ceil(SHORTEST / max(self.seconds.pop(), 1e-9))), 0.0
        for rates in self.rates.values():
            rates.pop()

    def _timed(self) -> float:
        own: list[float] = []

        def calls() -> None:
            for _ in range(self.calls):
                seconds = self.variant.run()
                if isinstance(seconds, float):
                    own.append(seconds)

        with self.machine.peak() as peak:
            seconds = self.machine.seconds(calls)
        if peak.highest is not None and (self.highest is None or peak.highest > self.highest):
            self.before, self.highest = peak.before, peak.highest
        self.spent += seconds
        return (sum(own) if own else seconds) / self.calls

    def row(self, work: Work) -> dict:
        """What the JSON file holds of this variant; medians are left to the reader."""
        return {
            "work": work.name,
            "title": work.title,
            "variant": self.variant.name,
            "precision": self.variant.precision,
            "seconds": self.seconds,
            "matrix_rates": self.rates,
            "items": work.items,
            "unit": work.unit,
            "flops": work.flops if self.variant.counted else None,
            "memory_before": self.before,
            "memory_peak": self.highest,
        }


def measure(work: Work, machine: Machine, repeats: int, limit: float) -> Iterator[dict]:
    """Rows of all variants, run in turn so that a drift of the machine meets all of them.

    limit: seconds of one variant after which no third run of it begins.
    """
    timings = [Timing(variant, machine) for variant in work.variants]
    for timing in timings:
        timing.warm_up()
    for _ in range(repeats):
        for timing in timings:
            long = len(timing.seconds) >= FEWEST and timing.spent > limit
            if len(timing.seconds) < repeats and not long:
                timing.run()
    return (timing.row(work) for timing in timings)
