"""Train a TokenBridge model, or evaluate one (--evaluate).

torchrun --nproc_per_node=8 main_tokenbridge.py --data_path DATA --output_dir OUT --resume OUT
torchrun --nproc_per_node=8 main_tokenbridge.py --evaluate --resume FOLDER --cfg 3.1
"""

import argparse
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from itertools import repeat
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, default_convert

from engine_tokenbridge import Run, SkipVote, train, train_step
from models.flops import Meter, peak_flops, peak_memory, training_step
from models.tokenbridge import TokenBridge
from models.tokenizers.tokenizer import Tokenizer
from util import args as flags
from util import dist, doctor, setup, stop
from util.checkpoint import WEIGHT_KEYS
from util.data.batches import MicroBatchSampler
from util.data.images import collate_skipping
from util.device import Precision, accelerate, resolve_precision
from util.errors import UserError
from util.evaluation.evaluator import Evaluator
from util.evaluation.reference import prepare_measure
from util.evaluation.settings import drawn_classes, eval_settings
from util.evaluation.sweep import evaluate_checkpoint
from util.files import check_writable, only_job_in
from util.logging import LogSettings, TrainingLog, environment, figures_on_stdout
from util.optim import build_averages, build_optimizer
from util.saver import CheckpointSaver, SaveSettings
from util.validation import Validation, ValidationSettings

GIB = 2**30


def make_parser() -> flags.Parser:
    return flags.train_parser(__doc__)


def main() -> None:
    parser = make_parser()
    args = parser.parse()
    if args.dry_run and args.evaluate:
        raise UserError("--dry_run is of a training; leave --evaluate out (--no_evaluate)")
    if args.json and not (args.dry_run or args.evaluate):
        raise UserError("--json is for --evaluate and --dry_run; a training has --metrics_file")
    with figures_on_stdout(args.json) as figures:
        device = dist.init(args.device, args.dist_url, args.dist_on_itp, args.dist_timeout)
        precision = resolve_precision(args.precision, device, args.tf32)
        check_writable(args.output_dir, "--output_dir")
        dist.print_main(f"device {device.type}, precision {precision.name}")
        dist.print_main(flags.changed(args, parser))
        job = evaluate_checkpoint if args.evaluate else dry_run if args.dry_run else train_model
        figures.update(job(args, device, precision) or {})
    dist.cleanup()


def train_model(args: argparse.Namespace, device: torch.device, precision: Precision) -> None:
    """Everything is built and checked before anything is written."""
    check_writable(args.log_dir or args.output_dir, "--log_dir")
    with only_job_in(args.output_dir, "--output_dir") if dist.is_main() else nullcontext():
        run, description = build_run(args, setup.open_inputs(args), device, precision)
        with flags.settings_saved(args, run.output_dir / flags.CONFIG, description):
            train(run)


def build_run(
    args: argparse.Namespace, inputs: setup.Inputs, device: torch.device, precision: Precision
) -> tuple[Run, str]:
    """The training, and what a user should see of it before weeks of it begin."""
    data, config, checkpoint = inputs.data, inputs.config, inputs.checkpoint
    batches, first, notes = setup.plan_batches(args, checkpoint, len(data.dataset))
    steps = range(first, max(first, args.epochs * batches.steps_per_epoch))
    rate = setup.learning_rate(args, batches, checkpoint)
    notes += setup.check_rate(args, rate, steps, checkpoint)
    model = new_model(args, inputs, device)
    sampler = MicroBatchSampler(batches, steps, dist.rank(), dist.world_size(), not args.no_flip)
    saved_args, skipped = flags.to_save(args), 0
    if checkpoint is not None and not checkpoint.begins:  # what a run began with stays known
        saved_args["finetune"] = args.finetune or checkpoint.argument("finetune") or ""
    if checkpoint is not None and "skipped_steps" in checkpoint.saved:
        skipped = checkpoint.whole_number("skipped_steps")
    run = Run(
        model=model,
        averages=build_averages(
            model.published_parameters(), dict.fromkeys(args.ema_rate), bool(args.posthoc_ema)
        ),
        optimizer=build_optimizer(model.published_parameters(), rate.lr, args.weight_decay),
        scaler=torch.amp.GradScaler(device.type, enabled=precision.needs_scaler),
        tokenizer=Tokenizer(inputs.vae, *config.latent_norm).to(device),
        device=device,
        precision=precision,
        batches=batches,
        steps=steps,
        learning_rate=rate,
        data=data.dataset,
        sampler=sampler,
        loader=DataLoader(
            data.dataset,
            batch_sampler=sampler,
            collate_fn=default_convert if args.use_cached else collate_skipping,
            num_workers=args.num_workers,
            pin_memory=args.pin_mem and device.type == "cuda",
            worker_init_fn=stop.ignore_in_worker,
        ),
        cached=args.use_cached,
        skip_vote=SkipVote(device, skipped),
        output_dir=Path(args.output_dir),
        facts={"classes": data.classes, "vae_sha256": data.vae_sha256, "args": saved_args},
        grad_clip=args.grad_clip,
        max_skipped=args.max_skipped,
        eval_freq=args.eval_freq,
    )
    add_reports(args, run, inputs)
    if checkpoint is not None:
        notes += checkpoint.load_training_state(run.averages, run.optimizer, run.scaler)
        checkpoint.release()
        dist.print_main(f"loaded {checkpoint.path}")
    facts = {
        "first step (--resume)": first,
        "number of validation images": len(run.validation.numbers),
        "classes": data.classes,
        "settings of the model": config.to_dict(),
        "number of images or of micro-batches": batches.to_dict(),
        "learning rate": rate.lr,
    }
    setup.check_agreement(facts)
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    images = f"{batches.images} images in {len(data.classes)} classes"
    lines = [
        f"{parameters:.1f} M parameters, {images if data.classes else data.source}",
        f"global batch {batches.global_batch} ({batches.micro_batches} x {batches.batch_size} on "
        f"{dist.world_size()} processes), lr {rate.lr:.3g}, {batches.steps_per_epoch} steps an "
        f"epoch, {args.epochs} epochs, output {args.output_dir}",
    ]
    if validated := len(run.validation.numbers):
        lines += [f"validation loss on {validated} images of {inputs.validation.source}"]
    lines += [f"going on after step {first}"] if first else []
    description = "\n".join([*lines, *notes])
    dist.print_main(description)
    return run, description


def new_model(args: argparse.Namespace, inputs: setup.Inputs, device: torch.device) -> TokenBridge:
    config, levels = inputs.config, None
    if config.quantizer == "calibrated" and inputs.checkpoint is None:
        histogram = setup.cache_histogram(args.cached_path, inputs.data.vae_sha256)
        levels = setup.calibrated_levels(histogram, config.quant_levels, config.latent_norm)
    elif config.quantizer == "codebook" and inputs.checkpoint is None:
        if inputs.vae is None:
            raise UserError("--head codebook needs --vae_path, a VQ tokenizer, and data")
        levels = (inputs.vae.codebook * config.latent_scale,)
    # The same initial weights on every process, whatever was built before the model.
    torch.manual_seed(flags.value(args, "seed"))
    options = dict(grad_checkpointing=args.grad_checkpointing, head_chunk=args.head_chunk)
    model = setup.build_model(config, inputs.checkpoint, levels=levels, **options).to(device)
    accelerate(model, device, args.compile, args.cuda_graphs)
    return model


def add_reports(args: argparse.Namespace, run: Run, inputs: setup.Inputs) -> None:
    """What a run leaves: log, checkpoints, validation, evaluations."""
    data, config, steps_per_epoch = inputs.data, inputs.config, run.batches.steps_per_epoch
    about = {
        "environment": environment(run.device, run.precision.name, dist.world_size()),
        "flags": run.facts["args"],
        "model": config.to_dict(),
    }
    settings = LogSettings(
        folder=args.log_dir or args.output_dir,
        every=args.log_freq,
        batches=run.batches,
        first_step=run.steps.start,
        last_step=run.steps.stop,
        about=about,
        metrics_file=args.metrics_file,
        tracker=args.track,
    )
    meter = Meter(training_step(config), run.device, peak_flops(run.device, run.precision))
    run.log = TrainingLog(settings, meter, data.count_skipped)
    settings = SaveSettings(
        folder=run.output_dir,
        last_freq=args.save_last_freq,
        milestones=args.save_every,
        snapshots=args.posthoc_ema,
        steps=args.save_steps,
        minutes=args.save_minutes,
        keep=args.keep_checkpoints,
    )
    run.saver = CheckpointSaver(settings, steps_per_epoch, run.steps.start)
    loss_every, samples_every = (
        max(1, round(freq * steps_per_epoch)) if freq else 0
        for freq in (args.val_freq, args.preview_freq)
    )
    settings = ValidationSettings(
        loss_every=loss_every,
        loss_images=args.val_images,
        samples_every=samples_every,
        samples=args.preview_images,
        last_step=run.steps.stop,
        sampling=setup.sampling_options(args, num_iter=args.preview_iter, token_cache=0),
        classes=drawn_classes(args.classes, config.class_num, data.classes),
        names=data.classes,
    )
    images = inputs.validation if loss_every else None
    run.validation = Validation(
        settings, run.tokenizer, run.device, run.precision, data.dataset, images
    )
    if args.online_eval:
        run.evaluation = eval_settings(args, config.class_num, data.classes)
        if args.eval_weights not in (known := [*WEIGHT_KEYS, *run.averages]):
            raise UserError(f"--eval_weights {args.eval_weights} is none of {', '.join(known)}")
    if args.online_eval and not args.dry_run:  # which loads no extractor
        folder = run.output_dir / "reference_features"
        measure = prepare_measure(args, config.img_size, run.device, folder)
        run.evaluator = Evaluator(run.model, run.tokenizer, run.device, run.precision, measure)


# --- dry run


def dry_run(args: argparse.Namespace, device: torch.device, precision: Precision) -> dict:
    """The doctor's checks, one step on made-up data, and what the training would take."""

    def step() -> dict:
        run, _ = build_run(args, setup.open_inputs(args, read_only=True), device, precision)
        return step_figures(run, steps=2 if device.type != "cpu" or args.compile else 1)

    return doctor.dry_run(args, device, doctor.TRAINING_CHECKS, step)


def step_figures(run: Run, steps: int) -> dict:
    """Of the last of some steps as in training; the same on all processes."""
    cached = run.cached or run.tokenizer.vae is None
    run = replace(run, loader=made_up_batches(run, cached), cached=cached)
    run.start()
    for step in range(run.steps.start, run.steps.start + steps):
        started = time.perf_counter()
        loss = dist.all_reduce_sum(train_step(run, step).loss).item()  # which waits for the device
        seconds = time.perf_counter() - started
    slowest = torch.tensor([seconds, float(peak_memory(run.device))], device=run.device)
    seconds, peak = dist.all_reduce_max(slowest).tolist()
    rate, hours = run.batches.global_batch / seconds, len(run.steps) * seconds / 3600
    return {
        "loss": loss,
        "parameters": sum(p.numel() for p in run.model.parameters()),
        "images_per_step": run.batches.global_batch,
        "seconds_per_step": seconds,
        "images_per_second": rate,
        "tflops_per_device": training_step(run.model.config) * rate / dist.world_size() / 1e12,
        "gib_peak": peak / GIB,
        "steps": len(run.steps),
        "hours": hours,
        "device_hours": hours * dist.world_size(),
    }


def made_up_batches(run: Run, cached: bool) -> Iterator[tuple[Tensor, Tensor]]:
    """Black images uint8 [B, 3, S, S] or, cached, posteriors [B, 2C, h, w]; labels [B]."""
    config, size = run.model.config, run.batches.batch_size
    images = torch.zeros(size, 3, config.img_size, config.img_size, dtype=torch.uint8)
    channels, height, width = config.latent_shape
    posteriors = torch.randn(size, 2 * channels, height, width)
    return repeat((posteriors if cached else images, torch.zeros(size, dtype=torch.int64)))


cli = partial(dist.run, main)

if __name__ == "__main__":
    cli()
