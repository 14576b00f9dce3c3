"""What a training step is made of, with which step a run begins, and what the loop works with.

The unit is the micro-batch of --batch_size samples. What is in it and all that is random about it
depends on (seed, step, its number in the global batch) alone, so processes may come and go: the
same global batch, shared by others, is the same training.
"""

import argparse
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from models.tokenbridge import TokenBridge
from models.tokenizers.tokenizer import Tokenizer
from util.agreement import Agreement
from util.checkpoint import Checkpoint
from util.data.images import steps_per_epoch
from util.device import Precision
from util.ema import EMA
from util.errors import UserError
from util.evaluation.metrics import Measure
from util.evaluation.settings import EvalSettings
from util.optim import LRSchedule


@dataclass(frozen=True)
class Schedule:
    """Two runs with equal schedules see the same samples at the same steps.

    batch_size: samples of a micro-batch. micro_batches: of a step. images: of the training set.
    """

    batch_size: int
    micro_batches: int
    images: int
    seed: int

    @property
    def global_batch(self) -> int:
        return self.batch_size * self.micro_batches

    @property
    def steps_per_epoch(self) -> int:
        return steps_per_epoch(self.images, self.batch_size, self.micro_batches)

    def to_dict(self) -> dict:
        return asdict(self)


@dataclass(frozen=True)
class Plan:
    schedule: Schedule
    first_step: int
    note: str | None = None  # what the user should know of how this run goes on


@dataclass(frozen=True)
class TrainSettings:
    """What the loop needs to know beside its objects. Epochs and steps count from 0."""

    plan: Plan
    epochs: int
    grad_clip: float
    max_skipped: int
    cached: bool
    eval_freq: int
    output_dir: Path
    extras: dict  # plain values that every checkpoint carries
    evaluation: EvalSettings | None = None  # given: evaluate while training

    @property
    def last_step(self) -> int:
        return self.epochs * self.plan.schedule.steps_per_epoch


@dataclass(frozen=True)
class Run:
    """The objects of a training run."""

    model: TokenBridge
    ema: EMA
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    agreement: Agreement
    tokenizer: Tokenizer
    device: torch.device
    precision: Precision
    inception: Measure | None = None  # of the evaluation while training


def make_plan(
    args: argparse.Namespace, checkpoint: Checkpoint | None, images: int, processes: int
) -> Plan:
    """The schedule of the flags, or of the checkpoint where they do not say.

    Raises UserError if the processes cannot share the global batch.
    """
    saved = saved_schedule(checkpoint)
    known = {} if saved is None else saved.to_dict()
    batch_size, seed = (
        known[name] if name in known and name not in args.explicit else getattr(args, name)
        for name in ("batch_size", "seed")
    )
    earlier = known.get("micro_batches") if batch_size == known.get("batch_size") else None
    micro_batches = count_micro_batches(args, batch_size, earlier, processes)
    schedule = Schedule(batch_size, micro_batches, images, seed)
    if checkpoint is None or "optimizer" not in checkpoint.saved:
        return Plan(schedule, args.start_epoch * schedule.steps_per_epoch)
    if saved is None:
        epochs = checkpoint.whole_number("epoch") + 1
        return Plan(schedule, epochs * schedule.steps_per_epoch)
    step = checkpoint.whole_number("step")
    if schedule == saved:
        return Plan(schedule, step)
    return Plan(
        schedule,
        step * schedule.steps_per_epoch // saved.steps_per_epoch,
        f"other than when {checkpoint.path} was saved: {differences(schedule, saved)}; going on "
        f"at the same epoch, {step / saved.steps_per_epoch:.2f}, as another run",
    )


def saved_schedule(checkpoint: Checkpoint | None) -> Schedule | None:
    """What a checkpoint says; None for those of the published code, which do not."""
    if checkpoint is None or "schedule" not in checkpoint.saved:
        return None
    values = checkpoint.saved["schedule"]
    names = ("batch_size", "micro_batches", "images", "seed")
    if not isinstance(values, dict) or any(type(values.get(name)) is not int for name in names):
        raise UserError(f"--resume {checkpoint.path}: 'schedule' is {values!r}, not whole numbers")
    return Schedule(**{name: values[name] for name in names})


# Flags of which the learning rate is made, but for those of the batch, which `differences` tells.
OF_THE_RATE = ("epochs", "warmup_epochs", "lr", "blr", "min_lr", "lr_schedule")


def rate_remarks(
    args: argparse.Namespace, rate: LRSchedule, plan: Plan, checkpoint: Checkpoint | None
) -> list[str]:
    """Warnings of a learning rate that never gets high, or that jumps where a run goes on."""
    remarks, step, last = [], plan.first_step - 1, rate.epochs * rate.steps_per_epoch - 1
    if step >= last:
        return []
    if rate.warmup_epochs >= rate.epochs:
        reached = f"{rate(last):.3g} of {rate.lr:.3g}"
        remarks.append(
            f"warning: --warmup_epochs {rate.warmup_epochs:g} does not end before --epochs "
            f"{rate.epochs}: the learning rate reaches {reached}; --warmup_epochs "
            f"{rate.epochs / 4:g} would be a quarter of the run, as published"
        )
    before = checkpoint.last_rate() if checkpoint is not None else None
    if before is not None and step >= 0 and not math.isclose(rate(step), before, rel_tol=0.01):
        remarks.append(
            f"warning: the learning rate of step {step + 1} was {before:.3g} when "
            f"{checkpoint.path} was saved, and is {rate(step):.3g} with these flags"
            f"{other_flags(args, checkpoint)}"
        )
    return remarks


def other_flags(args: argparse.Namespace, checkpoint: Checkpoint) -> str:
    known = {name: checkpoint.argument(name) for name in OF_THE_RATE}
    if known["epochs"] is None:  # a file of the published code
        return ""
    now = {name: getattr(args, name) for name in OF_THE_RATE}
    changed = [name for name in OF_THE_RATE if known[name] != now[name]]
    return "".join(f", --{name} {told(now[name])} (was {told(known[name])})" for name in changed)


def told(value) -> str:
    return "not given" if value is None else str(value)


def differences(schedule: Schedule, saved: Schedule) -> str:
    found, before = schedule.to_dict(), saved.to_dict()
    changed = (name for name in found if found[name] != before[name])
    return ", ".join(f"{name} {found[name]} (was {before[name]})" for name in changed)


def count_micro_batches(
    args: argparse.Namespace, batch_size: int, earlier: int | None, processes: int
) -> int:
    """Micro-batches a step: of --global_batch, of --accum_iter, or as earlier in this run."""
    if args.global_batch is not None:
        if args.global_batch % batch_size:
            raise UserError(
                f"--global_batch {args.global_batch} is not a multiple of --batch_size {batch_size}"
            )
        micro_batches = args.global_batch // batch_size
        if "accum_iter" in args.explicit and args.accum_iter * processes != micro_batches:
            raise UserError(
                f"--global_batch {args.global_batch} is not --batch_size {batch_size} x "
                f"--accum_iter {args.accum_iter} x {processes} processes; leave --accum_iter out"
            )
    elif earlier is not None and "accum_iter" not in args.explicit:
        micro_batches = earlier
    else:
        micro_batches = args.accum_iter * processes
    if processes > micro_batches:
        raise UserError(
            f"{processes} processes cannot share the {micro_batches} micro-batches of --batch_size "
            f"{batch_size} in a step; start fewer, lower --batch_size, or raise --global_batch"
        )
    return micro_batches
