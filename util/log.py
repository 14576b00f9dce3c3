"""The training log: TensorBoard scalars and a progress line, at the cost of one wait every N steps.

Statistics are summed on the device; every `every` steps they are summed over the processes, read
once, and written by the main process.
"""

import math
import time
from collections.abc import Callable
from datetime import timedelta
from functools import cached_property

import torch
from torch import Tensor

from util import dist
from util.errors import UserError


class TrainingLog:
    """images: samples of one global step. total_steps, steps_per_epoch: of the whole run.

    count_skipped: how many unreadable images this process has passed over so far.
    """

    def __init__(
        self,
        folder: str,
        every: int,
        images: int,
        total_steps: int,
        steps_per_epoch: int,
        count_skipped: Callable[[], int],
    ):
        self.every, self.images = every, images
        self.total_steps, self.steps_per_epoch = total_steps, steps_per_epoch
        self.count_skipped = count_skipped
        self.folder = folder
        self.restart()

    @cached_property
    def writer(self):
        """TensorBoard's on the main process, None elsewhere.

        Made when there is something to write: a run that stops at its first image leaves no folder.
        """
        if not dist.is_main():
            return None
        from torch.utils.tensorboard import SummaryWriter  # slow to import

        return SummaryWriter(self.folder)

    def restart(self) -> None:
        """Begin counting steps and time anew."""
        self.sums: Tensor | None = None
        self.steps, self.waited = 0, 0.0
        self.started = time.perf_counter()

    def step(self, step: int, lr: float, loss: Tensor, grad_norm: Tensor, waited: float) -> None:
        """Count one step. loss, grad_norm: 0-d on the device. waited: seconds spent on data."""
        values = torch.stack([loss.detach().float(), grad_norm.detach().float()])
        self.sums = values if self.sums is None else self.sums + values
        self.steps += 1
        self.waited += waited
        if self.steps == self.every:
            self.flush(step, lr)

    def flush(self, step: int, lr: float) -> None:
        """Write what was counted since the last time.

        Raises UserError if a loss or a gradient was not finite.
        """
        if self.steps == 0:
            return
        extra = self.sums.new_tensor([self.waited, self.count_skipped()])
        sums = dist.all_reduce_sum(torch.cat([self.sums, extra]))
        loss, grad_norm, waited, skipped = sums.tolist()
        elapsed = time.perf_counter() - self.started
        steps, processes = self.steps, dist.world_size()
        scalars = {
            "train/loss": loss / steps / processes,
            "train/lr": lr,
            "train/grad_norm": grad_norm / steps / processes,
            "speed/images_per_second": self.images * steps / elapsed,
            "speed/data_wait_percent": 100 * waited / processes / elapsed,
        }
        if skipped:
            scalars["data/skipped_images"] = skipped
        if self.writer is not None:
            for name, value in scalars.items():
                self.writer.add_scalar(name, value, step + 1)
            self.writer.flush()
            print(self._line(step, scalars, elapsed / steps), flush=True)
        self._check_finite(scalars, step)
        self.restart()

    def _check_finite(self, scalars: dict[str, float], step: int) -> None:
        loss, grad_norm = scalars["train/loss"], scalars["train/grad_norm"]
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            raise UserError(
                f"the loss is {loss} and the gradient norm {grad_norm} between steps "
                f"{step + 2 - self.steps} and {step + 1}; the last checkpoint is from before: "
                "resume it with a lower --blr or another --precision"
            )

    def _line(self, step: int, scalars: dict[str, float], seconds_per_step: float) -> str:
        done = step + 1
        left = timedelta(seconds=round((self.total_steps - done) * seconds_per_step))
        skipped = scalars.get("data/skipped_images")
        return (
            f"epoch {done / self.steps_per_epoch:.2f}  step {done}/{self.total_steps}  "
            f"loss {scalars['train/loss']:.4f}  lr {scalars['train/lr']:.2e}  "
            f"grad {scalars['train/grad_norm']:.2f}  "
            f"{scalars['speed/images_per_second']:.1f} images/s  "
            f"data wait {scalars['speed/data_wait_percent']:.0f} %  left {left}"
            + (f"  skipped {skipped:.0f} images" if skipped else "")
        )

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Write further figures, such as those of an evaluation."""
        if self.writer is not None:
            for name, value in values.items():
                self.writer.add_scalar(name, value, step)

    def image(self, name: str, image: Tensor, step: int) -> None:
        """image: uint8 [3, H, W]."""
        if self.writer is not None:
            self.writer.add_image(name, image, step)

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()
