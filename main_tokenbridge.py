"""Train a TokenBridge model, or evaluate one (--evaluate).

torchrun --nproc_per_node=8 main_tokenbridge.py --data_path DATA --output_dir OUT --resume OUT
torchrun --nproc_per_node=8 main_tokenbridge.py --evaluate --resume FOLDER --cfg 3.1
"""

import argparse
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from itertools import repeat
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, default_convert

from engine_tokenbridge import Run, SkipVote, train, train_step
from models.flops import GIB, Meter, peak_flops, peak_memory, training_step
from models.sampler import SamplingOptions
from models.tokenbridge import TokenBridge
from models.tokenizers.tokenizer import Tokenizer
from util import args as flags
from util import dist, doctor, setup, stop
from util.checkpoint import WEIGHT_KEYS
from util.data.batches import MicroBatchSampler, plan_batches
from util.data.images import collate_skipping
from util.device import Precision, accelerate, environment, resolve_precision
from util.errors import UserError, as_user_error
from util.evaluation.evaluator import Evaluator
from util.evaluation.reference import prepare_measure
from util.evaluation.settings import drawn_classes, eval_settings
from util.evaluation.sweep import evaluate_checkpoint
from util.files import check_writable, only_job_in
from util.logging import TrainingLog, changed, figures_on_stdout, settings_saved
from util.optim import build_averages, build_optimizer
from util.saver import CheckpointSaver
from util.validation import Validation, ValidationSettings

make_parser = partial(flags.train_parser, __doc__)


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
        dist.print_main(changed(args, parser))
        job = evaluate_checkpoint if args.evaluate else dry_run if args.dry_run else train_model
        figures.update(job(args, device, precision) or {})
    dist.cleanup()


def train_model(args: argparse.Namespace, device: torch.device, precision: Precision) -> None:
    """Everything is built and checked before anything is written."""
    check_writable(args.log_dir or args.output_dir, "--log_dir")
    with only_job_in(args.output_dir, "--output_dir") if dist.is_main() else nullcontext():
        run, description = build_run(args, setup.open_inputs(args), device, precision)
        with settings_saved(args, run.output_dir / flags.CONFIG, description):
            train(run)


def build_run(
    args: argparse.Namespace, inputs: setup.Inputs, device: torch.device, precision: Precision
) -> tuple[Run, str]:
    """The training, and what a user should see of it before weeks of it begin."""
    data, checkpoint = inputs.data, inputs.checkpoint
    batches, first, notes = plan_batches(args, checkpoint, len(data.dataset))
    steps = range(first, max(first, args.epochs * batches.steps_per_epoch))
    rate, warnings = setup.plan_rate(args, batches, steps, checkpoint)
    model = new_model(args, inputs, device)
    named = list(model.published_parameters())
    sampler = MicroBatchSampler(batches, steps, dist.rank(), dist.world_size(), not args.no_flip)
    saved_args = flags.to_save(args)  # what a run began with stays known
    saved_args["finetune"] = args.finetune or checkpoint.argument("finetune") or ""
    run = Run(
        model=model,
        averages=build_averages(named, dict.fromkeys(args.ema_rate), bool(args.posthoc_ema)),
        optimizer=build_optimizer(named, rate.lr, args.weight_decay),
        scaler=torch.amp.GradScaler(device.type, enabled=precision.name == "fp16"),
        tokenizer=Tokenizer(inputs.vae, *inputs.config.latent_norm).to(device),
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
        skip_vote=SkipVote(device, checkpoint.whole_number("skipped_steps", 0)),
        output_dir=Path(args.output_dir),
        facts={"classes": data.classes, "vae_sha256": data.vae_sha256, "args": saved_args},
        grad_clip=args.grad_clip,
        max_skipped=args.max_skipped,
        eval_freq=args.eval_freq,
    )
    add_reports(args, run, inputs)
    if checkpoint:
        warnings += checkpoint.load_training_state(run.averages, run.optimizer, run.scaler)
        checkpoint.release()
        dist.print_main(f"loaded {checkpoint.path}")
    check_same_run(run)
    description = "\n".join([*describe(args, run, inputs), *notes, *warnings])
    dist.print_main(description)
    return run, description


def new_model(args: argparse.Namespace, inputs: setup.Inputs, device: torch.device) -> TokenBridge:
    config, levels = inputs.config, None
    if config.quantizer == "calibrated" and not inputs.checkpoint:
        histogram = setup.cache_histogram(args.cached_path, inputs.data.vae_sha256)
        levels = setup.calibrated_levels(histogram, config.quant_levels, config.latent_norm)
    elif config.quantizer == "codebook" and not inputs.checkpoint:
        if inputs.vae is None:
            raise UserError("--head codebook needs --vae_path, a VQ tokenizer, and data")
        levels = (inputs.vae.codebook * config.latent_scale,)
    # The same initial weights on every process, whatever was built before the model.
    torch.manual_seed(flags.value(args, "seed"))
    options = dict(grad_checkpointing=args.grad_checkpointing, head_chunk=args.head_chunk)
    model = setup.build_model(config, inputs.checkpoint, levels=levels, **options).to(device)
    accelerate(model, device, args.compile, args.cuda_graphs)
    return model


def check_same_run(run: Run) -> None:
    """Raise UserError unless all processes are about to train the same."""
    setup.check_agreement(
        {
            "first step (--resume)": run.steps.start,
            "number of validation images": len(run.validation.numbers),
            "classes": run.facts["classes"],
            "settings of the model": run.model.config.to_dict(),
            "number of images or of micro-batches": asdict(run.batches),
            "learning rate": run.learning_rate.lr,
        }
    )


def describe(args: argparse.Namespace, run: Run, inputs: setup.Inputs) -> list[str]:
    data, batches = inputs.data, run.batches
    parameters = sum(p.numel() for p in run.model.parameters()) / 1e6
    images = f"{batches.images} images in {len(data.classes)} classes"
    lines = [
        f"{parameters:.1f} M parameters, {images if data.classes else data.source}",
        f"global batch {batches.global_batch} ({batches.micro_batches} x {batches.batch_size} on "
        f"{dist.world_size()} processes), lr {run.learning_rate.lr:.3g}, {batches.steps_per_epoch} "
        f"steps an epoch, {args.epochs} epochs, output {args.output_dir}",
    ]
    if validated := len(run.validation.numbers):
        lines += [f"validation loss on {validated} images of {inputs.validation.source}"]
    return lines + ([f"going on after step {run.steps.start}"] if run.steps.start else [])


def add_reports(args: argparse.Namespace, run: Run, inputs: setup.Inputs) -> None:
    """What a run leaves: log, checkpoints, validation, evaluations."""
    config, names = inputs.config, inputs.data.classes
    run.log = TrainingLog(
        Meter(training_step(config), run.device, peak_flops(run.device, run.precision)),
        inputs.data.count_skipped,
        folder=args.log_dir or args.output_dir,
        every=args.log_freq,
        batches=run.batches,
        first_step=run.steps.start,
        last_step=run.steps.stop,
        about={
            "environment": environment(run.device, run.precision.name, dist.world_size()),
            "flags": run.facts["args"],
            "model": config.to_dict(),
        },
        metrics_path=args.metrics_file,
        track=args.track,
    )
    run.saver = CheckpointSaver(
        folder=run.output_dir,
        steps_per_epoch=run.batches.steps_per_epoch,
        saved_step=run.steps.start,
        last_freq=args.save_last_freq,
        milestones=args.save_every,
        snapshots=args.posthoc_ema,
        steps=args.save_steps,
        minutes=args.save_minutes,
        keep=args.keep_checkpoints,
    )
    run.validation = new_validation(args, run, inputs)
    if args.online_eval:
        run.evaluation = eval_settings(args, config.class_num, names)
        if args.eval_weights not in (known := [*WEIGHT_KEYS, *run.averages]):
            raise UserError(f"--eval_weights {args.eval_weights} is none of {', '.join(known)}")
    if args.online_eval and not args.dry_run:  # which loads no extractor
        folder = run.output_dir / "reference_features"
        measure = prepare_measure(args, config.img_size, run.device, folder)
        run.evaluator = Evaluator(run.model, run.tokenizer, run.device, run.precision, measure)


def new_validation(args: argparse.Namespace, run: Run, inputs: setup.Inputs) -> Validation:
    names = inputs.data.classes
    loss_every, samples_every = (
        max(1, round(freq * run.batches.steps_per_epoch)) if freq else 0
        for freq in (args.val_freq, args.preview_freq)
    )
    sampling = dict(cfg=args.cfg[0], temperature=args.temperature[0], num_iter=args.preview_iter)
    with as_user_error():
        sampling = SamplingOptions(**flags.sampling_flags(args) | sampling | {"token_cache": 0})
    settings = ValidationSettings(
        loss_every=loss_every,
        loss_images=args.val_images,
        samples_every=samples_every,
        samples=args.preview_images,
        last_step=run.steps.stop,
        sampling=sampling,
        classes=drawn_classes(args.classes, inputs.config.class_num, names),
        names=names,
    )
    images = inputs.validation if loss_every else None
    return Validation(settings, run.tokenizer, run.device, run.precision, run.data, images)


# --- dry run


def dry_run(args: argparse.Namespace, device: torch.device, precision: Precision) -> dict:
    """The doctor's checks, one step on made-up data, and what the training would take."""
    step = partial(try_step, args, device, precision)
    return doctor.dry_run(args, device, doctor.TRAINING_CHECKS, step)


def try_step(args: argparse.Namespace, device: torch.device, precision: Precision) -> dict:
    """Of a step as in training, the second where the first one compiles; on all processes alike."""
    run, _ = build_run(args, setup.open_inputs(args, read_only=True), device, precision)
    steps = 2 if device.type != "cpu" or args.compile else 1
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
