"""Saving checkpoints while training goes on: copied to host memory, written in the background.

OUTPUT/checkpoint-step00001200.pth   the last --keep_checkpoints of these stay
OUTPUT/checkpoint-epoch0040.pth      milestones (--save_every), never removed
OUTPUT/checkpoint-last.pth           the newest; another name of the same file
OUTPUT/posthoc_ema/step00001200.pth  the tracks of util.posthoc_ema (--posthoc_ema), never removed
"""

import math
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_with_path

from util import dist
from util.checkpoint import LAST, SNAPSHOTS, STEP_FILES, give_name
from util.errors import UserError
from util.files import atomic_write
from util.optim import SIGMA

EXIT_GRACE = 20.0  # seconds that a process which must end gives a checkpoint being written


class CarefulFile:
    """A file whose failure to write is its `error`: torch.save would end the process."""

    def __init__(self, file: BinaryIO):
        self.file, self.error, self.flush = file, None, file.flush

    def write(self, data) -> int:
        try:
            if self.error is None:
                self.file.write(data)
        except OSError as error:
            self.error = error
        return len(data)


@dataclass
class CheckpointSaver:
    """When a checkpoint is due (0: never), and how many stay.

    A failure to write is reported, training goes on, and what was saved before stays.
    """

    folder: Path
    steps_per_epoch: int
    saved_step: int  # the newest that was handed over, or the run began with
    last_freq: int = 5  # epochs
    milestones: int = 0  # epochs
    snapshots: int = 0  # epochs
    steps: int = 0
    minutes: float = 0.0
    keep: int = 2

    def __post_init__(self):
        self.buffers: dict[tuple, Tensor] = {}  # in host memory, by place, shape and type
        self.writing = threading.Thread()
        self.failure: str | None = None
        self.saved_at = time.monotonic()
        dist.before_exit(lambda: self.wait(EXIT_GRACE))

    def ends_epoch(self, step: int) -> bool:
        """Whether an epoch ends there after which to save, on all processes alike."""
        often = self.last_freq, self.milestones, self.snapshots
        return any(epochs and step % (epochs * self.steps_per_epoch) == 0 for epochs in often)

    def due(self, step: int) -> bool:
        """Whether to save after so many steps. Of steps and minutes, which wait for a file that is
        being written, the main process decides.
        """
        if self.ends_epoch(step):
            return True
        if not dist.is_main() or self.writing.is_alive():
            return False
        late = self.minutes and time.monotonic() - self.saved_at > 60 * self.minutes
        return bool(late or (self.steps and step - self.saved_step >= self.steps))

    def save(self, step: int, state: Callable[[], dict]) -> None:
        """state: makes the dict to save; its tensors are copied before this returns."""
        if not dist.is_main() or step == self.saved_step:
            return
        self.wait()
        began = time.monotonic()
        copied = tree_map_with_path(self._copy, state())
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # all copies at once
        self.saved_step, self.saved_at = step, time.monotonic()
        arguments = (step, copied, self.saved_at - began)
        self.writing = threading.Thread(target=self._write, args=arguments)
        self.writing.start()

    def _copy(self, path: tuple, value):
        if not isinstance(value, Tensor):
            return value
        key = (path, value.shape, value.dtype)
        if key not in self.buffers:
            self.buffers[key] = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)
        return self.buffers[key].copy_(value.detach(), non_blocking=value.is_cuda)

    def _write(self, step: int, state: dict, stalled: float) -> None:
        path = self.folder / f"checkpoint-step{step:08d}.pth"
        began = time.monotonic()
        try:
            if broken := [name for name, t in state["model"].items() if not t.isfinite().all()]:
                raise ValueError(f"the weights are not finite any more ({broken[0]})")
            epoch, inside = divmod(step, self.steps_per_epoch)
            if (often := self.snapshots) and not inside and epoch % often == 0:
                # First, so that a checkpoint has all snapshots before it.
                tracks = {k: v for k, v in state["averages"].items() if k.startswith(SIGMA)}
                snapshot = path.parent / SNAPSHOTS / f"step{step:08d}.pth"
                write_checkpoint(snapshot, {"step": step, "averages": tracks})
            write_checkpoint(path, state)
            give_name(path, self.folder / LAST)
            if self.milestones and not inside and epoch % self.milestones == 0:
                give_name(path, self.folder / f"checkpoint-epoch{epoch:04d}.pth")
            self._remove_old(path)
        except Exception as error:  # nobody else would hear of it, and training need not end
            self.failure = f"checkpoint of step {step} was not saved: {error}"
            print(f"{self.failure}; training goes on", file=sys.stderr, flush=True)
            return
        self.failure = None
        seconds = f"{stalled:.2f} s, written in {time.monotonic() - began:.2f} s"
        print(f"saved {path.name} (training waited {seconds})", flush=True)

    def _remove_old(self, newest: Path) -> None:
        files = sorted(newest.parent.glob(STEP_FILES))
        own = files.index(newest) + 1
        # With a larger global batch a run goes on at a smaller step: files of later steps would be
        # taken for newer ones, at every restart.
        later = (newest.parent / SNAPSHOTS).glob("step*.pth") if self.snapshots else ()
        later = [path for path in later if path.stem > newest.stem.removeprefix("checkpoint-")]
        for path in (*files[own:], *files[: max(0, own - self.keep)], *later):
            path.unlink()

    def wait(self, timeout: float = math.inf) -> None:
        """Until the file that is being written is on the disk, or for so many seconds."""
        deadline = time.monotonic() + timeout
        while self.writing.is_alive() and time.monotonic() < deadline:
            self.writing.join(1.0)
            if timeout == math.inf:
                dist.beat("writing a checkpoint")

    def close(self) -> None:
        """Raises UserError if the newest checkpoint could not be written."""
        self.wait()
        if self.failure:
            raise UserError(f"{self.failure}; what was saved before is whole: --resume auto")


def write_checkpoint(path: Path, state: dict) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(".checkpoint-*.tmp"):  # by killed processes
        left.unlink()
    with atomic_write(path) as file:
        careful = CarefulFile(file)
        torch.save(state, careful)
        if careful.error is not None:
            raise careful.error
