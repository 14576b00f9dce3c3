"""AdamW's groups, the learning-rate schedule, and what is random about a micro-batch."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

BETAS = (0.9, 0.95)
BLR_BATCH = 256  # the global batch that a base learning rate stands for


def build_optimizer(
    named_parameters: Iterable[tuple[str, nn.Parameter]], lr: float, weight_decay: float
) -> torch.optim.AdamW:
    """AdamW; no weight decay on 1-D tensors and biases.

    With the parameters in the published order, the state's numbering is the published one too.
    """
    decayed, plain = [], []
    for name, parameter in named_parameters:
        (plain if parameter.ndim == 1 or name.endswith(".bias") else decayed).append(parameter)
    groups = [
        {"params": plain, "weight_decay": 0.0},
        {"params": decayed, "weight_decay": weight_decay},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=BETAS, fused=True)


@dataclass(frozen=True)
class LRSchedule:
    """Linear from 0 over the warm-up, then half-cosine to min_lr (or constant), set every step."""

    lr: float
    min_lr: float
    warmup_epochs: float
    epochs: int
    steps_per_epoch: int
    kind: str = "cosine"

    def __call__(self, step: int) -> float:
        epoch = step / self.steps_per_epoch
        if epoch < self.warmup_epochs:
            return self.lr * epoch / self.warmup_epochs
        if self.kind == "constant":
            return self.lr
        progress = (epoch - self.warmup_epochs) / max(self.epochs - self.warmup_epochs, 1e-12)
        return self.min_lr + (self.lr - self.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def guarded_step(optimizer: torch.optim.AdamW, skipped: Tensor) -> None:
    """optimizer.step() that changes nothing where skipped, a 0-d float on the device, is 1.

    The fused kernels read it themselves, as they do for a gradient scaler, so nobody waits.
    """
    optimizer.grad_scale, optimizer.found_inf = None, skipped
    try:
        optimizer.step()
    finally:
        del optimizer.grad_scale, optimizer.found_inf


def seed_micro_batch(seed: int, step: int, micro_batch: int) -> None:
    """Make all that is random about a micro-batch a function of these three numbers.

    micro_batch: its number in the global batch, whichever process has it. Posterior noise, mask
    ratio, orders, class dropout and dropout are then the same on any number of processes and
    after any restart, without a random state in the checkpoint.
    """
    state = np.random.SeedSequence([seed, step, micro_batch]).generate_state(1, np.uint64)
    torch.manual_seed(int(state[0] >> 1))
