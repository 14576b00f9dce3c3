"""What a training starts from: checkpoint, data, VAE and settings, read and checked against each
other before anything is written.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

from models.config import TokenBridgeConfig
from models.tokenbridge import CLASS_ROWS
from models.tokenizers.kl16 import VAE
from util import dist
from util.build import ModelFlags, build_config, build_vae, check_vae, warn_other_vae
from util.checkpoint import (
    AUTO,
    FINETUNE,
    LAST,
    Checkpoint,
    find_checkpoint,
    refuse_other_run,
    saved_in,
)
from util.data.images import ImageDataset
from util.data.latent_cache import CachedLatents, open_cache
from util.data.listing import list_images, print_class_notes
from util.errors import UserError, as_user_error
from util.vae_files import vae_digest


@dataclass(frozen=True)
class TrainingData:
    """The training set and what is known of it. source: the flag and its value, for messages."""

    dataset: ImageDataset | CachedLatents
    classes: list[str]
    source: str
    vae_sha256: str | None
    manifest: dict | None = None

    def count_skipped(self) -> int:
        """Unreadable images that this process has passed over so far."""
        return int(self.dataset.bad.sum()) if isinstance(self.dataset, ImageDataset) else 0


@dataclass(frozen=True)
class Inputs:
    """What a training starts from, read and checked against each other."""

    checkpoint: Checkpoint | None
    vae: VAE | None  # None where cached latents make it unnecessary
    data: TrainingData
    config: TokenBridgeConfig


def open_checkpoint(
    resume: str, output_dir: str, read_only: bool = False, finetune: str = ""
) -> Checkpoint | None:
    """The checkpoint to begin with, if any.

    A command that is started again goes on with its own run: every attempt of torchrun
    --max-restarts after the first, and one whose --resume or --finetune names where it came from.
    read_only: change nothing in the output folder, where a damaged checkpoint would be set aside.
    """
    folder = Path(output_dir).resolve()
    begun = dist.gather_objects(bool(saved_in(folder)))[0]
    elsewhere = resume not in ("", AUTO) and not Path(resume).resolve().is_relative_to(folder)
    if finetune == AUTO:
        raise UserError(f"{FINETUNE} {AUTO}: name the folder or file of the weights to begin with")
    if finetune and elsewhere:
        raise UserError(
            f"{FINETUNE} {finetune} with --resume {resume}: --finetune names the weights to begin "
            "with, and --resume auto goes on with what has begun"
        )
    # Nodes may count restarts differently: one that lost no worker of its own has none.
    if begun and any(dist.gather_objects(dist.is_restarted())):
        resume = AUTO
    elif begun and (elsewhere or (finetune and not resume)):
        own = find_checkpoint(AUTO, output_dir, False, read_only)
        name, value = ("finetune", finetune) if finetune else ("resume", resume)
        if own is not None and same_place(own.argument(name), value):
            return own
    checkpoint = find_checkpoint(resume, output_dir, False, read_only) if resume else None
    refuse_other_run(output_dir, checkpoint)
    if finetune and checkpoint is None:
        return find_checkpoint(finetune, output_dir, must_exist=True, flag=FINETUNE)
    if finetune and not same_place(checkpoint.argument("finetune"), finetune):
        raise UserError(
            f"--output_dir {output_dir} holds a run that did not begin with {FINETUNE} {finetune}; "
            "name another folder, or leave the flag out to go on with that run"
        )
    return checkpoint


def same_place(*paths: str | None) -> bool:
    """Whether all name one folder of a checkpoint, or the checkpoint in it."""
    places = [Path(path).resolve() for path in paths if path]
    folders = {place.parent if place.name == LAST else place for place in places}
    return len(places) == len(paths) and len(folders) == 1


def prepare_finetuning(
    checkpoint: Checkpoint, args: argparse.Namespace, classes: list[str]
) -> Checkpoint:
    """The weights of --finetune, its settings with the classes and the image size of this training.

    Both are put into args, too, where the command line did not say them.
    """
    if "class_num" not in args.explicit:
        rows = checkpoint.to_finetune().weights("model")[CLASS_ROWS]
        args.class_num = len(classes) or len(rows)
    if "img_size" not in args.explicit and checkpoint.config is not None:
        args.img_size = checkpoint.config.img_size
    return checkpoint.to_finetune(class_num=args.class_num, img_size=args.img_size)


def fit(
    checkpoint: Checkpoint, config: TokenBridgeConfig, classes: list[str], seed: int
) -> Checkpoint:
    """The weights of --finetune fitted to this training's model; what was done is said."""
    with as_user_error(checkpoint.named, (ValueError, RuntimeError)):
        checkpoint, said = checkpoint.fitted(config, classes, seed)
    kind = "averaged" if checkpoint.saved["weights"] == "ema" else "raw"
    dist.print_main("\n".join([f"beginning with the {kind} weights of {checkpoint.named}", *said]))
    return checkpoint


def refuse_finished(checkpoint: Checkpoint | None, args: argparse.Namespace, steps: range) -> None:
    """Raise UserError if another run's checkpoint leaves nothing to train.

    steps: of this training. A run that has come to its end may be started again.
    """
    if steps or checkpoint is None or checkpoint.begins:
        return
    if checkpoint.path.resolve().is_relative_to(Path(args.output_dir).resolve()):
        return
    raise UserError(
        f"{checkpoint.named} has done all of --epochs {args.epochs}, so there is nothing to train; "
        f"raise --epochs to go on, or begin a training of your own with its weights: "
        f"{FINETUNE} {args.resume}"
    )


def open_inputs(args: argparse.Namespace) -> Inputs:
    checkpoint = open_checkpoint(args.resume, args.output_dir, args.dry_run, args.finetune)
    begins = checkpoint is not None and checkpoint.begins
    if checkpoint is not None and not begins:  # what a run began with stays known
        args.finetune = args.finetune or checkpoint.argument("finetune") or ""
    vae = build_vae(args) if needs_vae(args) else None
    if "img_size" not in args.explicit and checkpoint is not None and checkpoint.config is not None:
        args.img_size = checkpoint.config.img_size
    data = open_data(args, vae)
    print_class_notes(data.classes)
    if begins:
        checkpoint = prepare_finetuning(checkpoint, args, data.classes)
    config = build_config(ModelFlags.of(args), checkpoint, data.manifest, vae, len(data.classes))
    if checkpoint is not None and not begins:
        check_same_classes(checkpoint, data.classes, data.source)
    check_data(data, config, checkpoint)
    if begins:
        checkpoint = fit(checkpoint, config, data.classes, args.seed)
    args.class_num = config.class_num  # as it is written down
    if vae is not None:
        check_vae(vae, config, args.vae_path)
    if checkpoint is not None and data.vae_sha256:
        warn_other_vae(checkpoint, data.vae_sha256)
    return Inputs(checkpoint, vae, data, config)


def check_same_classes(checkpoint: Checkpoint, classes: list[str], source: str) -> None:
    """Raise UserError if a training would go on with other classes than it had."""
    if checkpoint.saved.get("classes", classes) != classes:
        raise UserError(
            f"{source} has other classes than {checkpoint.named} was trained on; their labels "
            f"would not mean the same; {FINETUNE} in the place of --resume trains it on them"
        )


def needs_vae(args: argparse.Namespace) -> bool:
    """With cached latents it draws previews and encodes held-out images; its lack is said."""
    if not args.use_cached or args.online_eval:
        return True
    if "vae_path" in args.explicit and Path(args.vae_path).exists():
        return bool(args.preview_freq) or held_out_folder(args) is not None
    if args.preview_freq:
        dist.print_main("no preview images: cached latents need no VAE, --vae_path draws them")
    return False


def held_out_folder(args: argparse.Namespace) -> Path | None:
    """Images that no other flag holds out: --val_path, or val/ of --data_path if it is there."""
    if not args.val_freq or args.val_cached_path or args.holdout:
        return None
    if args.val_path:
        return Path(args.val_path)
    beside = Path(args.data_path) / "val"
    named = not args.use_cached or "data_path" in args.explicit
    return beside if named and beside.is_dir() else None


def open_data(args: argparse.Namespace, vae: VAE | None) -> TrainingData:
    """The images of --data_path, or the latents of --cached_path."""
    if not args.use_cached:
        images = list_images(args.data_path)
        on_bad = "next" if args.skip_bad_images else "raise"
        dataset = ImageDataset(images.samples, args.img_size, on_bad, args.max_image_pixels)
        source, digest = f"--data_path {args.data_path}", vae_digest(args.vae_path)
        # Nobody published this VAE's scale and channel order; a cache of it has measured them.
        measured = bool(args.cached_path) and vae is not None and not vae.is_kl16
        manifest = open_cache(args.cached_path, None, digest).manifest if measured else None
        return TrainingData(dataset, images.classes, source, digest, manifest)
    if not args.cached_path:
        raise UserError("--use_cached needs --cached_path, the folder that main_cache.py wrote")
    vae_sha256 = None
    if Path(args.vae_path).exists() and (args.online_eval or "vae_path" in args.explicit):
        vae_sha256 = vae_digest(args.vae_path)
    elif "vae_path" in args.explicit:
        dist.print_main(
            f"--vae_path {args.vae_path}: no such file; training on cached latents needs none, but "
            "whether they are this VAE's is not checked"
        )
    cache = open_cache(args.cached_path, args.img_size, vae_sha256)
    source = f"--cached_path {args.cached_path}"
    made_by = cache.manifest["vae_sha256"] if cache.manifest else vae_sha256
    return TrainingData(cache, cache.classes, source, made_by, cache.manifest)


def check_data(
    data: TrainingData, config: TokenBridgeConfig, checkpoint: Checkpoint | None
) -> None:
    """Raise UserError unless classes and latents fit the model."""
    found, known = len(data.classes), config.class_num
    if found > known:
        if checkpoint is not None and not checkpoint.begins:
            raise UserError(
                f"{data.source} has {found} classes, {checkpoint.named} was trained on {known}; "
                "name the data it was trained on"
            )
        raise UserError(
            f"{data.source} has {found} classes, --class_num is {known}; leave --class_num out"
        )
    if found < known:
        dist.print_main(
            f"note: the model has {known} classes, {data.source} {found}: the others are never "
            "trained"
        )
    if isinstance(data.dataset, CachedLatents):
        found = tuple(data.dataset.latent_shape)
        if found != config.latent_shape:
            raise UserError(
                f"{data.source} holds latents {found}, the model expects {config.latent_shape}; "
                "see --img_size, --vae_stride and --vae_embed_dim"
            )


def check_agreement(facts: dict) -> None:
    """Raise UserError, on all processes, unless all have found the same.

    Nodes that see different folders would train different models together without a word.
    """
    found = dist.gather_objects(facts)
    for name in facts:
        differing = [rank for rank, other in enumerate(found) if other[name] != found[0][name]]
        if differing:
            raise UserError(
                f"process {differing[0]} and process 0 have found different values: {name}; "
                "--data_path, --cached_path and --resume must be the same folders on all nodes"
            )
