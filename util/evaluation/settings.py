"""What is drawn for an evaluation: how many images, of which classes, sampled how."""

import argparse
import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product

import torch
from torch import Tensor

from models.sampler import SamplingOptions
from util.args import sampling_flags
from util.errors import UserError, as_user_error, did_you_mean
from util.optim import SIGMA

SWEPT = ("num_iter", "cfg", "temperature")


def spread_labels(count: int, classes: Sequence[int]) -> Tensor:
    """[count] labels, class by class in that order; of no class two more than of another."""
    return torch.tensor(classes)[torch.arange(count) * len(classes) // count]


@dataclass(frozen=True)
class EvalSettings:
    """What decides the generated images, which are drawn class by class.

    weights: "ema", "model", the raw ones, or the name of another average. classes: the labels that
    are drawn, in this order; None is all of the model's. names: of all classes that were trained,
    as far as they are known.
    """

    num_images: int
    batch_size: int
    sampling: SamplingOptions
    weights: str = "ema"
    keep_images: bool = False
    save_npz: bool = False
    classes: tuple[int, ...] | None = None
    names: tuple[str, ...] = ()

    @classmethod
    def of(
        cls, args: argparse.Namespace, class_num: int, names: Sequence[str] = ()
    ) -> list["EvalSettings"]:
        """All combinations of --ema_sigma, --num_iter, --cfg and --temperature, each once."""
        classes = drawn_classes(args.classes, class_num, names)
        if args.classes and args.num_images < len(classes or ()):
            each = f"one of each of the {len(classes)} --classes"
            raise UserError(f"--num_images {args.num_images} is less than {each}")
        common = sampling_flags(args)
        values = product(*(dict.fromkeys(getattr(args, name)) for name in SWEPT))
        swept = [dict(zip(SWEPT, value, strict=True)) for value in values]
        weights = [f"{SIGMA}{width:g}" for width in args.ema_sigma or ()] or [args.eval_weights]
        fate = (args.keep_images, args.save_npz)
        with as_user_error():
            options = [SamplingOptions(**common, **changes) for changes in swept]
        points = [
            cls(args.num_images, args.eval_bsz, sampling, name, *fate, classes, tuple(names))
            for name in dict.fromkeys(weights)
            for sampling in options
        ]
        if len({point.folder_name() for point in points}) < len(points):
            close = f"two of --cfg {args.cfg} or of --temperature {args.temperature}"
            raise UserError(f"{close} are too close: folders are named by six digits")
        return points

    def labels(self, class_num: int) -> Tensor:
        """[num_images] the class of every image, as evenly as it goes."""
        return spread_labels(self.num_images, self.classes or range(class_num))

    @property
    def sigma(self) -> float | None:
        """The relative width of --ema_sigma, if these are the weights of one."""
        return float(width) if (width := self.weights.removeprefix(SIGMA)) != self.weights else None

    def swept(self) -> dict[str, float]:
        """What differs between the points of a sweep, by its flag."""
        width = {} if self.sigma is None else {"ema_sigma": self.sigma}
        return {name: getattr(self.sampling, name) for name in SWEPT} | width

    def name(self, label: int) -> str:
        return self.names[label] if self.names else str(label)

    def folder_name(self) -> str:
        s = self.sampling
        how = f"-power{s.cfg_power:g}" if s.cfg_power else ""
        how += "-interval{:g}-{:g}".format(*s.cfg_interval) if s.cfg_interval else ""
        how += "" if s.mask_schedule == "cosine" else f"-{s.mask_schedule}masks"
        how += "" if s.order == "random" else f"-{s.order}"
        how += f"-cache{s.token_cache}" if s.token_cache else ""
        listed = "+".join(map(str, self.classes or ()))
        if len(listed) > 24:  # a folder's name has no room for many
            listed = f"es{len(self.classes)}-{hashlib.sha256(listed.encode()).hexdigest()[:8]}"
        every = self.classes in (None, tuple(range(len(self.names))))
        classes = "" if every else f"-class{listed}"
        return (
            f"ariter{s.num_iter}-temp{s.temperature:g}-{s.cfg_schedule}cfg{s.cfg:g}"
            f"-image{self.num_images}-seed{s.seed}{how}{classes}-{self.weights}"
        )

    def to_dict(self) -> dict:
        """Those that decide the images, as settings.json and metrics.json have them."""
        sampling = {k: v for k, v in asdict(self.sampling).items() if v is not None}
        chosen = {"classes": self.classes} if self.classes else {}
        own = {"num_images": self.num_images, "eval_bsz": self.batch_size}
        return own | sampling | {"weights": self.weights} | chosen


def eval_settings(
    args: argparse.Namespace, class_num: int, names: Sequence[str] = ()
) -> EvalSettings:
    """Those of an evaluation during training: one point."""
    points = EvalSettings.of(args, class_num, names)
    if len(points) > 1 or args.ema_sigma:
        names = (*SWEPT, "ema_sigma")
        swept = ", ".join(f"--{n}" for n in names if len(getattr(args, n) or ()) > (n in SWEPT))
        raise UserError(f"--online_eval takes no sweep: {swept}; see --evaluate")
    return points[0]


def find_class(text: str, names: Sequence[str]) -> int:
    """The label of a class that was trained, by its name or its number; a name comes first."""
    given = text.strip()
    same = [i for i, name in enumerate(names) if given in (name, f"{name} ({i})")]
    same = same or [i for i, name in enumerate(names) if name.casefold() == given.casefold()]
    if len(same) == 1:
        return same[0]
    if same:
        raise UserError(f"class {given!r} may be {' or '.join(map(str, same))}: say the number")
    if given.isascii() and given.isdigit() and int(given[:9]) < len(names):
        return int(given)
    hint = did_you_mean(given.casefold(), [name.casefold() for name in names])
    raise UserError(
        f"class {given[:60]!r} is unknown: the model has {len(names)}, by name or by a number "
        f"from 0 to {len(names) - 1}{hint}"
    )


def drawn_classes(
    given: Sequence[str] | None, class_num: int, names: Sequence[str]
) -> tuple[int, ...] | None:
    """The labels of --classes, else of all that were trained; None if these are the model's all."""
    names = names[:class_num] or tuple(map(str, range(class_num)))
    with as_user_error("--classes"):
        chosen = [find_class(text, names) for text in given or ()]
    labels = tuple(dict.fromkeys(chosen or range(len(names))))
    return None if labels == tuple(range(class_num)) else labels
