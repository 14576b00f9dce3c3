"""What a step of training is made of, and in which order its samples come.

G micro-batches make the global batch of one step, and what one of them holds depends on (seed,
step, its number j), never on the number of processes that share the work, which may come and go.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache, partial

import numpy as np
from torch.utils.data import Sampler

from util.data.images import Key
from util.errors import UserError


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

    def to_dict(self) -> dict:
        return asdict(self)


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
