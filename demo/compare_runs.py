"""What demo/compare.py compares: the trainings of each group, and how much is done of each."""

import re
from collections.abc import Iterator
from fractions import Fraction
from itertools import product
from typing import NamedTuple

from models.config import HEADS

# About as many parameters as the channel head of tokenbridge_tiny has, where flags decide it; four
# timesteps a token, as MAR trains.
TRAINED = {"diffusion": "--diffloss_d=3 --diffloss_w=96 --diffusion_batch_mul=4"}
# Ways to draw from the channel head, and the guidances of which each takes its best, at the
# published temperature: near the best one for these digits, 0.4, little guidance is needed.
SAMPLED = ["", "--cfg_schedule=constant", "--cfg_schedule=cosine"]
SAMPLED += ["--cfg_schedule=cosine --cfg_power=2", "--mask_schedule=exp"]
SAMPLED += [f"--cfg_schedule=constant --cfg_interval {x}" for x in ("0 0.5", "0.18 0.6", "0.5 1")]
SAMPLED += ["--order=raster", "--order=confidence", "--token_cache=2", "--token_cache=4"]
NORMS = "--latent_norm=channel", "--quantizer=calibrated"


class Scale(NamedTuple):
    """On which images, and how much is done. lr: as configured. discrete: flags of heads that have
    levels. judge: its epochs. more: flags of all trainings.
    """

    subject: str = "digits"
    size: int = 32
    channels: int = 8
    lr: float = 3e-3
    discrete: tuple[str, ...] = ("--quant_bits=4",)
    quick: bool = False
    val_images: int = 360
    epochs: int = 48
    batch: int = 32
    images: int = 360
    judge: int = 30
    iterations: tuple[int, ...] = (4, 8, 16)
    temperatures: tuple[float, ...] = (0.2, 0.4, 0.6, 0.8, 1.0, 1.2)
    guidances: tuple[float, ...] = (1.0, 2.0)
    more: tuple[str, ...] = ()


CALIBRATED = "--quant_bits=4", "--quantizer=calibrated"
EMOJI = dict(subject="emoji", size=64, channels=16, lr=2e-3, discrete=CALIBRATED)
EMOJI |= dict(val_images=310, epochs=24, batch=8, images=330)
DATA = {"digits": Scale(), "gallery": Scale(**EMOJI)}
FEW = "--log_freq=4", "--save_last_freq=1", "--ema_rate=0.9"
QUICK = dict(quick=True, val_images=32, epochs=2, batch=128, images=80, judge=3, iterations=(2, 4))
QUICK |= dict(temperatures=(0.7, 1.0), guidances=(2.0,), more=FEW)


class Run(NamedTuple):
    """A training and the images that are drawn of it. label: its row in the group's table.

    like: a run of equal steps; this one has as many epochs as fit into the time of `first`.
    """

    group: str
    label: str
    head: str
    seed: int
    flags: tuple[str, ...] = ()
    like: str = ""

    @property
    def parts(self) -> tuple[str, ...]:
        """Of shares the held-out loss is what is asked; ways to draw need no training."""
        if self.group == "sampling":
            return ("draw",)
        return ("train",) if self.group.startswith("share") else ("train", "draw")

    @property
    def name(self) -> str:
        words = re.findall(r"[\w.]+", self.label)
        return "-".join([self.group, *words, str(self.seed)])

    @property
    def first(self) -> str:
        """The training that the others of its group are measured by, or are drawn from."""
        of_shares = self.group.startswith("share")
        return f"{'share-1-rate-x1' if of_shares else 'heads-channel'}-{self.seed}"

    @property
    def tokenizer(self) -> str:
        return "vq" if self.head == "codebook" else "vae"


def all_runs(seed: int, scale: Scale) -> Iterator[Run]:
    """Those of a seed, each after what its number of epochs depends on."""

    def run(group: str, label: str, flags: str, head: str = "channel") -> Run:
        return Run(group, label or flags.replace("=", " "), head, seed, tuple(flags.split()))

    equal = [run("heads", head, TRAINED.get(head, ""), head) for head in HEADS]
    yield from equal
    yield from (r._replace(group="time", like=r.name) for r in equal if r.head != "channel")
    for bits in (3, 4, 5, 6, 7, 8):
        if f"--quant_bits={bits}" not in scale.discrete:
            yield run("bits", f"{bits} bits", f"--quant_bits={bits}")
    natural = ",".join(map(str, range(scale.channels)))
    yield run("order", "natural order", f"--channel_order={natural}")
    for width, depth in ((32, 2), (128, 2), (64, 1), (64, 4)):
        size = f"--channel_embed_dim={width} --channel_depth={depth}"
        yield run("size", f"{width} x {depth}", size)
    published = "--mask_distribution=exp --mask_ratio_min=0.2"
    yield run("masks", "mask_distribution exp", published)
    if scale.discrete != CALIBRATED:  # which have no range, and those emoji one norm
        for limit in (2, 3, 4):
            yield run("range", f"range {limit}", f"--quant_min={-limit} --quant_max={limit}")
        for flags in (*NORMS, " ".join(NORMS)):
            yield run("latents", "", flags)
    for flags in SAMPLED:
        yield run("sampling", "" if flags else "as published", flags)
    for share, times in product((1, 2, 4, 8), (1, 2)):
        flags = f"--head_share={1 / share} --lr={scale.lr * times}"
        yield (each := run("share", f"{Fraction(1, share)}, rate x{times}", flags))
        if share > 1:
            yield each._replace(group="share-time", like=each.name)
