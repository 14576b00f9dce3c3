"""AdamW's groups, the learning-rate schedule, the weights' averages, and a micro-batch's seed."""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from models.tokenizers.kl16 import check_layout

BETAS = (0.9, 0.95)
BLR_BATCH = 256  # the global batch that a base learning rate stands for
WIDTHS = (0.05, 0.10)  # of the two tracks from which `util.posthoc_ema` makes any other
AT_ONCE = 64  # tensors averaged together on a GPU: a few launches, little more memory
SIGMA = "sigma"  # before the width, in the name of such an average


def build_optimizer(
    named_parameters: Iterable[tuple[str, nn.Parameter]], lr: float, weight_decay: float
) -> torch.optim.AdamW:
    """AdamW; no weight decay on 1-D tensors, biases, and MAR's diffusion network, as published.

    With the parameters in the published order, the state's numbering is the published one too.
    """
    decayed, plain = [], []
    for name, parameter in named_parameters:
        undecayed = parameter.ndim == 1 or name.endswith(".bias") or name.startswith("diffloss.")
        (plain if undecayed else decayed).append(parameter)
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


def load_moments(optimizer: torch.optim.Optimizer, saved: dict) -> None:
    """Load AdamW's moments and step counts; its settings stay those of this run's flags.

    Raises ValueError unless they are of the same parameters in the same groups.
    """
    groups = optimizer.state_dict()["param_groups"]
    numbers = [group["params"] for group in groups]
    if [group["params"] for group in saved["param_groups"]] != numbers:
        raise ValueError("its groups of parameters are those of another model")
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for number, state in saved["state"].items():
        shapes = {tuple(state[name].shape) for name in ("exp_avg", "exp_avg_sq")}
        if shapes != {tuple(parameters[number].shape)}:
            raise ValueError(f"the moments of parameter {number} have shapes {sorted(shapes)}")
    optimizer.load_state_dict({"state": saved["state"], "param_groups": groups})


def seed_micro_batch(seed: int, step: int, micro_batch: int) -> None:
    """Make all that is random about a micro-batch a function of these three numbers.

    micro_batch: its number in the global batch, whichever process has it. Posterior noise, mask
    ratio, orders, class dropout and dropout are then the same on any number of processes and
    after any restart, without a random state in the checkpoint.
    """
    state = np.random.SeedSequence([seed, step, micro_batch]).generate_state(1, np.uint64)
    torch.manual_seed(int(state[0] >> 1))


class EMA:
    """Exponential moving average of parameters: ema <- rate * ema + (1 - rate) * parameter.

    named_parameters: in the published names and order. The average starts at the parameters.
    """

    def __init__(self, named_parameters: Iterable[tuple[str, nn.Parameter]], rate: float):
        named = list(named_parameters)
        self.names = [name for name, _ in named]
        self.parameters = [parameter for _, parameter in named]
        self.rate = rate
        self.averages = [parameter.detach().clone() for parameter in self.parameters]

    def rate_of(self, step: int) -> float:
        return self.rate

    @torch.no_grad()
    def update(self, skipped: Tensor | float = 0.0, step: int = 1) -> None:
        """step: from 1. skipped: 1 where it was and nothing changes; 0-d, so that nobody waits."""
        weight = (1 - self.rate_of(step)) * (1 - skipped)
        if self.averages[0].device.type == "cpu":
            for average, parameter in zip(self.averages, self.parameters, strict=True):
                average.lerp_(parameter, weight)  # one pass over both
        else:
            self.change(weight)

    def change(self, weight: Tensor | float) -> None:
        """As lerp_, by a twentieth of the launches; no foreach kernel reads a weight by itself."""
        for start in range(0, len(self.averages), AT_ONCE):
            averages = self.averages[start : start + AT_ONCE]
            change = torch._foreach_sub(self.parameters[start : start + AT_ONCE], averages)
            torch._foreach_mul_(change, weight)
            torch._foreach_add_(averages, change)

    def state_dict(self) -> dict[str, Tensor]:
        return dict(zip(self.names, self.averages, strict=True))

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """state: every parameter's average by its published name. Raises ValueError on another."""
        check_layout(state, self.state_dict())
        for name, average in zip(self.names, self.averages, strict=True):
            average.copy_(state[name])

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """The model holds the averages for a while; storage is exchanged, nothing is copied."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for i, parameter in enumerate(self.parameters):
            self.averages[i], parameter.data = parameter.data, self.averages[i]


class PowerEMA(EMA):
    """The average in which step t has a weight proportional to t^gamma: EDM2's.

    sigma: its width, the deviation of t relative to the steps made so far.
    Source: Karras et al., arXiv 2312.02696, section 3.1; gamma of sigma: appendix C.
    """

    def __init__(self, named_parameters: Iterable[tuple[str, nn.Parameter]], sigma: float):
        super().__init__(named_parameters, rate=0.0)
        self.gamma = power_of(sigma)

    def rate_of(self, step: int) -> float:
        return (1 - 1 / step) ** (self.gamma + 1)


def power_of(sigma: float) -> float:
    """gamma of a profile of that width: sigma^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3))."""
    inverse = sigma**-2
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())


def build_averages(
    named_parameters: Iterable[tuple[str, nn.Parameter]], rates: Iterable[float], tracks: bool
) -> dict[str, EMA]:
    """By their names in checkpoints, the first being `model_ema`. tracks: of WIDTHS as well."""
    named = list(named_parameters)
    averages = {str(rate): EMA(named, rate) for rate in rates}
    widths = WIDTHS if tracks else ()
    return averages | {f"{SIGMA}{sigma:g}": PowerEMA(named, sigma) for sigma in widths}
