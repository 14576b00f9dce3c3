"""The training loop: loader -> latents -> loss -> gradients -> AdamW -> EMA -> log, checkpoint."""

import time
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from models.tokenbridge import TokenBridge
from models.tokenizer import Tokenizer
from util import dist
from util.checkpoint import save_checkpoint
from util.device import Precision
from util.ema import EMA
from util.evaluation import EvalSettings, evaluate
from util.log import TrainingLog
from util.metrics import Inception
from util.optim import LRSchedule, seed_micro_batch, set_lr


@dataclass(frozen=True)
class TrainSettings:
    """What the loop needs to know beside its objects. Epochs and steps count from 0."""

    first_step: int
    epochs: int
    steps_per_epoch: int
    accum_iter: int
    grad_clip: float
    seed: int
    cached: bool
    save_last_freq: int
    eval_freq: int
    output_dir: Path
    extras: dict  # plain values that every checkpoint carries
    evaluation: EvalSettings | None = None  # given: evaluate while training


@dataclass(frozen=True)
class Run:
    """The objects of a training run."""

    model: TokenBridge
    ema: EMA
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    tokenizer: Tokenizer
    device: torch.device
    precision: Precision
    inception: Inception | None = None  # of the evaluation while training


def train(
    run: Run,
    loader: Iterable[list[Tensor]],
    schedule: LRSchedule,
    log: TrainingLog,
    settings: TrainSettings,
) -> None:
    """loader: this process's micro-batches from the first step on, `accum_iter` a step."""
    run.model.train()
    wrapped = dist.wrap(run.model, run.device)
    batches = iter(loader)
    steps = range(settings.first_step, settings.epochs * settings.steps_per_epoch)
    if not steps:
        dist.print_main(f"nothing to train: step {steps.start} is the end of --epochs")
    for step in steps:
        lr = schedule(step)
        set_lr(run.optimizer, lr)
        loss, grad_norm, waited = train_step(run, wrapped, batches, step, settings)
        log.step(step, lr, loss, grad_norm, waited)
        epoch, position = divmod(step + 1, settings.steps_per_epoch)
        if position == 0:
            # Reads the losses up to here, so that no checkpoint is written of a broken model.
            log.flush(step, lr)
            end_epoch(run, log, settings, epoch)
            log.restart()  # saving and evaluating is not training time
    log.close()


def train_step(
    run: Run, wrapped: nn.Module, batches: Iterator, step: int, settings: TrainSettings
) -> tuple[Tensor, Tensor, float]:
    """One optimizer step.

    Returns this process's mean loss, the gradient norm before clipping, and the seconds waited
    for data.
    """
    loss, waited = torch.zeros((), device=run.device), 0.0
    for i in range(settings.accum_iter):
        started = time.perf_counter()
        batch, labels = (x.to(run.device, non_blocking=True) for x in next(batches))
        waited += time.perf_counter() - started
        seed_micro_batch(settings.seed, step, i * dist.world_size() + dist.rank())
        to_latents = run.tokenizer.from_moments if settings.cached else run.tokenizer.encode
        latents = to_latents(batch)
        with dist.keep_gradients_local(wrapped, active=i + 1 < settings.accum_iter):
            with run.precision.autocast(run.device):
                micro_loss = wrapped(latents, labels) / settings.accum_iter
            run.scaler.scale(micro_loss).backward()
        loss += micro_loss.detach()
    run.scaler.unscale_(run.optimizer)
    grad_norm = nn.utils.clip_grad_norm_(run.model.parameters(), settings.grad_clip)
    if run.scaler.is_enabled():
        # Overflow is how the scaler finds its scale: it skips this step, which counts as 0.
        grad_norm = grad_norm.nan_to_num(nan=0.0, posinf=0.0)
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.optimizer.zero_grad(set_to_none=True)
    run.ema.update()
    return loss, grad_norm, waited


def end_epoch(run: Run, log: TrainingLog, settings: TrainSettings, epochs_done: int) -> None:
    """Save and evaluate where it is due. Only the main process writes checkpoints."""
    last = epochs_done == settings.epochs
    if (last or epochs_done % settings.save_last_freq == 0) and dist.is_main():
        path = save_checkpoint(
            settings.output_dir,
            run.model,
            run.ema,
            run.optimizer,
            run.scaler,
            epoch=epochs_done - 1,  # the published meaning: the last epoch that is complete
            step=epochs_done * settings.steps_per_epoch,
            **settings.extras,
        )
        print(f"saved {path} after epoch {epochs_done}", flush=True)
    if settings.evaluation and (last or epochs_done % settings.eval_freq == 0):
        step = epochs_done * settings.steps_per_epoch
        folder = settings.output_dir / f"eval-epoch{epochs_done}"
        averaged = settings.evaluation.weights == "ema"
        with run.ema.swapped_in() if averaged else nullcontext():
            results, samples = evaluate(
                run.model,
                run.tokenizer,
                settings.evaluation,
                folder,
                run.device,
                run.precision,
                run.inception,
            )
        log.scalars({f"eval/{name}": value for name, value in results.items()}, step)
        if samples is not None:
            log.image("eval/samples", samples, step)
    dist.barrier()
