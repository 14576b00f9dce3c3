"""Train a TokenBridge model, or evaluate one (--evaluate).

torchrun --nproc_per_node=8 main_tokenbridge.py --data_path DATA --output_dir OUT --resume OUT
torchrun --nproc_per_node=8 main_tokenbridge.py --evaluate --resume FOLDER --cfg 3.1
"""

import argparse
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from engine_tokenbridge import train, train_step
from models.tokenizers.tokenizer import Tokenizer
from util import config_file, dist, stop
from util.agreement import Agreement
from util.build import build_model, cache_histogram, calibrated_levels
from util.checkpoint import Checkpoint
from util.config_file import CONFIG
from util.data.images import Key, MicroBatchSampler, collate_skipping
from util.data.latent_cache import as_one_batch
from util.debug import Reload, replay
from util.device import Precision, compile_model, resolve_device, resolve_precision
from util.dry_run import open_what_is_there, rehearse
from util.ema import EMA
from util.errors import run
from util.evaluation.reference import prepare_measure
from util.evaluation.settings import drawn_classes, eval_settings
from util.evaluation.sweep import evaluate_checkpoint
from util.files import check_writable
from util.flops import training_step
from util.hardware import Meter, peak_flops
from util.heldout import HeldOut, find_heldout
from util.inputs import Inputs, TrainingData, check_agreement, open_inputs, refuse_finished
from util.json_output import figures_on_stdout
from util.lock import only_job_in, refuse_busy
from util.log import TrainingLog
from util.look import Look, LookSettings
from util.metrics_file import MetricsFile
from util.optim import BLR_BATCH, LRSchedule, build_optimizer
from util.parser import Parser
from util.plan import Run, TrainSettings, make_plan, rate_remarks
from util.provenance import environment
from util.saver import CheckpointSaver, SaveSettings
from util.training_args import check_mode, training_parser


def make_parser() -> Parser:
    return training_parser(__doc__)


def main() -> None:
    parser = make_parser()
    args = parser.parse()
    if args.debug_dump:
        replay(args.debug_dump, resolve_device(args.device))
        return
    check_mode(args)
    with figures_on_stdout(args.json) as figures:
        device = dist.init(args.device, args.dist_url, args.dist_on_itp, args.dist_timeout)
        precision = resolve_precision(args.precision, device)
        check_writable(args.output_dir, "--output_dir")
        dist.print_main(f"device {device.type}, precision {precision.name}")
        dist.print_main(config_file.changed(args, parser))
        work = evaluate_checkpoint if args.evaluate else train_model
        figures.update(work(args, device, precision))
    dist.cleanup()


def train_model(args: argparse.Namespace, device: torch.device, precision: Precision) -> dict:
    """Everything is built and checked before anything is written. Figures: of a --dry_run."""
    check_writable(args.log_dir or args.output_dir, "--log_dir")
    if dist.is_main() and not args.dry_run:
        refuse_busy(args.output_dir, "--output_dir")
    opened = open_what_is_there(args) if args.dry_run else open_inputs(args)
    inputs, held_out = find_heldout(args, opened)
    data, config = inputs.data, inputs.config
    classes = drawn_classes(args.classes, config.class_num, data.classes)
    evaluation = None
    if args.online_eval:
        evaluation = eval_settings(args, config.class_num, data.classes)
    plan = make_plan(args, inputs.checkpoint, len(data.dataset), dist.world_size())
    batches = plan.schedule
    lr = args.lr if args.lr is not None else args.blr * batches.global_batch / BLR_BATCH
    schedule = LRSchedule(
        lr,
        args.min_lr,
        args.warmup_epochs,
        args.epochs,
        batches.steps_per_epoch,
        args.lr_schedule,
    )
    remarks = rate_remarks(args, schedule, plan, inputs.checkpoint)
    training = build_run(args, inputs, lr, device, precision)
    restore(inputs.checkpoint, training)
    check_agreement(
        {
            "first step (--resume)": plan.first_step,
            "number of images": len(data.dataset),
            "number of held-out images": len(held_out.dataset) if held_out else 0,
            "classes": data.classes,
            "settings of the model": config.to_dict(),
            "micro-batches of a step": batches.to_dict(),
            "learning rate": lr,
        }
    )
    steps = range(plan.first_step, args.epochs * batches.steps_per_epoch)
    refuse_finished(inputs.checkpoint, args, steps)
    settings = TrainSettings(
        plan=plan,
        epochs=args.epochs,
        grad_clip=args.grad_clip,
        max_skipped=args.max_skipped,
        cached=args.use_cached,
        eval_freq=args.eval_freq,
        output_dir=Path(args.output_dir),
        extras={"classes": data.classes, "vae_sha256": data.vae_sha256, "args": plain(args)},
        evaluation=evaluation,
    )
    description = "\n".join([*describe(args, training, data, settings, lr), *remarks])
    dist.print_main(description)
    metrics_file = MetricsFile(args.metrics_file, plan.first_step)
    if args.dry_run:
        return rehearse(training, settings, inputs, args.compile, train_step)
    log = make_log(args, training, data, settings, metrics_file)
    look = make_look(args, training, data, held_out, settings, classes)
    loader, reload = make_loader(args, data, settings, device)
    saver = CheckpointSaver(save_settings(args), batches.steps_per_epoch, plan.first_step)
    settings_file = Path(args.output_dir) / CONFIG
    with (
        only_job_in(args.output_dir, "--output_dir") if dist.is_main() else nullcontext(),
        config_file.saved(args, settings_file, description, plan.first_step),
    ):
        train(training, loader, reload, schedule, log, saver, settings, look)
    return {}


def make_log(
    args: argparse.Namespace,
    training: Run,
    data: TrainingData,
    settings: TrainSettings,
    metrics_file: MetricsFile,
) -> TrainingLog:
    plan, device = settings.plan, training.device
    operations = training_step(training.model.config).total
    return TrainingLog(
        args.log_dir or args.output_dir,
        every=args.log_freq,
        images=plan.schedule.global_batch,
        total_steps=settings.last_step,
        steps_per_epoch=plan.schedule.steps_per_epoch,
        count_skipped=data.count_skipped,
        meter=Meter(operations, device, peak_flops(device, training.precision)),
        first_step=plan.first_step,
        about=about(args, training) if dist.is_main() else None,
        metrics_file=metrics_file,
    )


def make_look(
    args: argparse.Namespace,
    training: Run,
    data: TrainingData,
    held_out: HeldOut | None,
    settings: TrainSettings,
    classes: tuple[int, ...] | None,
) -> Look:
    """classes: that previews show; None is all of the model's."""
    if held_out is not None and args.val_freq:
        used = min(args.val_images, len(held_out.dataset))
        dist.print_main(f"held-out loss on {used} images of {held_out.source}")
    return Look(
        training.model,
        training.ema,
        training.tokenizer,
        training.device,
        training.precision,
        LookSettings.of(
            args, settings.plan.schedule.steps_per_epoch, settings.last_step, classes, data.classes
        ),
        data.dataset,
        held_out,
        args.val_images,
    )


def describe(
    args: argparse.Namespace,
    training: Run,
    data: TrainingData,
    settings: TrainSettings,
    lr: float,
) -> list[str]:
    """Lines that a user should see before a run of weeks begins."""
    plan, batches = settings.plan, settings.plan.schedule
    parameters = sum(p.numel() for p in training.model.parameters()) / 1e6
    images = f"{batches.images} images in {len(data.classes)} classes"
    lines = [
        f"{parameters:.1f} M parameters, {images if data.classes else data.source}",
        f"global batch {batches.global_batch} ({batches.micro_batches} x {batches.batch_size} on "
        f"{dist.world_size()} processes), lr {lr:.3g}, {batches.steps_per_epoch} steps an epoch, "
        f"{args.epochs} epochs, output {args.output_dir}",
    ]
    if plan.note:
        lines.append(f"note: {plan.note}")
    if plan.first_step:
        lines.append(f"going on after step {plan.first_step}")
    return lines


def save_settings(args: argparse.Namespace) -> SaveSettings:
    return SaveSettings(
        folder=Path(args.output_dir),
        last_freq=args.save_last_freq,
        milestones=args.save_every,
        steps=args.save_steps,
        minutes=args.save_minutes,
        keep=args.keep_checkpoints,
    )


def build_run(
    args: argparse.Namespace,
    inputs: Inputs,
    lr: float,
    device: torch.device,
    precision: Precision,
) -> Run:
    # The same initial weights on every process, whatever was built before the model.
    torch.manual_seed(args.seed)
    model = build_model(
        inputs.config,
        inputs.checkpoint,
        grad_checkpointing=args.grad_checkpointing,
        head_chunk=args.head_chunk,
        levels=new_levels(args, inputs),
    ).to(device)
    if args.compile:
        compile_model(model, device)
    inception = None
    if args.online_eval and not args.dry_run:
        reference = Path(args.output_dir) / "reference_features"
        inception = prepare_measure(args, inputs.config.img_size, device, reference)
    return Run(
        model=model,
        ema=EMA(model.published_parameters(), args.ema_rate),
        optimizer=build_optimizer(model.published_parameters(), lr, args.weight_decay),
        scaler=torch.amp.GradScaler(device.type, enabled=precision.needs_scaler),
        agreement=Agreement(device, skipped_before(inputs.checkpoint)),
        tokenizer=Tokenizer(inputs.vae, inputs.config.latent_scale).to(device),
        device=device,
        precision=precision,
        inception=inception,
    )


def skipped_before(checkpoint: Checkpoint | None) -> int:
    known = checkpoint is not None and "skipped_steps" in checkpoint.saved
    return checkpoint.whole_number("skipped_steps") if known else 0


def new_levels(args: argparse.Namespace, inputs: Inputs) -> tuple[Tensor, Tensor] | None:
    """Those of a calibrated quantizer at the start of a training; a checkpoint brings its own."""
    config = inputs.config
    if config.quantizer == "published" or inputs.checkpoint is not None:
        return None
    histogram = cache_histogram(args.cached_path, config.vae_embed_dim, inputs.data.vae_sha256)
    return calibrated_levels(histogram, config.quant_levels, config.latent_scale)


def restore(checkpoint: Checkpoint | None, training: Run) -> None:
    """Load EMA, optimizer and scaler of a checkpoint."""
    if checkpoint is None:
        return
    checkpoint.load_training_state(training.ema, training.optimizer, training.scaler)
    checkpoint.release()
    dist.print_main(f"loaded {checkpoint.path}")


def make_loader(
    args: argparse.Namespace, data: TrainingData, settings: TrainSettings, device: torch.device
) -> tuple[DataLoader, Reload]:
    """This process's micro-batches from the first step to the last, and any of them by number."""
    plan, batches = settings.plan, settings.plan.schedule
    sampler = MicroBatchSampler(
        len(data.dataset),
        batches.batch_size,
        batches.micro_batches,
        rank=dist.rank(),
        world_size=dist.world_size(),
        seed=batches.seed,
        flip=not args.no_flip,
        first_step=plan.first_step,
        num_steps=max(0, settings.last_step - plan.first_step),
    )
    loader = DataLoader(
        data.dataset,
        batch_sampler=sampler,
        collate_fn=as_one_batch if args.use_cached else collate_skipping,
        num_workers=args.num_workers,
        pin_memory=args.pin_mem and device.type == "cuda",
        worker_init_fn=stop.ignore_in_worker,
    )

    def reload(step: int, micro_batch: int) -> tuple[list[Key], Tensor, Tensor]:
        keys = sampler.keys(step, micro_batch)
        return keys, *default_collate([data.dataset[key] for key in keys])

    return loader, reload


def about(args: argparse.Namespace, training: Run) -> dict:
    """How the run is begun or gone on with, for those who look at it later."""
    return {
        "environment": environment(training.device, training.precision.name, dist.world_size()),
        "flags": plain(args),
        "model": training.model.config.to_dict(),
    }


def plain(args: argparse.Namespace) -> dict:
    """The flags as plain values, for the checkpoint."""
    return {key: value for key, value in vars(args).items() if key != "explicit"}


cli = partial(run, main)

if __name__ == "__main__":
    cli()
