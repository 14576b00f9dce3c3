"""Average a training's weights afterwards, over any part of it: EDM2's post-hoc EMA.

python -m util.posthoc_ema OUTPUT_DIR --sigma 0.08 [0.12 ...]

A training with --posthoc_ema keeps two averages, tracks, and snapshots of them. Every one is a sum
of the weights of all steps, and so is the average of the wanted width: the sum of snapshots that
comes closest to it, in least squares, stands for it. OUTPUT_DIR may also be one checkpoint; then
the average ends at its step. `--resume` takes what is written.
Letters: n snapshots, t steps, gamma exponents, sigma relative widths.
Source: Karras et al., arXiv 2312.02696, section 3 and appendix C (EDM2).
"""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from util import dist
from util.args import Parser, width
from util.checkpoint import SNAPSHOTS, Checkpoint, find_checkpoint, load_checkpoint
from util.errors import UserError
from util.optim import SIGMA, WIDTHS, power_of
from util.saver import write_checkpoint


def profile(step: int, sigma: float, steps: int) -> np.ndarray:
    """[steps] the weights that the average of that width after `step` gives to every step's."""
    ends = (np.arange(steps + 1).clip(max=step) / step) ** (power_of(sigma) + 1)
    return np.diff(ends)


def coefficients(steps: list[int], sigma: float) -> tuple[np.ndarray, float]:
    """Of the snapshots after those steps: [n, 2], one of each of WIDTHS; and how far they are off.

    The average ends at the last step. That distance is relative to the norm of its profile. Other
    than in the paper, products of profiles are sums over steps, not integrals, and coefficients add
    up to one: both matter where snapshots are few.
    """
    last = steps[-1]
    known = np.stack([profile(step, width, last) for step in steps for width in WIDTHS], 1)
    wanted = profile(last, sigma, last)
    # The last coefficient is one less the others.
    others, base = known[:, :-1] - known[:, -1:], known[:, -1]
    found, *_ = np.linalg.lstsq(others, wanted - base, rcond=None)
    found = np.append(found, 1 - found.sum())
    off = np.linalg.norm(known @ found - wanted) / np.linalg.norm(wanted)
    return found.reshape(len(steps), -1), float(off)


class PosthocEMA:
    """The averages of a training, up to a checkpoint. Raises UserError if it has no tracks."""

    def __init__(self, checkpoint: Checkpoint):
        self.checkpoint, step = checkpoint, checkpoint.whole_number("step")
        self.tracks = [f"{SIGMA}{sigma:g}" for sigma in WIDTHS]
        if missing := set(self.tracks) - set(checkpoint.averages):
            lack = f"has no {', '.join(sorted(missing))}"
            raise UserError(f"{checkpoint.named} {lack}: train with --posthoc_ema")
        folder = checkpoint.path.parent / SNAPSHOTS
        files = {int(path.stem.removeprefix("step")): path for path in folder.glob("step*.pth")}
        self.files = [(t, files[t]) for t in sorted(files) if t < step]
        self.steps = [*(t for t, _ in self.files), step]

    def checkpoint_of(self, sigma: float) -> Checkpoint:
        """The checkpoint with the average of that width as its `model_ema`."""
        weights, off = coefficients(self.steps, sigma)
        total = {}
        for snapshot, row in zip(self._snapshots(), weights, strict=True):
            for track, weight in zip(self.tracks, row, strict=True):
                for name, tensor in snapshot.weights(track).items():
                    total[name] = total.get(name, 0) + weight * tensor.double()
        state = {name: tensor.float() for name, tensor in total.items()}
        found = f"width {sigma:g} of {len(self.steps)} snapshots: its profile is {off:.1%} off"
        dist.print_main(f"{found} (more snapshots come closer)")
        return replace(self.checkpoint, saved=self.checkpoint.saved | {"model_ema": state})

    def _snapshots(self) -> Iterator[Checkpoint]:
        """One at a time; the checkpoint itself is the last."""
        for step, path in self.files:
            snapshot = load_checkpoint(path, "--posthoc_ema")
            if (own := snapshot.whole_number("step")) != step:
                raise UserError(f"{path} is of step {own}: give it its name back")
            yield snapshot
        yield self.checkpoint


def make_parser() -> Parser:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("output_dir", help="of a training with --posthoc_ema, or a checkpoint in it")
    add("--sigma", type=width, nargs="+", required=True, help="relative widths")
    return parser


def main() -> None:
    args = make_parser().parse()
    found = find_checkpoint(args.output_dir, "", must_exist=True, flag="OUTPUT_DIR")
    averages = PosthocEMA(found)
    for sigma in args.sigma:
        state, step = averages.checkpoint_of(sigma).weights("model_ema"), averages.steps[-1]
        saved = {k: v for k, v in found.saved.items() if k in ("config", "classes", "vae_sha256")}
        saved |= {"weights": "ema", "average": {"sigma": sigma, "step": step}, "model_ema": state}
        saved["model"] = found.weights("model") | state  # the first has buffers too
        path = found.path.parent / SNAPSHOTS / f"{SIGMA}{sigma:g}-step{step:08d}.pth"
        write_checkpoint(path, saved)
        print(f"written: {path}")


if __name__ == "__main__":
    dist.run(main)
