"""The training log: scalars for TensorBoard and --metrics_file, and a progress line, at the cost of
one wait every N steps.

Statistics are summed on the device; every `every` steps they are summed over the processes, read
once, and written by the main process.
"""

import json
import math
import textwrap
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property

import torch
from torch import Tensor

from util import dist
from util.flops import Meter, peak_memory, readable
from util.metrics_file import MetricsFile

ABOUT = "run/about"  # TensorBoard's text of how a run was begun or gone on with


@dataclass(frozen=True)
class StepResult:
    """One optimizer step, on this process; 0-d tensors on the device.

    loss: this process's part of the global batch's mean. grad_norm: before clipping, of all.
    skipped: bool, the same on all. waited: seconds for data.
    """

    loss: Tensor
    grad_norm: Tensor
    skipped: Tensor
    waited: float


class TrainingLog:
    """images: samples of one global step. total_steps, steps_per_epoch: of the whole run.

    count_skipped: how many unreadable images this process has passed over so far.
    meter: what an image costs, and the device.
    first_step: what TensorBoard knows of later steps is of a run that was killed, and is hidden.
    about: environment, flags and so on as plain values, noted once.
    """

    def __init__(
        self,
        folder: str,
        every: int,
        images: int,
        total_steps: int,
        steps_per_epoch: int,
        count_skipped: Callable[[], int],
        meter: Meter,
        first_step: int = 0,
        about: dict | None = None,
        metrics_file: MetricsFile | None = None,
    ):
        self.every, self.images = every, images
        self.total_steps, self.steps_per_epoch = total_steps, steps_per_epoch
        self.count_skipped, self.meter = count_skipped, meter
        self.folder, self.first_step, self.about = folder, first_step, about
        self.metrics_file = metrics_file
        self.restart()

    @cached_property
    def writer(self):
        """TensorBoard's on the main process, None elsewhere.

        Made when there is something to write: a run that stops at its first image leaves no folder.
        """
        if not dist.is_main():
            return None
        from torch.utils.tensorboard import SummaryWriter  # slow to import

        writer = SummaryWriter(self.folder, purge_step=self.first_step + 1)
        if self.about is not None:
            text = json.dumps(self.about, indent=1, default=str)
            # Indented, it is a block of code for TensorBoard and still JSON.
            writer.add_text(ABOUT, textwrap.indent(text, "    "), self.first_step)
        return writer

    def restart(self) -> None:
        """Begin counting steps and time anew."""
        self.sums: Tensor | None = None
        self.steps, self.waited = 0, 0.0
        self.started = time.perf_counter()

    def step(self, step: int, lr: float, result: StepResult) -> None:
        """Count one step, and write at every multiple of `every`."""
        values = torch.stack([result.loss, result.grad_norm]).float()
        # A skipped step has no loss; what was not finite must not spoil the mean of the others.
        values = torch.where(result.skipped, 0.0, values)
        values = torch.cat([values, (~result.skipped).float()[None]])
        self.sums = values if self.sums is None else self.sums + values
        self.steps += 1
        self.waited += result.waited
        if (step + 1) % self.every == 0:
            self.flush(step, lr)

    def flush(self, step: int, lr: float) -> None:
        """Write what was counted since the last time."""
        if self.steps == 0:
            return
        extra = self.sums.new_tensor([self.waited, self.count_skipped()])
        sums = dist.all_reduce_sum(torch.cat([self.sums, extra]))
        loss, grad_norm, taken, waited, unreadable = sums.tolist()
        memory = self.sums.new_tensor([peak_memory(self.meter.device)])
        memory = dist.all_reduce_max(memory).item()
        elapsed = time.perf_counter() - self.started
        processes = dist.world_size()
        taken /= processes  # the same steps on all processes
        scalars = {
            "train/lr": lr,
            "speed/images_per_second": self.images * self.steps / elapsed,
            "speed/data_wait_percent": 100 * waited / processes / elapsed,
        }
        scalars |= self.meter.figures(scalars["speed/images_per_second"], processes, memory)
        if taken:
            scalars["train/loss"] = loss / taken
            scalars["train/grad_norm"] = grad_norm / taken / processes
        if taken < self.steps:
            scalars["train/skipped_steps"] = self.steps - taken
        if unreadable:
            scalars["data/skipped_images"] = unreadable
        if self.writer is not None:
            self.scalars(scalars, step + 1)
            self.writer.flush()
            print(self._line(step, scalars, elapsed / self.steps), flush=True)
        self.restart()

    def _line(self, step: int, scalars: dict[str, float], seconds_per_step: float) -> str:
        done = step + 1
        seconds = round((self.total_steps - done) * seconds_per_step)
        left = timedelta(seconds=seconds) if seconds < 86400 else f"{seconds / 3600:.0f} h"
        work = readable(scalars["speed/tflops_per_device"] * 1e12, "FLOP/s")
        if "speed/percent_of_peak" in scalars:
            work += f" ({scalars['speed/percent_of_peak']:.0f} %)"
        speed = scalars["speed/images_per_second"]
        notes = {"train/skipped_steps": "skipped steps", "data/skipped_images": "skipped images"}
        return (
            f"epoch {done / self.steps_per_epoch:.2f}  step {done}/{self.total_steps}  "
            f"loss {scalars.get('train/loss', math.nan):.4f}  lr {scalars['train/lr']:.2e}  "
            f"grad {scalars.get('train/grad_norm', math.nan):.2f}  "
            f"{speed:.{0 if speed >= 100 else 1}f} images/s  {work}  "
            f"{scalars['speed/memory_gib']:.1f} GiB  "
            f"data wait {scalars['speed/data_wait_percent']:.0f} %  left {left}"
            + "".join(f"  {text} {scalars[n]:.0f}" for n, text in notes.items() if n in scalars)
        )

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Write figures, such as those of an evaluation, to TensorBoard and --metrics_file."""
        if self.writer is not None:
            for name, value in values.items():
                self.writer.add_scalar(name, value, step)
        if self.metrics_file is not None:
            self.metrics_file.write(values, step)

    def image(self, name: str, image: Tensor, step: int) -> None:
        """image: uint8 [3, H, W]."""
        if self.writer is not None:
            self.writer.add_image(name, image, step)

    def histogram(self, name: str, counts: Tensor, step: int) -> None:
        """counts: [K] whole numbers, how often 0, 1, ..., K - 1 came up."""
        if self.writer is None:
            return
        values = torch.arange(len(counts), dtype=torch.float64)
        seen, counts = values[counts > 0], counts.double()
        self.writer.add_histogram_raw(
            name,
            min=seen.min().item(),
            max=seen.max().item(),
            num=counts.sum().item(),
            sum=(values * counts).sum().item(),
            sum_squares=(values**2 * counts).sum().item(),
            bucket_limits=(values + 0.5).tolist(),
            bucket_counts=counts.tolist(),
            global_step=step,
        )

    def text(self, name: str, text: str, step: int) -> None:
        if self.writer is not None:
            self.writer.add_text(name, text, step)

    def close(self) -> None:
        if self.__dict__.get("writer") is not None:  # asking for it would make its folder
            self.writer.close()
