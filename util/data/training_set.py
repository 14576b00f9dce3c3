"""What a training learns from and is validated on: images or cached latents, by the flags."""

import argparse
from dataclasses import dataclass, replace
from pathlib import Path

from models.config import TokenBridgeConfig
from models.tokenizers.kl16 import VAE
from util import dist
from util.args import value
from util.checkpoint import FINETUNE, Checkpoint
from util.data.images import ImageDataset, reading_flags
from util.data.latent_cache import CachedLatents, open_cache
from util.data.listing import find_split, list_images
from util.errors import UserError, as_user_error
from util.vae import vae_digest
from util.validation import ValidationSet, evenly_spread

IMAGENET_IMAGES = 1_281_167  # of its training set


@dataclass(frozen=True)
class TrainingData:
    dataset: ImageDataset | CachedLatents | range  # a range in a dry run without data
    classes: list[str]
    source: str  # the flag and its value
    vae_sha256: str | None
    manifest: dict | None = None

    def count_skipped(self) -> int:
        """Unreadable images so far."""
        return int(self.dataset.bad.sum()) if isinstance(self.dataset, ImageDataset) else 0


def is_without_data(args: argparse.Namespace) -> bool:
    """A dry run that names no data: it says what a training on ImageNet would take."""
    named = args.use_cached or args.data_path or args.val_path or args.val_cached_path
    return args.dry_run and not named and not Path(value(args, "data_path")).exists()


def needs_vae(args: argparse.Namespace) -> bool:
    """With cached latents, to draw images and to encode those of a validation."""
    if is_without_data(args):
        return False
    named = args.vae_path is not None and Path(args.vae_path).exists()
    if not args.use_cached or args.online_eval or named or args.head == "codebook":
        return True
    dist.print_main(
        "no preview images, and the cache is not checked to be of --vae_path: there is none"
    )
    return False


def open_data(args: argparse.Namespace, vae: VAE | None, checkpoint: Checkpoint) -> TrainingData:
    """The images of --data_path, or the latents of --cached_path."""
    if is_without_data(args):
        source = "no --data_path or --use_cached: a training set as large as ImageNet's"
        return TrainingData(range(IMAGENET_IMAGES), [], source, None)
    known, cached = checkpoint.config, args.cached_path
    size = args.img_size or (known.img_size if known is not None else None)
    digest = vae_digest(value(args, "vae_path")) if vae is not None else None
    if args.use_cached:
        if not cached:
            raise UserError("--use_cached needs --cached_path, the folder that main_cache.py wrote")
        cache = open_cache(cached, size, digest)
        digest = cache.manifest["vae_sha256"] if cache.manifest else digest
        source = f"--cached_path {cached}"
        return TrainingData(cache, cache.classes, source, digest, cache.manifest)
    path, size, manifest = value(args, "data_path"), size or value(args, "img_size"), None
    images = list_images(path)
    on_bad = "next" if args.skip_bad_images else "raise"
    dataset = ImageDataset(images.samples, size, on_bad, args.max_image_pixels)
    if cached and not vae.is_kl16:  # nobody published its latents' scale; its cache has measured it
        manifest = open_cache(cached, size, digest).manifest
    return TrainingData(dataset, images.classes, f"--data_path {path}", digest, manifest)


def check_data(data: TrainingData, config: TokenBridgeConfig, checkpoint: Checkpoint) -> None:
    """Raise UserError unless classes and latents fit the model."""
    own, known, trained = len(data.classes), config.class_num, checkpoint.classes
    if own and trained and list(trained) != data.classes:
        remedy = f"{FINETUNE} in the place of --resume trains it on them"
        raise UserError(f"{data.source} has other classes than {checkpoint.named}; {remedy}")
    if own > known:
        remedy = "leave --class_num out, or name the data that the checkpoint was trained on"
        raise UserError(f"{data.source} has {own} classes, --class_num is {known}; {remedy}")
    if 0 < own < known:
        others = f"{data.source} {own}: the others are never trained"
        dist.print_main(f"note: the model has {known} classes, {others}")
    if isinstance(data.dataset, CachedLatents):
        check_latent_shape(data.dataset, config, data.source)


def check_latent_shape(cache: CachedLatents, config: TokenBridgeConfig, source: str) -> None:
    if cache.latent_shape != config.latent_shape:
        own = f"the model expects {config.latent_shape}; see --img_size and --vae_stride"
        raise UserError(f"{source} holds latents {cache.latent_shape}, {own}")


def open_validation(
    args: argparse.Namespace, data: TrainingData, config: TokenBridgeConfig, vae: VAE | None
) -> tuple[TrainingData, ValidationSet | None]:
    """The training data without what the flags hold out, and that.

    What a flag names must fit; a folder val/ beside train/ that does not is named and left alone.
    """
    given = [name for name in ("val_path", "val_cached_path", "holdout") if getattr(args, name)]
    if len(given) > 1:
        raise UserError(f"--{given[0]} and --{given[1]}: validation data comes from one of them")
    if is_without_data(args) or not (args.val_freq or args.holdout):
        return data, None
    if count := args.holdout:
        if count >= (total := len(data.dataset)):
            raise UserError(f"--holdout {count} leaves nothing of the {total} of {data.source}")
        chosen = evenly_spread(total, count)
        rest = data.dataset.subset(sorted(set(range(total)) - set(chosen)))
        source = f"{count} images that --holdout takes out of {data.source}"
        labels = [*range(len(data.classes))]
        aside = ValidationSet(data.dataset.subset(chosen), labels, source)
        return replace(data, dataset=rest), aside
    try:
        return data, _open_validation_data(args, data, config, vae)
    except UserError as error:
        if given:
            raise
        dist.print_main(f"no validation loss: {error}")
        return data, None


def _open_validation_data(
    args: argparse.Namespace, data: TrainingData, config: TokenBridgeConfig, vae: VAE | None
) -> ValidationSet:
    """The cache of --val_cached_path, or images: of --val_path or beside those of --data_path."""
    path, split = (args.val_path, "") if args.val_path else (value(args, "data_path"), "val")
    beside = (args.data_path or not args.use_cached) and any(find_split(path, split))
    source = str(Path(path, split))
    if cached := args.val_cached_path:
        source = f"--val_cached_path {cached}"
        with as_user_error(source):
            dataset = found = open_cache(cached, config.img_size, data.vae_sha256)
        check_latent_shape(dataset, config, source)
    elif not (args.val_path or beside):
        raise UserError("--val_path, --val_cached_path or --holdout gives it")
    elif vae is None:
        raise UserError(f"{source} holds images, which need --vae_path, or --val_cached_path")
    else:
        found = list_images(path, split, "--val_path")
        dataset = ImageDataset(found.samples, config.img_size, **reading_flags(args))
    if unknown := [name for name in found.classes if name not in data.classes]:
        raise UserError(f"{source} has class {unknown[0]!r}, which {data.source} has not")
    return ValidationSet(dataset, [data.classes.index(name) for name in found.classes], source)
