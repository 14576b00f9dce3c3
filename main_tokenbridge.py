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
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from engine_tokenbridge import Run, SkipVote, train, train_step
from models.tokenbridge import TokenBridge
from models.tokenizers.tokenizer import Tokenizer
from util import dist, doctor, stop
from util.args import (
    CONFIG,
    Parser,
    changed,
    check_mode,
    settings_saved,
    to_save,
    train_parser,
    value,
)
from util.checkpoint import Checkpoint
from util.data.batches import MicroBatchSampler
from util.data.images import collate_skipping
from util.data.latent_cache import as_one_batch
from util.device import Precision, compile_model, resolve_precision
from util.evaluation.evaluator import Evaluator
from util.evaluation.reference import prepare_measure
from util.evaluation.settings import drawn_classes, eval_settings
from util.evaluation.sweep import evaluate_checkpoint
from util.files import check_writable, only_job_in, refuse_busy
from util.flops import Meter, peak_flops, peak_memory, training_memory, training_step
from util.logging import LogSettings, TrainingLog, environment, figures_on_stdout
from util.optim import EMA, build_optimizer
from util.saver import CheckpointSaver, SaveSettings
from util.setup import (
    Inputs,
    Plan,
    build_model,
    cache_histogram,
    calibrated_levels,
    check_agreement,
    learning_rate,
    open_inputs,
    plan_batches,
    rate_warnings,
    refuse_finished,
    sampling_options,
)
from util.validation import Validation, ValidationSettings

GIB = 2**30
SAVED_COPIES = 4  # of the parameters in a checkpoint, fp32: weights, averages, AdamW's two moments


def make_parser() -> Parser:
    return train_parser(__doc__)


def main() -> None:
    parser = make_parser()
    args = parser.parse()
    check_mode(args)
    with figures_on_stdout(args.json) as figures:
        device = dist.init(args.device, args.dist_url, args.dist_on_itp, args.dist_timeout)
        precision = resolve_precision(args.precision, device)
        check_writable(args.output_dir, "--output_dir")
        dist.print_main(f"device {device.type}, precision {precision.name}")
        dist.print_main(changed(args, parser))
        job = evaluate_checkpoint if args.evaluate else dry_run if args.dry_run else train_model
        figures.update(job(args, device, precision) or {})
    dist.cleanup()


def train_model(args: argparse.Namespace, device: torch.device, precision: Precision) -> None:
    """Everything is built and checked before anything is written."""
    check_writable(args.log_dir or args.output_dir, "--log_dir")
    if dist.is_main():
        refuse_busy(args.output_dir, "--output_dir")
    inputs = open_inputs(args)
    run, plan, description = build_run(args, inputs, device, precision)
    with (
        only_job_in(args.output_dir, "--output_dir") if dist.is_main() else nullcontext(),
        settings_saved(args, run.output_dir / CONFIG, description, plan.first_step),
    ):
        train(run)


def build_run(
    args: argparse.Namespace, inputs: Inputs, device: torch.device, precision: Precision
) -> tuple[Run, Plan, str]:
    """The training, its plan, and what a user should see of it before weeks of it begin."""
    data, config, checkpoint = inputs.data, inputs.config, inputs.checkpoint
    plan = plan_batches(args, checkpoint, len(data.dataset))
    batches, first = plan.batches, plan.first_step
    steps = range(first, max(first, args.epochs * batches.steps_per_epoch))
    rate = learning_rate(args, batches)
    model = new_model(args, inputs, device)
    tokenizer = Tokenizer(inputs.vae, config.latent_scale).to(device)
    sampler = MicroBatchSampler(
        batches, steps, dist.rank(), dist.world_size(), flip=not args.no_flip
    )
    flags = to_save(args)
    if checkpoint is not None and not checkpoint.begins:  # what a run began with stays known
        flags["finetune"] = args.finetune or checkpoint.argument("finetune") or ""
    run = Run(
        model=model,
        ema=EMA(model.published_parameters(), args.ema_rate),
        optimizer=build_optimizer(model.published_parameters(), rate.lr, args.weight_decay),
        scaler=torch.amp.GradScaler(device.type, enabled=precision.needs_scaler),
        tokenizer=tokenizer,
        device=device,
        precision=precision,
        batches=batches,
        steps=steps,
        learning_rate=rate,
        data=data.dataset,
        sampler=sampler,
        loader=make_loader(args, data.dataset, sampler, device),
        cached=args.use_cached,
        log=make_log(args, inputs, flags, plan, precision, device),
        saver=CheckpointSaver(save_settings(args), batches.steps_per_epoch, first),
        validation=make_validation(args, inputs, tokenizer, device, precision, plan),
        skip_vote=SkipVote(device, skipped_before(checkpoint)),
        output_dir=Path(args.output_dir),
        facts={"classes": data.classes, "vae_sha256": data.vae_sha256, "args": flags},
        grad_clip=args.grad_clip,
        max_skipped=args.max_skipped,
        eval_freq=args.eval_freq,
    )
    if args.online_eval:
        add_evaluation(args, run, data.classes)
    warnings = rate_warnings(args, rate, first, checkpoint)  # which reads what is let go of below
    if checkpoint is not None:
        checkpoint.load_training_state(run.ema, run.optimizer, run.scaler)
        checkpoint.release()
        dist.print_main(f"loaded {checkpoint.path}")
    check_same(run, data.classes)
    refuse_finished(args, checkpoint, steps)
    lines = [*describe(args, run, inputs), *plan.notes]
    lines += [f"going on after step {first}"] if first else []
    description = "\n".join([*lines, *warnings])
    dist.print_main(description)
    return run, plan, description


def new_model(args: argparse.Namespace, inputs: Inputs, device: torch.device) -> TokenBridge:
    # The same initial weights on every process, whatever was built before the model.
    torch.manual_seed(value(args, "seed"))
    model = build_model(
        inputs.config,
        inputs.checkpoint,
        levels=new_levels(args, inputs),
        grad_checkpointing=args.grad_checkpointing,
        head_chunk=args.head_chunk,
    ).to(device)
    if args.compile:
        compile_model(model, device)
    return model


def make_log(
    args: argparse.Namespace,
    inputs: Inputs,
    flags: dict,
    plan: Plan,
    precision: Precision,
    device: torch.device,
) -> TrainingLog:
    settings = LogSettings(
        folder=args.log_dir or args.output_dir,
        every=args.log_freq,
        batches=plan.batches,
        first_step=plan.first_step,
        last_step=args.epochs * plan.batches.steps_per_epoch,
        about={
            "environment": environment(device, precision.name, dist.world_size()),
            "flags": flags,
            "model": inputs.config.to_dict(),
        },
        metrics_file=args.metrics_file,
    )
    meter = Meter(training_step(inputs.config), device, peak_flops(device, precision))
    return TrainingLog(settings, meter, inputs.data.count_skipped)


def add_evaluation(args: argparse.Namespace, run: Run, classes: list[str]) -> None:
    """--online_eval; a dry run loads no extractor."""
    config = run.model.config
    run.evaluation = eval_settings(args, config.class_num, classes)
    if not args.dry_run:
        folder = run.output_dir / "reference_features"
        measure = prepare_measure(args, config.img_size, run.device, folder)
        run.evaluator = Evaluator(run.model, run.tokenizer, run.device, run.precision, measure)


def check_same(run: Run, classes: list[str]) -> None:
    """Raise UserError unless all processes are about to train the same."""
    check_agreement(
        {
            "first step (--resume)": run.steps.start,
            "number of images": len(run.data),
            "number of validation images": len(run.validation.numbers),
            "classes": classes,
            "settings of the model": run.model.config.to_dict(),
            "micro-batches of a step": run.batches.to_dict(),
            "learning rate": run.learning_rate.lr,
        }
    )


def new_levels(args: argparse.Namespace, inputs: Inputs) -> tuple[Tensor, Tensor] | None:
    """Those of a calibrated quantizer at the start of a training; a checkpoint brings its own."""
    config = inputs.config
    if config.quantizer == "published" or inputs.checkpoint is not None:
        return None
    histogram = cache_histogram(args.cached_path, config.vae_embed_dim, inputs.data.vae_sha256)
    return calibrated_levels(histogram, config.quant_levels, config.latent_scale)


def skipped_before(checkpoint: Checkpoint | None) -> int:
    known = checkpoint is not None and "skipped_steps" in checkpoint.saved
    return checkpoint.whole_number("skipped_steps") if known else 0


def make_loader(
    args: argparse.Namespace, dataset, sampler: MicroBatchSampler, device: torch.device
) -> DataLoader:
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=as_one_batch if args.use_cached else collate_skipping,
        num_workers=args.num_workers,
        pin_memory=args.pin_mem and device.type == "cuda",
        worker_init_fn=stop.ignore_in_worker,
    )


def save_settings(args: argparse.Namespace) -> SaveSettings:
    return SaveSettings(
        folder=Path(args.output_dir),
        last_freq=args.save_last_freq,
        milestones=args.save_every,
        steps=args.save_steps,
        minutes=args.save_minutes,
        keep=args.keep_checkpoints,
    )


def make_validation(
    args: argparse.Namespace,
    inputs: Inputs,
    tokenizer: Tokenizer,
    device: torch.device,
    precision: Precision,
    plan: Plan,
) -> Validation:
    data, steps_per_epoch = inputs.data, plan.batches.steps_per_epoch
    loss_every, samples_every = (
        max(1, round(freq * steps_per_epoch)) if freq else 0
        for freq in (args.val_freq, args.preview_freq)
    )
    settings = ValidationSettings(
        loss_every=loss_every,
        loss_images=args.val_images,
        samples_every=samples_every,
        samples=args.preview_images,
        last_step=args.epochs * steps_per_epoch,
        sampling=sampling_options(args, num_iter=args.preview_iter, token_cache=0),
        classes=drawn_classes(args.classes, inputs.config.class_num, data.classes),
        names=data.classes,
    )
    images = inputs.validation if loss_every else None
    if images is not None:
        count = min(args.val_images, len(images.dataset))
        dist.print_main(f"validation loss on {count} images of {images.source}")
    return Validation(settings, tokenizer, device, precision, data.dataset, images)


def describe(args: argparse.Namespace, run: Run, inputs: Inputs) -> list[str]:
    """Lines that a user should see before a run of weeks begins."""
    data, batches = inputs.data, run.batches
    parameters = sum(p.numel() for p in run.model.parameters()) / 1e6
    images = f"{batches.images} images in {len(data.classes)} classes"
    return [
        f"{parameters:.1f} M parameters, {images if data.classes else data.source}",
        f"global batch {batches.global_batch} ({batches.micro_batches} x {batches.batch_size} on "
        f"{dist.world_size()} processes), lr {run.learning_rate.lr:.3g}, "
        f"{batches.steps_per_epoch} steps an epoch, {args.epochs} epochs, output {args.output_dir}",
    ]


# --- dry run


def dry_run(args: argparse.Namespace, device: torch.device, precision: Precision) -> dict:
    """The doctor's checks, one step on random latents, and what the training would take."""

    def step() -> dict:
        inputs = open_inputs(args, read_only=True)
        run, _, _ = build_run(args, inputs, device, precision)
        return step_figures(run, steps=2 if device.type != "cpu" or args.compile else 1)

    return doctor.dry_run(args, device, doctor.TRAINING_CHECKS, step)


def step_figures(run: Run, steps: int) -> dict:
    """Of the last of some steps as in training; the same on all processes."""
    encoding = 0.0 if run.cached or run.tokenizer.vae is None else encoding_seconds(run)
    run = replace(run, loader=random_batches(run), cached=True)
    run.start()
    if run.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(run.device)
    seconds = []
    for step in range(run.steps.start, run.steps.start + steps):
        started = time.perf_counter()
        result = train_step(run, step)
        loss = float(dist.all_reduce_sum(result.loss.clone()))
        if run.device.type != "cpu":
            torch.accelerator.synchronize(run.device)
        seconds.append(time.perf_counter() - started)
    last = seconds[-1] + encoding
    slowest = torch.tensor([seconds[0], last, float(peak_memory(run.device))])
    first, last, peak = dist.all_reduce_max(slowest.to(run.device)).tolist()
    config, batches = run.model.config, run.batches
    memory = training_memory(run.model, batches.batch_size, run.precision.name)
    parameters = sum(p.numel() for p in run.model.parameters())
    rate = batches.global_batch / last
    hours = len(run.steps) * last / 3600
    return {
        "loss": loss,
        "parameters": parameters,
        "images_per_step": batches.global_batch,
        "seconds_first_step": first,
        "seconds_per_step": last,
        "images_per_second": rate,
        "tflops_per_device": training_step(config) * rate / dist.world_size() / 1e12,
        "gib_estimated": sum(memory.values()) / GIB,
        "gib_peak": peak / GIB,
        "gib_per_checkpoint": 4 * SAVED_COPIES * parameters / GIB,
        "steps": len(run.steps),
        "hours": hours,
        "device_hours": hours * dist.world_size(),
    }


def encoding_seconds(run: Run) -> float:
    """Of this process's images of a step, by the VAE."""
    size = run.model.config.img_size
    images = torch.zeros(run.batches.batch_size, 3, size, size, device=run.device)
    for _ in range(1 if run.device.type == "cpu" else 2):  # a GPU chooses its kernels at first
        started = time.perf_counter()
        run.tokenizer.encode(images).sum().item()
        seconds = time.perf_counter() - started
    return seconds * len(run.own_micro_batches)


def random_batches(run: Run) -> Iterator[tuple[Tensor, Tensor]]:
    """Posteriors [B, 2C, h, w] of about unit scaled variance, labels [B], again and again."""
    config, size = run.model.config, run.batches.batch_size
    generator = torch.Generator().manual_seed(dist.rank())
    while True:
        shape = (size, *config.latent_shape)
        means = torch.randn(shape, generator=generator) / config.latent_scale
        labels = torch.randint(config.class_num, (size,), generator=generator)
        yield torch.cat([means, torch.full_like(means, -10.0)], dim=1), labels


cli = partial(dist.run, main)

if __name__ == "__main__":
    cli()
