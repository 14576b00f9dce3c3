"""Evaluation: image numbers -> sampler -> VAE decoder -> uint8 -> PNG files, features -> figures.

    for each batch k of image numbers, unless it was done before:
        images = round and clip (decode (sample (seed, numbers)))   on the process whose turn it is
        images/*.png, features/.../batch-k.npz
    figures of all features in image order, on the main process

A batch holds the same image numbers on any number of processes, so nothing depends on their
number, and a run that was stopped goes on with the batches that are missing.
"""

import argparse
import hashlib
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from models.generate import decode_images, spread_labels
from models.sampler import CFG_SCHEDULES, ORDERS, evaluation_mode, sample_latents
from models.tokenbridge import TokenBridge
from models.tokenizers.tokenizer import Tokenizer
from util import dist
from util.args import non_negative_float, non_negative_int, positive_int
from util.checkpoint import WEIGHT_KEYS
from util.device import Precision
from util.errors import UserError, as_user_error, did_you_mean
from util.evaluation.features import FeatureStore
from util.evaluation.folder import EvaluationFolder, file_label, plain, read_png
from util.evaluation.metrics import Measure
from util.evaluation.results import finish, tell
from util.parser import Parser
from util.provenance import digest

SWEPT = ("num_iter", "cfg", "temperature")


def add_evaluation_flags(parser: Parser) -> None:
    group = parser.add_argument_group(
        "evaluation", "several values of num_iter, cfg or temperature: all combinations, compared"
    )
    add = group.add_argument
    add("--evaluate", action="store_true", help="generate images, measure them and stop")
    add("--online_eval", action="store_true", help="evaluate while training")
    add("--eval_freq", type=positive_int, default=40, help="epochs between two, while training")
    add("--eval_bsz", type=positive_int, default=64, help="images a batch")
    add("--num_images", type=positive_int, default=50000, help="in all, spread over the classes")
    add(
        "--classes",
        type=str,  # and in a file of settings a number needs no quotes
        nargs="+",
        metavar="CLASS",
        help="draw these, by name or by number (previews too); default: all that were trained",
    )
    add("--num_iter", type=positive_int, nargs="+", default=[256], help="iterations an image")
    add("--cfg", type=non_negative_float, nargs="+", default=[1.0], help="guidance; 1 is none")
    add("--cfg_schedule", choices=CFG_SCHEDULES, default="linear", help="of the guidance")
    add("--order", choices=ORDERS, default="random", help="in which positions are filled")
    add(
        "--token_cache",
        type=non_negative_int,
        default=0,
        metavar="ITERATIONS",
        help="faster, approximate: between two of so many, compute only what was just filled or "
        "is wanted; 0 is never",
    )
    add("--temperature", type=non_negative_float, nargs="+", default=[1.0], help="0: argmax")
    add("--eval_weights", choices=WEIGHT_KEYS, default="ema", help="averaged or raw weights")
    add("--keep_images", action="store_true", help="keep the PNG files once they are measured")
    add("--save_npz", action="store_true", help="all images as samples.npz, for ADM's evaluator")
    add(
        "--fid_reference",
        metavar="PATH",
        help="real images, a folder or an npz file of them: FID, KID, precision and recall to them",
    )


@dataclass(frozen=True)
class EvalSettings:
    """What decides the generated images, which are drawn class by class.

    classes: the labels that are drawn, in this order; None is all of the model's. names: of all
    classes that were trained, as far as they are known. keep_images, save_npz: what becomes of the
    images.
    """

    num_images: int
    eval_bsz: int
    num_iter: int
    cfg: float
    cfg_schedule: str
    temperature: float
    seed: int
    order: str = "random"
    token_cache: int = 0
    weights: str = "ema"  # or "model", the raw ones
    keep_images: bool = False
    save_npz: bool = False
    classes: tuple[int, ...] | None = None
    names: tuple[str, ...] = ()

    def labels(self, class_num: int) -> Tensor:
        """[num_images] the class of every image, as evenly as it goes."""
        return spread_labels(self.num_images, self.classes or range(class_num))

    def name(self, label: int) -> str:
        return self.names[label] if self.names else str(label)

    def folder_name(self) -> str:
        chosen = "" if self.classes in (None, tuple(range(len(self.names)))) else self._chosen()
        order = "" if self.order == "random" else f"-{self.order}"
        cache = f"-cache{self.token_cache}" if self.token_cache else ""
        return (
            f"ariter{self.num_iter}-temp{self.temperature:g}-{self.cfg_schedule}cfg{self.cfg:g}"
            f"-image{self.num_images}-seed{self.seed}{order}{cache}{chosen}-{self.weights}"
        )

    def _chosen(self) -> str:
        """Of the classes, for a folder's name, which has no room for many."""
        listed = "+".join(map(str, self.classes))
        if len(listed) > 24:
            listed = f"es{len(self.classes)}-{hashlib.sha256(listed.encode()).hexdigest()[:8]}"
        return f"-class{listed}"

    def of_images(self) -> dict:
        """Those that decide the images."""
        others = {"keep_images", "save_npz", "names", *(["classes"] if not self.classes else [])}
        return {k: v for k, v in asdict(self).items() if k not in others}


def find_class(text: str, names: Sequence[str]) -> int:
    """The label of a class that was trained, by its name or its number; a name comes first."""
    wanted = text.strip()
    same = [i for i, name in enumerate(names) if wanted in (name, f"{name} ({i})")]
    same = same or [i for i, name in enumerate(names) if name.casefold() == wanted.casefold()]
    if len(same) == 1:
        return same[0]
    if same:
        raise UserError(f"class {wanted!r} may be {' or '.join(map(str, same))}: say the number")
    if wanted.isascii() and wanted.isdigit() and int(wanted[:9]) < len(names):
        return int(wanted)
    hint = did_you_mean(wanted.casefold(), [name.casefold() for name in names])
    raise UserError(
        f"class {wanted[:60]!r} is unknown: the model has {len(names)}, by name or by a number "
        f"from 0 to {len(names) - 1}{hint}"
    )


def drawn_classes(
    wanted: Sequence[str] | None, class_num: int, names: Sequence[str]
) -> tuple[int, ...] | None:
    """The labels of --classes, else of all that were trained; None if these are the model's all.

    names: of the classes that were trained; none if they are not known.
    """
    names = names[:class_num] or tuple(map(str, range(class_num)))
    with as_user_error("--classes"):
        chosen = [find_class(text, names) for text in wanted or ()]
    labels = tuple(dict.fromkeys(chosen or range(len(names))))
    return None if labels == tuple(range(class_num)) else labels


def sweep_settings(
    args: argparse.Namespace, class_num: int, names: Sequence[str] = ()
) -> list[EvalSettings]:
    """All combinations of --num_iter, --cfg and --temperature, each once, in that order.

    names: of the classes that were trained, as far as they are known.
    """
    classes = drawn_classes(args.classes, class_num, names)
    if args.classes and args.num_images < len(classes or ()):
        raise UserError(
            f"--num_images {args.num_images} is less than one of each of the {len(classes)} "
            "--classes"
        )
    common = EvalSettings(
        num_images=args.num_images,
        eval_bsz=args.eval_bsz,
        num_iter=args.num_iter[0],
        cfg=args.cfg[0],
        cfg_schedule=args.cfg_schedule,
        temperature=args.temperature[0],
        seed=args.seed,
        order=args.order,
        token_cache=args.token_cache,
        weights=args.eval_weights,
        keep_images=args.keep_images,
        save_npz=args.save_npz,
        classes=classes,
        names=tuple(names),
    )
    values = product(*(dict.fromkeys(getattr(args, name)) for name in SWEPT))
    points = [replace(common, **dict(zip(SWEPT, point, strict=True))) for point in values]
    if len({point.folder_name() for point in points}) < len(points):
        raise UserError(
            f"two of --cfg {args.cfg} or of --temperature {args.temperature} are too close: "
            "folders are named by six digits"
        )
    return points


def eval_settings(
    args: argparse.Namespace, class_num: int, names: Sequence[str] = ()
) -> EvalSettings:
    """Those of an evaluation during training: one point."""
    points = sweep_settings(args, class_num, names)
    if len(points) > 1:
        swept = ", ".join(f"--{name}" for name in SWEPT if len(getattr(args, name)) > 1)
        raise UserError(f"--online_eval takes one value, not several: {swept}; see --evaluate")
    return points[0]


def evaluate(
    model: TokenBridge,
    tokenizer: Tokenizer,
    settings: EvalSettings,
    folder: Path,
    device: torch.device,
    precision: Precision,
    measure: Measure | None,
    record: dict | None = None,
    training: bool = False,
) -> tuple[dict[str, float], Tensor | None]:
    """Generate what the folder lacks, measure it, write grid.png and metrics.json.

    Image i depends on (seed, i) alone. The global random state is left as it was. measure: None
    if nothing can be measured. record: further facts for metrics.json. training: if the folder is
    another evaluation's, take a new one beside it, where else a UserError says so: a training
    must not end there.
    Returns, on the main process, the figures and the grid, uint8 [3, H, W].
    """
    started = time.monotonic()
    identity = image_identity(model, tokenizer, settings, device, precision)
    labels = settings.labels(model.config.class_num)
    named = {c: file_label(settings.names[c]) for c in labels.unique().tolist() if settings.names}
    labelled = [named.get(c, "") for c in labels.tolist()]
    place = EvaluationFolder(folder, settings.num_images, settings.eval_bsz, labelled)
    if training:
        place = place.free_beside(identity)
    place.claim(identity)
    facts = identity | {"measured": measure.identity() if measure is not None else None}
    done = finished(place, settings, facts["measured"]) if dist.is_main() else None
    if not dist.gather_objects(done)[0]:
        with evaluation_mode(model), unchanged_randomness(device):
            draw(model, tokenizer, settings, place, device, precision, measure)
            dist.barrier()
            if dist.is_main():
                facts |= {"processes": dist.world_size(), "seconds": time.monotonic() - started}
                finish(place, settings, model.config, measure, facts | (record or {}))
    results, samples = {}, None
    if dist.is_main():
        results, samples = place.record()["metrics"], read_png(place.grid)
        tell(place)
    dist.barrier()
    return results, samples


def refuse_other_images(
    model: TokenBridge,
    tokenizer: Tokenizer,
    points: list[EvalSettings],
    output: Path,
    device: torch.device,
    precision: Precision,
) -> None:
    """Raise UserError, on all processes, if a point's folder holds other images; write nothing."""
    identity = image_identity(model, tokenizer, points[0], device, precision)
    for point in points:
        place = EvaluationFolder(output / point.folder_name(), point.num_images, point.eval_bsz)
        place.refuse_other(identity | {"settings": plain(point.of_images())})


def image_identity(
    model: TokenBridge,
    tokenizer: Tokenizer,
    settings: EvalSettings,
    device: torch.device,
    precision: Precision,
) -> dict:
    """All that decides the images, as plain values.

    Raises UserError unless all processes have the same.
    """
    identity = plain(
        {
            "settings": settings.of_images(),
            "precision": precision.name,
            "device": device.type,
            "weights_sha256": digest(model),
            "vae_weights_sha256": digest(tokenizer),
            "latent_scale": tokenizer.latent_scale,
            "model": model.config.to_dict(),
        }
    )
    for rank, other in enumerate(dist.gather_objects(identity)):
        if other != identity:
            raise UserError(
                f"processes {dist.rank()} and {rank} would draw different images; --resume and "
                "--vae_path must be the same files on all nodes"
            )
    return identity


def finished(place: EvaluationFolder, settings: EvalSettings, measured: dict | None) -> bool:
    """Whether an earlier run has left all that this one is asked for."""
    before = place.record()
    if before is None or before["measured"] != measured or not place.grid.is_file():
        return False
    if settings.save_npz and not place.samples.is_file():
        return False
    return not (settings.keep_images and place.without_images())


def draw(
    model: TokenBridge,
    tokenizer: Tokenizer,
    settings: EvalSettings,
    place: EvaluationFolder,
    device: torch.device,
    precision: Precision,
    measure: Measure | None,
) -> None:
    """This process's share of the batches that lack images or features."""
    store = None
    if measure is not None:
        store = place.features(measure.extractor)
        store.folder.mkdir(parents=True, exist_ok=True)
    lacking = missing(place, store, settings) if dist.is_main() else None
    undrawn, unmeasured = dist.gather_objects(lacking)[0]  # all as the main process sees it
    todo = sorted(undrawn | unmeasured)
    if len(todo) < len(place.batches):
        done = len(place.batches) - len(todo)
        dist.print_main(f"{place.path}: {done} of {len(place.batches)} batches are there already")
    mine = todo[dist.rank() :: dist.world_size()]
    for number in tqdm(mine, desc="generating", disable=not (mine and dist.is_main())):
        dist.beat(f"generating batch {number + 1} of {len(place.batches)}")
        ids = place.batches[number]
        if number in undrawn:
            images = generate(model, tokenizer, ids, settings, device, precision)
            place.write_images(ids, images)
        else:
            images = place.read_images(ids)
        if number in unmeasured:
            store.write(number, list(ids), measure.extractor(images))


def missing(
    place: EvaluationFolder, store: FeatureStore | None, settings: EvalSettings
) -> tuple[set[int], set[int]]:
    """Numbers of the batches that lack images, and of those that lack features."""
    undrawn = place.without_images()
    unmeasured = store.missing(range(len(place.batches))) if store is not None else set()
    wanted = settings.keep_images or (settings.save_npz and not place.samples.is_file())
    if place.images_were_removed() and store is not None and not wanted:
        undrawn &= unmeasured  # where there are features, nobody needs the images any more
    return undrawn, unmeasured


@contextmanager
def unchanged_randomness(device: torch.device) -> Iterator[None]:
    """Leave every global random generator as it was: a training goes on with them."""
    python, arrays = random.getstate(), np.random.get_state()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):  # and the CPU's
        yield
    random.setstate(python)
    np.random.set_state(arrays)


def generate(
    model: TokenBridge,
    tokenizer: Tokenizer,
    ids: range,
    settings: EvalSettings,
    device: torch.device,
    precision: Precision,
) -> Tensor:
    """The images of those numbers, uint8 [N, 3, H, W], on the CPU."""
    with precision.autocast(device):
        latents = sample_latents(
            model,
            settings.labels(model.config.class_num)[ids.start : ids.stop],
            num_iter=settings.num_iter,
            cfg=settings.cfg,
            cfg_schedule=settings.cfg_schedule,
            order=settings.order,
            token_cache=settings.token_cache,
            temperature=settings.temperature,
            seed=settings.seed,
            image_ids=ids,
        )
    return decode_images(tokenizer, latents)
