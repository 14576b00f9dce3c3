"""What all processes must know of a training step, without making the GPU wait for it.

Two facts travel in one small all-reduce: whether a process was asked to stop, and whether one met
numbers that are not finite. The second decides on the device whether the step is skipped, on all
processes alike. What the host must know of both (when to save and end, when too many steps in a
row were skipped) is read a step late on a GPU, by then without waiting; every process reads the
same values after the same step.
"""

from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor

from util import dist, stop


@dataclass(frozen=True)
class Status:
    """stop: a process was asked to. skipped: steps in all. in_a_row: of these, the latest."""

    stop: bool = False
    skipped: int = 0
    in_a_row: int = 0


class Agreement:
    """For each step `vote`, then `conclude`. skipped: steps that were skipped before this run."""

    def __init__(self, device: torch.device, skipped: int = 0):
        self.device = device
        self.lag = 1 if device.type == "cuda" else 0
        self.counts = torch.tensor([skipped, 0], device=device)
        self.votes = torch.zeros(2, device=device)
        self.unread: deque[tuple[Tensor, torch.cuda.Event | None]] = deque()

    def vote(self, finite: Tensor) -> Tensor:
        """finite: 0-d bool, of this process -> whether any has met numbers that are not."""
        asked = torch.full((), float(stop.requested()), device=self.device)
        self.votes = dist.all_reduce_max(torch.stack([asked, (~finite).float()]))
        return self.votes[1] > 0

    def conclude(self, skipped: Tensor) -> Status:
        """skipped: 0-d bool, the same on all processes -> the status, `lag` steps old."""
        self.counts = torch.stack([self.counts[0] + skipped, (self.counts[1] + 1) * skipped])
        values = torch.cat([self.votes[:1].long(), self.counts])
        on_gpu = self.device.type == "cuda"
        host = torch.empty(3, dtype=torch.int64, pin_memory=on_gpu)
        host.copy_(values, non_blocking=on_gpu)
        copied = torch.cuda.Event() if on_gpu else None
        if copied is not None:
            copied.record()
        self.unread.append((host, copied))
        if len(self.unread) <= self.lag:
            return Status()
        host, copied = self.unread.popleft()
        if copied is not None:
            copied.synchronize()
        asked, total, in_a_row = host.tolist()
        return Status(bool(asked), total, in_a_row)

    def skipped(self) -> int:
        """Steps skipped so far; waits for the device."""
        return int(self.counts[0])
