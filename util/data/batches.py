"""What a step of training is made of, with which a run begins, and the order of its samples.

G micro-batches make the global batch of one step, and what one of them holds depends on (seed,
step, its number j), never on the number of processes that share the work, which may come and go.
"""

import argparse
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from functools import lru_cache, partial
from operator import index

import numpy as np
from torch.utils.data import Sampler

from util import dist
from util.args import value
from util.checkpoint import Checkpoint
from util.data.images import Key
from util.errors import UserError, as_user_error


@dataclass(frozen=True)
class Batches:
    """Two runs with equal batches see the same samples at the same steps."""

    batch_size: int  # of a micro-batch
    micro_batches: int  # of a step
    images: int  # of the training set
    seed: int

    @property
    def global_batch(self) -> int:
        return self.batch_size * self.micro_batches

    @property
    def steps_per_epoch(self) -> int:
        """Whole global batches in an epoch. Raises UserError if there is none."""
        if self.images < self.global_batch:
            batch = f"{self.global_batch} (--batch_size {self.batch_size} x {self.micro_batches})"
            raise UserError(f"{self.images} samples do not fill a global batch of {batch}")
        return self.images // self.global_batch


def plan_batches(
    args: argparse.Namespace, checkpoint: Checkpoint, images: int
) -> tuple[Batches, int, list[str]]:
    """The batches of the flags, or of the checkpoint where they do not say; the first step; notes.

    Raises UserError if the processes cannot share the global batch.
    """
    saved = None  # of the published code, which does not say
    if "schedule" in checkpoint.saved:
        with as_user_error(f"{checkpoint.named}, 'schedule'", (TypeError, KeyError)):
            said = checkpoint.saved["schedule"]
            saved = Batches(*(index(said[field.name]) for field in fields(Batches)))
    batch_size, seed = (
        getattr(saved, name) if saved and getattr(args, name) is None else value(args, name)
        for name in ("batch_size", "seed")
    )
    earlier = saved.micro_batches if saved and saved.batch_size == batch_size else None
    batches = Batches(batch_size, _micro_batches(args, batch_size, earlier), images, seed)
    if "optimizer" not in checkpoint.saved:
        return batches, args.start_epoch * batches.steps_per_epoch, []
    if saved is None:
        return batches, (checkpoint.whole_number("epoch") + 1) * batches.steps_per_epoch, []
    step = checkpoint.whole_number("step")
    if batches == saved:
        return batches, step, []
    was, now = asdict(saved), asdict(batches)
    changes = ", ".join(f"{n} {now[n]} (was {was[n]})" for n in now if now[n] != was[n])
    note = f"note: going on at the same epoch, {step / saved.steps_per_epoch:.2f}, with {changes}"
    first = step * batches.steps_per_epoch // saved.steps_per_epoch
    if args.posthoc_ema and first != step:
        remedy = f"keep {saved.global_batch} samples a step, or leave it out"
        raise UserError(f"--posthoc_ema counts steps, and step {step} would be {first}: {remedy}")
    return batches, first, [note]


def _micro_batches(args: argparse.Namespace, batch_size: int, earlier: int | None) -> int:
    """Micro-batches a step: of --global_batch, of --accum_iter, or as earlier in this run."""
    processes, asked = dist.world_size(), args.global_batch
    micro_batches = value(args, "accum_iter") * processes
    if asked is not None:
        if asked % batch_size or (args.accum_iter and micro_batches * batch_size != asked):
            raise UserError(
                f"--global_batch {asked} is not a multiple of --batch_size {batch_size}, or not "
                f"{processes} processes x --accum_iter times it; leave --accum_iter out"
            )
        micro_batches = asked // batch_size
    elif earlier is not None and args.accum_iter is None:
        micro_batches = earlier
    if processes > micro_batches:
        raise UserError(
            f"{processes} processes cannot share the {micro_batches} micro-batches of --batch_size "
            f"{batch_size} in a step; start fewer, lower --batch_size, or raise --global_batch"
        )
    return micro_batches


def epoch_keys(num_samples: int, seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """An epoch's order int64 [N] and flips bool [N] at each position, from (seed, epoch) alone."""
    # Raw Philox words: numpy promises that these stay as they are in later releases.
    words = np.random.Philox(key=np.array([seed % 2**64, epoch], dtype=np.uint64))
    order = np.argsort(words.random_raw(num_samples), kind="stable")
    flips = (words.random_raw(num_samples) & np.uint64(1)).astype(bool)
    return order, flips


class MicroBatchSampler(Sampler[list[Key]]):
    """This process's micro-batches of some steps, as lists of keys.

    With S steps an epoch, B samples a micro-batch and G micro-batches a step, micro-batch j of step
    s is the B positions from ((s % S) * G + j) * B on in the order of epoch s // S. Process r of W
    has j = r, r + W, ... < G. flip: whether half of the samples are mirrored.
    Raises UserError if one global batch exceeds the samples.
    """

    def __init__(
        self, batches: Batches, steps: range, rank: int, world_size: int, flip: bool = True
    ):
        self.batches, self.steps, self.flip = batches, steps, flip
        self.steps_per_epoch = batches.steps_per_epoch
        self.own = range(rank, batches.micro_batches, world_size)
        self.epoch_keys = lru_cache(maxsize=1)(partial(epoch_keys, batches.images, batches.seed))

    def __len__(self) -> int:
        return len(self.steps) * len(self.own)

    def __iter__(self) -> Iterator[list[Key]]:
        return (self.keys(step, j) for step in self.steps for j in self.own)

    def keys(self, step: int, j: int) -> list[Key]:
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        order, flips = self.epoch_keys(epoch)
        size = self.batches.batch_size
        start = (step_in_epoch * self.batches.micro_batches + j) * size
        chosen = slice(start, start + size)
        flips = (flips[chosen] & self.flip).tolist()
        return list(zip(order[chosen].tolist(), flips, strict=True))
