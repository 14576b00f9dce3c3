"""From flags, checkpoint, data and VAE, checked against each other, to what a script works with.

    flags -> checkpoint (util/checkpoint.py finds it) -> VAE, data -> settings -> model -> run

The engine and models never see `args`. Nothing is written; a damaged checkpoint is set aside.
A flag that was given must agree with what a checkpoint, a cache and a VAE know; where it was not
given, they decide, and the published value where none of them does.
"""

import argparse
import json
import math
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from torch import Tensor

from models.calibration import fit_levels
from models.config import HEAD_QUANTIZERS, TokenBridgeConfig, preset, unread_settings
from models.tokenbridge import CLASS_ROWS, TokenBridge
from models.tokenizers.kl16 import VAE
from util import dist
from util.args import value
from util.checkpoint import (
    AUTO,
    FINETUNE,
    Checkpoint,
    find_checkpoint,
    refuse_other_run,
    same_place,
    saved_in,
)
from util.data.batches import Batches
from util.data.histogram import LatentHistogram
from util.data.latent_cache import open_cache
from util.data.training_set import TrainingData, check_data, needs_vae, open_data, open_validation
from util.errors import UserError, as_user_error
from util.optim import BLR_BATCH, LRSchedule
from util.vae import load_vae, vae_digest
from util.validation import ValidationSet

# Settings that belong to the tokenizer's latents and can be measured.
LATENT = ("latent_scale", "channel_order")
# The buffers of a quantizer whose levels come from the data or from the tokenizer.
LEVELS = {"calibrated": ("boundaries", "reconstruction_values"), "codebook": ("codebook",)}


# --- checkpoint


def open_checkpoint(args: argparse.Namespace, read_only: bool = False) -> Checkpoint | None:
    """The checkpoint that a training begins with or goes on with, if any.

    A command that is started again goes on with its own run: every attempt of torchrun
    --max-restarts after the first, and one whose --resume or --finetune names where it came from.
    read_only: change nothing in the output folder, where a damaged checkpoint would be set aside.
    """
    resume, output_dir, finetune = args.resume, args.output_dir, args.finetune
    folder = Path(output_dir).resolve()
    begun = dist.gather_objects(bool(saved_in(folder)))[0]
    elsewhere = resume not in ("", AUTO) and not Path(resume).resolve().is_relative_to(folder)
    if finetune == AUTO or (finetune and elsewhere):
        raise UserError(
            f"{FINETUNE} {finetune} names the folder or file of the weights to begin with; leave "
            "--resume out, or --resume auto goes on with what has begun"
        )
    # Nodes may count restarts differently: one that lost no worker of its own has none.
    if begun and any(dist.gather_objects(dist.is_restarted())):
        resume = AUTO
    elif begun and (elsewhere or (finetune and not resume)):
        own = find_checkpoint(AUTO, output_dir, False, read_only)
        name, origin = ("finetune", finetune) if finetune else ("resume", resume)
        if own is not None and same_place(own.argument(name), origin):
            return own
    checkpoint = find_checkpoint(resume, output_dir, False, read_only) if resume else None
    refuse_other_run(output_dir, checkpoint)
    if finetune and checkpoint is None:
        return find_checkpoint(finetune, output_dir, must_exist=True, flag=FINETUNE).to_finetune()
    if finetune and not same_place(checkpoint.argument("finetune"), finetune):
        raise UserError(
            f"--output_dir {output_dir} holds a run that did not begin with {FINETUNE} {finetune}; "
            "name another folder, or leave the flag out to go on with that run"
        )
    return checkpoint


# --- the model's settings


def build_config(
    args: argparse.Namespace,
    checkpoint: Checkpoint,
    manifest: dict | None = None,
    vae: VAE | None = None,
    classes: int = 0,
) -> TokenBridgeConfig:
    """The model's settings.

    A checkpoint made here knows them: a flag that was given must agree with it, unless it only
    changes behaviour. Otherwise they are the flags, completed by what a cache's manifest knows of
    the latents, or the VAE; those of published checkpoints and caches are KL-16's, as is the
    default. classes: of the data, if there are any.
    """
    flags = {field.name: getattr(args, field.name, None) for field in fields(TokenBridgeConfig)}
    flags["quant_levels"] = args.quant_bits and 2**args.quant_bits
    given = preset(args.model) if args.model is not None else {}
    given |= {name: setting for name, setting in flags.items() if setting not in (None, "auto")}
    saved = checkpoint.config
    head = given.get("head", saved.head if saved is not None else "channel")
    _check_head(head, args, manifest, vae)
    rows = classes if checkpoint.begins else 0
    if checkpoint and not rows:
        key = "model" if "model" in checkpoint.saved else "model_ema"
        rows = len(checkpoint.weights(key).get(CLASS_ROWS, ()))
    known = {"class_num": rows} if rows else {}
    if saved is not None:
        has = "scale" if saved.latent_std is None else "channel"
        if args.latent_norm not in (None, has):
            raise UserError(f"{checkpoint.named} has --latent_norm {has}, not {args.latent_norm}")
        named = channel_statistics(args, manifest, vae, has) if args.latent_stats else {}
        if named.get("latent_std", saved.latent_std) != saved.latent_std:
            raise UserError(f"{checkpoint.named} has other statistics than --latent_stats says")
        return _agreed_config(known | given if checkpoint.begins else given, checkpoint)
    if checkpoint:
        known["head_input"] = "published"  # as the released checkpoints were measured
    if head == "codebook" and vae is not None:  # entries of length one: each mean square is 1/C
        known |= {"codebook_size": len(vae.codebook), "latent_scale": vae.channels**0.5}
        known["channel_order"] = tuple(range(vae.channels))
    known |= channel_statistics(args, manifest, vae)
    if manifest is not None:
        (channels, side, _), size = manifest["latent_shape"], manifest["image_size"]
        known |= {"img_size": size, "vae_embed_dim": channels, "vae_stride": size // side}
        known = {name: manifest[name] for name in LATENT} | known
    elif vae is not None:
        known |= {"vae_embed_dim": vae.channels, "vae_stride": vae.stride}
        unasked = {*known, *given, *unread_settings(head)}
        missing = [f"--{name}" for name in LATENT if name not in unasked]
        if missing and not vae.is_kl16 and not checkpoint:
            asked = f"give {' and '.join(missing)}, or a --cached_path of main_cache.py"
            raise UserError(f"--vae_path is not KL-16: {asked}")
    with as_user_error():
        return TokenBridgeConfig(**known | given)


def _check_head(
    head: str, args: argparse.Namespace, manifest: dict | None, vae: VAE | None
) -> None:
    """Raise UserError unless the head reads all flags that were given, and these latents."""
    if getattr(args, "order", None) == "confidence" and None in HEAD_QUANTIZERS.get(head, ()):
        raise UserError(f"--order confidence needs probabilities, which the {head} head has not")
    for name in unread_settings(head):
        if getattr(args, name, None) is not None:
            raise UserError(f"--{name}: the {head} head does not read it; leave it out")
    if head == "codebook" and args.latent_norm == "channel":
        raise UserError("--latent_norm channel: entries of a codebook are of one length already")
    settings = vae.config if vae is not None else (manifest or {}).get("vae_config")
    has_codes = "codebook_size" in (settings or {})
    if (vae or manifest) and has_codes != (head == "codebook"):
        kind = "are entries of a codebook" if has_codes else "are of a VAE without a codebook"
        remedy = "--head codebook and a VQ tokenizer belong together"
        raise UserError(f"the latents {kind}, but the model's head is {head}; {remedy}")


def channel_statistics(
    args: argparse.Namespace, manifest: dict | None, vae: VAE | None, norm: str | None = None
) -> dict:
    """Settings of normalised latents, of --latent_stats, else of the cache; none if one scale is.

    norm: "scale" or "channel", where it is known. Raises UserError.
    """
    source, path = manifest or {}, args.latent_stats
    normalised = vae.normalised if vae is not None else source.get("normalised", False)
    if (norm or args.latent_norm or ("channel" if normalised else "scale")) == "scale":
        if path:
            raise UserError("--latent_stats is read with --latent_norm channel alone; leave it out")
        return {}
    if args.latent_scale not in (None, "auto"):
        raise UserError("--latent_scale is not read with --latent_norm channel; leave it out")
    if path:
        with as_user_error(f"--latent_stats {path}", (ValueError, TypeError, OSError)):
            source = dict(json.loads(Path(path).read_bytes()))
        own = manifest["vae_sha256"] if manifest else vae_digest(value(args, "vae_path"))
        if source.get("vae_sha256", own) != own:
            raise UserError(f"--latent_stats {path} is of the latents of another VAE than these")
    if not (source.get("channel_mean") and source.get("channel_std")):
        given = "the channels' mean and std, which main_cache.py measures: give its --cached_path"
        raise UserError(f"--latent_norm channel needs {given}, or its manifest as --latent_stats")
    with as_user_error("channel_mean and channel_std", (ValueError, TypeError)):
        mean, std = (tuple(map(float, source[f"channel_{name}"])) for name in ("mean", "std"))
    known = {"latent_mean": mean, "latent_std": std, "latent_scale": 1.0}
    return known | {name: source[name] for name in ("channel_order",) if name in source}


def _agreed_config(given: dict, checkpoint: Checkpoint) -> TokenBridgeConfig:
    """The checkpoint's settings, with those flags that were given and may differ."""
    saved = checkpoint.config
    free = [own.name for own in fields(saved) if own.metadata.get("free")]
    free += ["class_num", "img_size"] if checkpoint.begins else []
    remedy = "leave the flag out" + ("" if checkpoint.begins else f", or see {FINETUNE}")
    for name, now in given.items():
        if name not in free and (before := getattr(saved, name)) != now:
            differ = f"has {name} {before}, but the flags say {now}"
            raise UserError(f"{checkpoint.named} {differ}; {remedy}")
    if given.get("mask_distribution", saved.mask_distribution) != saved.mask_distribution:
        given = {"mask_ratio_min": None} | given  # that of the distribution
    with as_user_error():
        return replace(saved, **given)


# --- tokenizer and model


def build_vae(args: argparse.Namespace) -> VAE:
    """The VAE of --vae_path, checked against --vae_embed_dim and --img_size where given."""
    vae = load_vae(value(args, "vae_path"), args.vae_embed_dim)
    if args.img_size is not None and args.img_size % vae.stride:
        raise UserError(f"--img_size {args.img_size} is not a multiple of the stride {vae.stride}")
    if vae.img_size not in (None, args.img_size or vae.img_size):
        own = f"this VAE takes images of {vae.img_size} px alone"
        raise UserError(f"--img_size {args.img_size}: {own}")
    return vae


def check_vae(vae: VAE, config: TokenBridgeConfig, path: str) -> None:
    """Raise UserError unless the VAE makes latents of the model's shape."""
    with as_user_error(f"--vae_path {path}"):
        vae.check_fits(config)


def warn_other_vae(checkpoint: Checkpoint, vae_sha256: str | None) -> None:
    """Say so if the checkpoint was trained on another VAE's latents: its images will be wrong."""
    trained = checkpoint.saved.get("vae_sha256")
    if trained and vae_sha256 and trained != vae_sha256 and dist.is_main():
        print(
            f"warning: {checkpoint.path} was trained with another VAE file (sha256 {trained[:12]}, "
            f"this one {vae_sha256[:12]}); unless its weights are the same, all figures are wrong",
            file=sys.stderr,
        )


def build_model(
    config: TokenBridgeConfig,
    checkpoint: Checkpoint,
    weights: str = "model",
    levels: tuple[Tensor, ...] | None = None,
    **options,
) -> TokenBridge:
    """A model, with the checkpoint's weights under that key if there is a checkpoint.

    levels: of a calibrated quantizer or a codebook, where no checkpoint brings them.
    options: grad_checkpointing and head_chunk of `TokenBridge`.
    """
    with as_user_error():
        model = TokenBridge(**config.to_dict(), **options)
    if levels is not None:
        with as_user_error(f"--quantizer {config.quantizer}: levels of other latents"):
            model.quantizer.set_levels(*levels)
    if not checkpoint:
        return model
    with as_user_error(f"{checkpoint.named}: no levels of its quantizer", (ValueError, KeyError)):
        if config.quantizer in LEVELS:
            state = checkpoint.weights("model")  # the averaged weights come without buffers
            model.quantizer.set_levels(*(state[name] for name in LEVELS[config.quantizer]))
    checkpoint.load_into(model, weights)
    return model


def cache_histogram(cached_path: str, vae_sha256: str | None) -> LatentHistogram:
    """The distribution of a cache's latents, not scaled, which --quantizer calibrated fits.

    Raises UserError unless the cache is of this VAE and knows it.
    """
    manifest = open_cache(cached_path, vae_sha256=vae_sha256).manifest if cached_path else None
    if not manifest or not manifest.get("histogram"):
        given = f"main_cache.py's, with a histogram (it is {cached_path or 'not given'})"
        raise UserError(f"--quantizer calibrated needs --cached_path, {given}")
    with as_user_error(f"--cached_path {cached_path}: manifest.json is damaged", (Exception,)):
        return LatentHistogram.from_dict(manifest["histogram"])


def calibrated_levels(
    histogram: LatentHistogram, levels: int, norm: tuple
) -> tuple[Tensor, Tensor]:
    """Those, float32, that fit latents normalised by `TokenBridgeConfig.latent_norm`."""
    scale, mean, std = norm
    scale = scale if std is None else 1 / torch.tensor(std, dtype=torch.float64)
    with as_user_error("--quantizer calibrated"):
        tables = fit_levels(histogram.counts, histogram.bin_widths(scale), levels)
    shift = 0 if mean is None else (torch.tensor(mean, dtype=torch.float64) * scale)[:, None]
    boundaries, values = ((table - shift).float() for table in tables)
    return boundaries, values


# --- all of it


@dataclass(frozen=True)
class Inputs:
    """What a training or an evaluation starts from, read and checked against each other."""

    checkpoint: Checkpoint  # false where a training begins from scratch
    vae: VAE | None  # None where cached latents make it unnecessary
    data: TrainingData
    config: TokenBridgeConfig
    validation: ValidationSet | None


def open_inputs(args: argparse.Namespace, read_only: bool = False) -> Inputs:
    """Raises UserError, naming flags and values, if they do not make a training."""
    checkpoint = open_checkpoint(args, read_only) or Checkpoint()
    vae = build_vae(args) if needs_vae(args) else None
    data = open_data(args, vae, checkpoint)
    config = build_config(args, checkpoint, data.manifest, vae, len(data.classes))
    if checkpoint and checkpoint.begins:
        with as_user_error(checkpoint.named, (ValueError, RuntimeError)):
            checkpoint, notes = checkpoint.fitted(config, data.classes, value(args, "seed"))
        dist.print_main("\n".join(notes))
    check_data(data, config, checkpoint)
    if vae is not None:
        check_vae(vae, config, value(args, "vae_path"))
    warn_other_vae(checkpoint, data.vae_sha256)
    data, validation = open_validation(args, data, config, vae)
    return Inputs(checkpoint, vae, data, config, validation)


def open_evaluated(args: argparse.Namespace, read_only: bool = False) -> Inputs:
    """The same for an evaluation, which has no data."""
    if not args.resume:
        raise UserError("--resume is missing: --evaluate needs the folder of a checkpoint")
    checkpoint = find_checkpoint(args.resume, args.output_dir, True, read_only)
    vae, path = build_vae(args), value(args, "vae_path")
    data = TrainingData([], [], "--evaluate", vae_digest(path))
    config = build_config(args, checkpoint, vae=vae)
    check_vae(vae, config, path)
    warn_other_vae(checkpoint, data.vae_sha256)
    return Inputs(checkpoint, vae, data, config, None)


# --- learning rate


def plan_rate(
    args: argparse.Namespace, batches: Batches, steps: range, checkpoint: Checkpoint
) -> tuple[LRSchedule, list[str]]:
    """As the flags say; its shape, where they do not, as that of the run that goes on; warnings of
    a rate that never gets high, or that jumps where a run goes on.

    steps: of this training. Raises UserError if another run's checkpoint leaves none; a run that
    has come to its end may be started again.
    """
    own, warnings = Path(args.output_dir).resolve(), []
    if not (steps or checkpoint.begins or checkpoint.path.resolve().is_relative_to(own)):
        raise UserError(
            f"{checkpoint.named} has done all of --epochs {args.epochs}; raise --epochs, or "
            f"begin a training with its weights: {FINETUNE} {args.resume}"
        )
    lr = args.lr if args.lr is not None else args.blr * batches.global_batch / BLR_BATCH
    model = args.model or checkpoint.argument("model") or value(args, "model")
    kind = args.lr_schedule or checkpoint.argument("lr_schedule")
    kind = kind or ("constant" if model.startswith("mar_") else "cosine")
    shape = args.min_lr, args.warmup_epochs, args.epochs, batches.steps_per_epoch
    rate = LRSchedule(lr, *shape, kind)
    if steps and rate.warmup_epochs >= rate.epochs:
        warnings.append(
            f"warning: --warmup_epochs {rate.warmup_epochs:g} does not end before --epochs "
            f"{rate.epochs}: the learning rate reaches {rate(steps[-1]):.3g} of {rate.lr:.3g}"
        )
    before = checkpoint.last_rate() if steps and steps.start else None
    if before is not None and not math.isclose(rate(steps.start - 1), before, rel_tol=0.01):
        warnings.append(
            f"warning: the learning rate of step {steps.start} was {before:.3g} when "
            f"{checkpoint.path} was saved, and is {rate(steps.start - 1):.3g} with --epochs "
            f"{rate.epochs}, --warmup_epochs {rate.warmup_epochs:g} and the other flags"
        )
    return rate, warnings


def check_agreement(facts: dict) -> None:
    """Raise UserError, on all processes, unless all have the same.

    Nodes that see different folders would train different models together without a word.
    """
    for rank, other in enumerate(dist.gather_objects(facts)):
        if differing := [n for n in facts | other if facts.get(n) != other.get(n)]:
            raise UserError(
                f"process {dist.rank()} and process {rank} have different values: {differing[0]}; "
                "all paths, of data, --resume and --vae_path, must name the same on all nodes"
            )
