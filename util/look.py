"""Looking at a model while it trains: held-out loss, preview images, use of the levels.

After the first step, every so many steps and after the last one. Nothing that training draws or
learns is touched; all processes look at the same steps and share the work.
Letters: N images, C latent channels, K levels.
"""

import argparse
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from models.quantizer import entropy, level_counts
from models.sampler import SamplingOptions, evaluation_mode
from models.tokenbridge import TokenBridge
from models.tokenizers.tokenizer import Tokenizer
from util import dist, stop
from util.args import non_negative_float, non_negative_int, positive_int
from util.device import Precision
from util.ema import EMA
from util.evaluation.evaluator import unchanged_randomness
from util.heldout import Data, HeldOut, HeldOutLoss, as_scalars, read_latents, spread
from util.log import TrainingLog
from util.parser import Parser
from util.preview import PreviewSettings, about_average, decode, draw, side_by_side

WEIGHTS = ("raw", "ema")
COUNTED = 64  # training images whose levels are counted


def add_look_flags(parser: Parser) -> None:
    group = parser.add_argument_group(
        "looking while training",
        "to TensorBoard; parts of epochs are possible, 0 is never; images are drawn with --cfg and "
        "--temperature",
    )
    add = group.add_argument
    add("--preview_freq", type=non_negative_float, default=1.0, help="epochs between image grids")
    add("--preview_images", type=positive_int, default=8, help="of each, raw and averaged weights")
    add("--preview_iter", type=positive_int, default=32, help="iterations")
    add("--val_freq", type=non_negative_float, default=1.0, help="epochs between held-out losses")
    add("--val_images", type=positive_int, default=256, help="held-out images used, at most")
    add(
        "--val_path",
        default="",
        metavar="FOLDER",
        help="held-out images in CLASS/; default: val/ beside train/, if there",
    )
    add(
        "--val_cached_path",
        default="",
        metavar="FOLDER",
        help="or a cache of them (main_cache.py --split val)",
    )
    add("--holdout", type=non_negative_int, default=0, help="or so many of the training images")


@dataclass(frozen=True)
class LookSettings:
    """When to look, in steps; 0 is never. last_step: of the whole run."""

    preview_every: int
    heldout_every: int
    last_step: int
    preview: PreviewSettings

    @classmethod
    def of(
        cls,
        args: argparse.Namespace,
        steps_per_epoch: int,
        last_step: int,
        classes: Sequence[int] | None = None,
        names: Sequence[str] = (),
    ) -> "LookSettings":
        every = (
            max(1, round(freq * steps_per_epoch)) if freq else 0
            for freq in (args.preview_freq, args.val_freq)
        )
        sampling = SamplingOptions(
            num_iter=args.preview_iter,
            cfg=args.cfg[0],
            cfg_schedule=args.cfg_schedule,
            temperature=args.temperature[0],
            order=args.order,
            seed=args.seed,
        )
        preview = PreviewSettings(args.preview_images, sampling, classes, names)
        return cls(*every, last_step, preview)


class Look:
    """held_out: None without. data: the training set, whose levels are counted once."""

    def __init__(
        self,
        model: TokenBridge,
        ema: EMA,
        tokenizer: Tokenizer,
        device: torch.device,
        precision: Precision,
        settings: LookSettings,
        data: Data,
        held_out: HeldOut | None,
        val_images: int,
    ):
        self.model, self.ema, self.tokenizer = model, ema, tokenizer
        self.device, self.precision, self.settings, self.data = device, precision, settings, data
        self.heldout_loss = None
        if held_out is not None and settings.heldout_every:
            self.heldout_loss = HeldOutLoss(
                held_out, val_images, model.config, tokenizer, device, precision
            )
        self.levels_of_data: Tensor | None = None

    def _due(self, done: int, every: int) -> bool:
        return bool(every) and (done % every == 0 or done in (1, self.settings.last_step))

    def heldout_due(self, done: int) -> bool:
        return self.heldout_loss is not None and self._due(done, self.settings.heldout_every)

    def preview_due(self, done: int) -> bool:
        return self._due(done, self.settings.preview_every)

    def due(self, done: int) -> bool:
        """Whether to look after so many steps, on all processes alike."""
        return self.heldout_due(done) or self.preview_due(done)

    def __call__(self, log: TrainingLog, done: int) -> None:
        """Look and log. A signal that asks to stop cuts it short, on any process."""
        with torch.no_grad(), unchanged_randomness(self.device), evaluation_mode(self.model):
            if self.heldout_due(done):
                self._measure(log, done)
            if self.preview_due(done):
                self._preview(log, done)
        dist.barrier()
        log.restart()  # looking is not training time

    def _weights(self, name: str):
        return self.ema.swapped_in() if name == "ema" else nullcontext()

    def _measure(self, log: TrainingLog, done: int) -> None:
        for name in WEIGHTS:
            with self._weights(name):
                losses = self.heldout_loss(self.model)
            if losses is not None:
                log.scalars(as_scalars(losses, name, self.model.config), done)

    def _preview(self, log: TrainingLog, done: int) -> None:
        """Raw and averaged weights are two pieces of work, each for one process."""
        drawn = {}
        for number, name in enumerate(WEIGHTS):
            if number % dist.world_size() == dist.rank() and not stop.requested():
                dist.beat(f"preview of the {name} weights")
                with self._weights(name):
                    latents = draw(self.model, self.settings.preview, self.device, self.precision)
                images = decode(self.tokenizer, latents) if self.tokenizer.vae else None
                drawn[name] = (self._levels(latents), images)
        found = dist.gather_to_main(drawn)
        if found is None:
            return
        drawn = {name: part for own in found for name, part in own.items()}
        if set(drawn) == set(WEIGHTS):  # else somebody was asked to stop
            self._log_preview(log, drawn, done)

    def _log_preview(self, log: TrainingLog, drawn: dict, done: int) -> None:
        if self.levels_of_data is None:
            numbers = spread(len(self.data), COUNTED)
            latents, _ = read_latents(self.data, numbers, self.tokenizer, self.device)
            self.levels_of_data = self._levels(latents.to(self.device))
        counts = {"data": self.levels_of_data}
        counts |= {f"generated_{name}": levels for name, (levels, _) in drawn.items()}
        for name, levels in counts.items():
            log.histogram(f"levels/{name}", levels.sum(dim=0), done)
        bits = {f"levels/entropy_{name}": entropy(c).mean().item() for name, c in counts.items()}
        log.scalars(bits, done)
        rate = self.ema.rate
        shown = self.settings.preview.described(self.model.config.class_num)
        log.text("preview/about_the_average", f"{about_average(rate, done)} {shown}", done)
        (_, raw), (_, averaged) = (drawn[name] for name in WEIGHTS)
        if raw is not None:
            log.image("preview/raw_and_average", side_by_side(raw, averaged, rate, done), done)

    def _levels(self, latents: Tensor) -> Tensor:
        """latents: [N, C, h, w] scaled -> how often each channel takes each level, [C, K]."""
        indices = self.model.quantizer.encode(latents.float().movedim(1, -1))
        return level_counts(indices, self.model.quantizer.levels).cpu()
