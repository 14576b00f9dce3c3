"""--dry_run: all is built and checked as for the run, one step is made on random latents, and what
the run would take is told. Nothing is written.

What data and VAE do not say because none was named is left open: so a machine can be tried out
before ImageNet is there.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from util import dist
from util.build import ModelFlags, build_config, build_vae
from util.flops import (
    GIB,
    count_parameters,
    peak_flops,
    peak_memory,
    training_memory,
    training_step,
)
from util.inputs import (
    Inputs,
    TrainingData,
    fit,
    open_checkpoint,
    open_inputs,
    prepare_finetuning,
)
from util.log import StepResult
from util.plan import Run, TrainSettings

SAVED_COPIES = 4  # of the parameters in a checkpoint, fp32: weights, averages, AdamW's two moments
SIZES = ("estimated", "peak", "of_states", "of_device", "per_checkpoint")


class NoData:
    """Stands for a training set that nobody has named: as many images as make one step."""

    def __init__(self, args: argparse.Namespace):
        self.count = args.global_batch or args.batch_size * args.accum_iter * dist.world_size()

    def __len__(self) -> int:
        return self.count


def open_what_is_there(args: argparse.Namespace) -> Inputs:
    """The inputs as for the run; without data, where neither the flags nor the disk have any."""
    flags = ("data_path", "cached_path", "use_cached", "val_path", "val_cached_path", "holdout")
    named = any(name in args.explicit and getattr(args, name) for name in flags)
    if named or (Path(args.data_path) / "train").is_dir():
        return open_inputs(args)
    checkpoint = open_checkpoint(args.resume, args.output_dir, True, args.finetune)
    begins = checkpoint is not None and checkpoint.begins
    checkpoint = prepare_finetuning(checkpoint, args, []) if begins else checkpoint
    wanted = "vae_path" in args.explicit or Path(args.vae_path).exists()
    vae = build_vae(args) if wanted else None
    config = build_config(ModelFlags.of(args), checkpoint, None, vae)
    checkpoint = fit(checkpoint, config, [], args.seed) if begins else checkpoint
    data = TrainingData(NoData(args), [], "no --data_path or --cached_path", None)
    return Inputs(checkpoint, vae, data, config)


def rehearse(
    run: Run,
    settings: TrainSettings,
    inputs: Inputs,
    compiled: bool,
    train_step: Callable[..., StepResult],
) -> dict:
    """One step as in training, and what follows from it; the same figures on all processes.

    train_step: the training loop's.
    """
    if run.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(run.device)
    steps = 2 if run.device.type != "cpu" or compiled else 1
    loss, first, step = time_step(run, replace(settings, cached=True), steps, train_step)
    encoding = encoding_seconds(run, settings) if encodes(settings, inputs) else 0.0
    slowest = torch.tensor([first, step, encoding, float(peak_memory(run.device))])
    first, step, encoding, peak = dist.all_reduce_max(slowest.to(run.device)).tolist()
    figures = {
        "device": run.device.type,
        "precision": run.precision.name,
        "processes": dist.world_size(),
        "loss": loss,
        "seconds_first_step": first,
        "seconds_per_step": step + encoding,
        "seconds_encoding": encoding,
        "bytes_peak": int(peak),
        "bytes_of_device": device_bytes(run.device),
        "share_of_peak": None,
    }
    figures |= of_the_model(run, settings.plan.schedule.batch_size)
    figures |= of_the_run(settings, inputs, step + encoding)
    images = figures["images_per_second"] / dist.world_size()
    figures["flops_per_second"] = figures["flops_per_image"] * images  # of one device
    most = peak_flops(run.device, run.precision)
    if most is not None:
        figures["share_of_peak"] = figures["flops_per_second"] / most
    dist.print_main(told(figures, inputs))
    return figures


def time_step(
    run: Run, settings: TrainSettings, steps: int, train_step: Callable[..., StepResult]
) -> tuple[float, float, float]:
    """Loss of the last of the steps, seconds of the first one and of the last.

    The first one also compiles, chooses kernels and sets memory aside.
    """
    run.model.train()
    wrapped = dist.wrap(run.model, run.device)
    batches = random_batches(run, settings.plan.schedule.batch_size)
    seconds = []
    for step in range(steps):
        started = time.perf_counter()
        result = train_step(run, wrapped, batches, settings.plan.first_step + step, settings)
        loss = float(dist.all_reduce_sum(result.loss.clone()))
        if run.device.type != "cpu":
            torch.accelerator.synchronize(run.device)
        seconds.append(time.perf_counter() - started)
    return loss, seconds[0], seconds[-1]


def device_bytes(device: torch.device) -> int | None:
    """All the memory of a GPU."""
    if device.type != "cuda":
        return None
    return torch.cuda.get_device_properties(device).total_memory


def random_batches(run: Run, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Posteriors [B, 2C, h, w] of about unit scaled variance, labels [B], again and again."""
    config = run.model.config
    generator = torch.Generator().manual_seed(dist.rank())
    shape = (batch_size, *config.latent_shape)
    while True:
        means = torch.randn(shape, generator=generator) / config.latent_scale
        labels = torch.randint(config.class_num, (batch_size,), generator=generator)
        yield torch.cat([means, torch.full_like(means, -10.0)], dim=1), labels


def encodes(settings: TrainSettings, inputs: Inputs) -> bool:
    return not settings.cached and inputs.vae is not None


def encoding_seconds(run: Run, settings: TrainSettings) -> float:
    """Of the images of a step, by the VAE, on this process."""
    schedule, size = settings.plan.schedule, run.model.config.img_size
    images = torch.zeros(schedule.batch_size, 3, size, size, device=run.device)
    for _ in range(1 if run.device.type == "cpu" else 2):
        started = time.perf_counter()
        run.tokenizer.encode(images).sum().item()
        seconds = time.perf_counter() - started
    return seconds * -(-schedule.micro_batches // dist.world_size())


def of_the_model(run: Run, batch_size: int) -> dict:
    """Figures that need no step. batch_size: of a micro-batch."""
    count = count_parameters(run.model)
    memory = training_memory(run.model, batch_size, run.precision.name, run.device.type)
    return {
        "parameters": count,
        "flops_per_image": training_step(run.model.config),
        "bytes_estimated": sum(memory.values()),
        "bytes_of_states": memory["states"],
        "bytes_per_checkpoint": 4 * SAVED_COPIES * count,
    }


def of_the_run(settings: TrainSettings, inputs: Inputs, step: float) -> dict:
    """step: seconds. images is None, and no time known, where there are no data."""
    schedule = settings.plan.schedule
    found = {
        "images_per_step": schedule.global_batch,
        "images_per_second": schedule.global_batch / step,
        "images": None,
    }
    if isinstance(inputs.data.dataset, NoData):
        return found
    steps = max(0, settings.last_step - settings.plan.first_step)
    hours = steps * step / 3600
    return found | {
        "images": len(inputs.data.dataset),
        "steps_per_epoch": schedule.steps_per_epoch,
        "steps_to_go": steps,
        "hours": hours,
        "device_hours": hours * dist.world_size(),
    }


def told(found: dict, inputs: Inputs) -> str:
    """The figures for people."""
    size = {name: (found[f"bytes_{name}"] or 0) / GIB for name in SIZES}
    there = f" of {size['of_device']:.1f}" if size["of_device"] else ""
    share = f", {100 * found['share_of_peak']:.0f} % of its peak" if found["share_of_peak"] else ""
    vae = f", {found['seconds_encoding']:.3g} s of it the VAE" if found["seconds_encoding"] else ""
    lines = [
        f"dry run: a step of {found['images_per_step']} random latents, loss {found['loss']:.4f}",
        f"parameters  {found['parameters']:,}",
        f"memory      {size['estimated']:.2f} GiB by estimate, {size['of_states']:.2f} of it "
        "weights, gradients, averages and moments",
        f"            {size['peak']:.2f}{there} GiB at most in this step",
        f"step        {found['seconds_per_step']:.3g} s (the first one "
        f"{found['seconds_first_step']:.3g} s){vae}; {found['images_per_second']:.3g} images/s, "
        f"{found['flops_per_second'] / 1e12:.3g} TFLOP/s of each device{share}",
    ]
    if found["images"] is None:
        lines.append(f"cost        not known: {inputs.data.source}")
    else:
        lines.append(
            f"cost        {found['steps_to_go']:,} steps, {found['hours']:.3g} hours, "
            f"{found['device_hours']:.3g} device-hours; waiting for data, saving and evaluating "
            "come on top"
        )
    lines.append(f"checkpoint  {size['per_checkpoint']:.2f} GiB each")
    return "\n".join([*lines, "nothing was written"])
