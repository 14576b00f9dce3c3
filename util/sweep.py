"""Evaluate a checkpoint at every combination of the sampling settings, and compare them."""

import argparse
from pathlib import Path

import torch

from models.tokenizer import Tokenizer
from util import dist, metrics
from util.build import ModelFlags, build_config, build_model, build_vae, check_vae, warn_other_vae
from util.checkpoint import find_checkpoint
from util.device import Precision
from util.errors import UserError
from util.evaluation import evaluate, sweep_settings
from util.files import sha256
from util.metrics import Measure


def evaluate_checkpoint(
    args: argparse.Namespace, device: torch.device, precision: Precision
) -> None:
    """Load a checkpoint and generate; without one there is nothing to evaluate."""
    if not args.resume:
        raise UserError("--evaluate needs --resume, the folder of the checkpoint to evaluate")
    checkpoint = find_checkpoint(args.resume, args.output_dir, must_exist=True)
    vae = build_vae(args)
    config = build_config(ModelFlags.of(args), checkpoint, manifest=None, vae=vae)
    check_vae(vae, config, args.vae_path)
    warn_other_vae(checkpoint, sha256(args.vae_path))
    points = sweep_settings(args, config.class_num)
    key = "model_ema" if args.eval_weights == "ema" else "model"
    model = build_model(config, checkpoint, key).to(device)
    tokenizer = Tokenizer(vae, config.latent_scale).to(device)
    measure = prepare_measure(args, config.img_size, device)
    dist.print_main(f"{args.eval_weights} weights of {checkpoint.path}")
    record = files_record(args, checkpoint.path) if dist.is_main() else {}
    checkpoint.release()
    for settings in points:
        folder = Path(args.output_dir) / settings.folder_name()
        evaluate(model, tokenizer, settings, folder, device, precision, measure, record)


def prepare_measure(args: argparse.Namespace, size: int, device: torch.device) -> Measure | None:
    """What the flags ask to measure of images of that size; all processes take part."""
    follows = args.fid_reference is not None
    measure = metrics.prepare(
        args.fid_stats,
        args.inception_weights,
        device,
        wanted=not args.no_metrics,
        feature_extractor=args.feature_extractor,
        size=size,
        folder_follows=follows,
    )
    if measure is None or not follows:
        return measure
    cache = Path(args.output_dir) / "reference_features"
    return metrics.compare_with_folder(
        measure, args.fid_reference, size, cache, args.num_workers, args.skip_bad_images
    )


def files_record(args: argparse.Namespace, checkpoint: Path) -> dict:
    """The files that were used, for metrics.json."""
    given = {"checkpoint": checkpoint, "vae": args.vae_path, "extractor": args.inception_weights}
    named = {name: Path(path) for name, path in given.items() if path is not None}
    return {
        "files": {name: {"path": str(p), "sha256": sha256(p)} for name, p in named.items()},
    }
