"""The training loop: loader -> latents -> loss -> gradients -> AdamW -> EMA -> log, checkpoint.

A step sums the gradients of G micro-batches, shared by the processes, and divides by G. Whatever
a step does, all processes do alike: skip it, save after it, end after it.
"""

import time
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn

from util import dist, stop
from util.debug import Reload, write_dump
from util.errors import UserError
from util.evaluation.evaluator import Evaluator
from util.log import StepResult, TrainingLog
from util.look import Look
from util.optim import LRSchedule, guarded_step, seed_micro_batch, set_lr
from util.plan import Run, TrainSettings
from util.saver import EXIT_GRACE, CheckpointSaver


def train(
    run: Run,
    loader: Iterable[list[Tensor]],
    reload: Reload,
    schedule: LRSchedule,
    log: TrainingLog,
    saver: CheckpointSaver,
    settings: TrainSettings,
    look: Look,
) -> None:
    """loader: this process's micro-batches from the first step on. reload: any of them again.

    Raises Stopped, everything saved, if any process is asked to stop.
    """
    run.model.train()
    wrapped = dist.wrap(run.model, run.device)
    batches = iter(loader)
    steps = range(settings.plan.first_step, settings.last_step)
    if not steps:
        dist.print_main(f"nothing to train: step {steps.start} is the end of --epochs")
    try:
        with stop.deferred():
            if evaluation_due(steps.start, settings) and not evaluated(steps.start, settings):
                evaluate_online(run, log, steps.start, settings)  # it was stopped before its end
            if steps and steps.start and look.due(steps.start):  # it may have been killed there
                look(log, steps.start)
            for step in steps:
                lr = schedule(step)
                set_lr(run.optimizer, lr)
                result = train_step(run, wrapped, batches, step, settings)
                status = run.agreement.conclude(result.skipped)
                log.step(step, lr, result)
                if status.in_a_row >= settings.max_skipped:
                    give_up(run, reload, step - run.agreement.lag, settings)
                save_and_evaluate(run, log, saver, step + 1, lr, status.stop, settings, look)
                if status.stop:
                    saver.close()
                    dist.cleanup()  # nobody leaves before everything is saved
                    raise stop.acknowledge()
            saver.close()
    finally:
        saver.wait(EXIT_GRACE)
        log.close()


def train_step(
    run: Run, wrapped: nn.Module, batches: Iterator, step: int, settings: TrainSettings
) -> StepResult:
    """One optimizer step, from gradients that are the same on any number of processes."""
    schedule = settings.plan.schedule
    mine = range(dist.rank(), schedule.micro_batches, dist.world_size())
    loss, waited = torch.zeros((), device=run.device), 0.0
    finite = torch.ones((), dtype=torch.bool, device=run.device)
    grad_scale = run.scaler.scale(torch.full((), 1 / schedule.micro_batches, device=run.device))
    to_latents = run.tokenizer.from_moments if settings.cached else run.tokenizer.encode
    for j in mine:
        dist.beat(f"step {step + 1}: waiting for data")
        started = time.perf_counter()
        batch, labels = (x.to(run.device, non_blocking=True) for x in next(batches))
        waited += time.perf_counter() - started
        dist.beat(f"step {step + 1}: forward")
        seed_micro_batch(schedule.seed, step, j)
        latents = to_latents(batch)
        with dist.keep_gradients_local(wrapped, active=j != mine[-1]):
            with run.precision.autocast(run.device):
                loss_of_batch = wrapped(latents, labels, grad_scale=grad_scale)
                micro_loss = loss_of_batch / schedule.micro_batches
            dist.beat(f"step {step + 1}: backward")
            run.scaler.scale(micro_loss).backward()
        loss += micro_loss.detach()
        finite &= micro_loss.detach().isfinite() & latents.isfinite().all()
    run.scaler.unscale_(run.optimizer)
    grad_norm = nn.utils.clip_grad_norm_(run.model.parameters(), settings.grad_clip)
    skipped = run.agreement.vote(finite) | ~grad_norm.isfinite()
    guarded_step(run.optimizer, skipped.float())
    run.scaler.update()
    run.optimizer.zero_grad(set_to_none=True)
    run.ema.update(skipped.float())
    return StepResult(loss, grad_norm, skipped, waited)


def save_and_evaluate(
    run: Run,
    log: TrainingLog,
    saver: CheckpointSaver,
    done: int,
    lr: float,
    stopping: bool,
    settings: TrainSettings,
    look: Look,
) -> None:
    """What is due after so many steps. An evaluation can be stopped at once, so it saves first."""
    evaluates = evaluation_due(done, settings) and not stopping
    looks = look.due(done) and not stopping
    ends = stopping or evaluates or done == settings.last_step or saver.ends_epoch(done)
    if ends or looks:
        log.flush(done - 1, lr)  # for all processes: that the clock asks to save, one alone knows
    if ends or saver.due(done):
        saver.save(done, lambda: training_state(run, done, settings))
    if looks:
        look(log, done)
    if evaluates:
        evaluate_online(run, log, done, settings)


def evaluation_due(done: int, settings: TrainSettings) -> bool:
    epoch, position = divmod(done, settings.plan.schedule.steps_per_epoch)
    wanted = settings.evaluation is not None and done > 0 and position == 0
    return wanted and (done == settings.last_step or epoch % settings.eval_freq == 0)


def evaluated(done: int, settings: TrainSettings) -> bool:
    """Whether the evaluation after so many steps has its figures, on all processes alike."""
    found = (evaluation_folder(done, settings) / "metrics.json").exists()
    return dist.gather_objects(found)[0]


def evaluation_folder(done: int, settings: TrainSettings) -> Path:
    return settings.output_dir / f"eval-epoch{done // settings.plan.schedule.steps_per_epoch}"


def training_state(run: Run, done: int, settings: TrainSettings) -> dict:
    """What a checkpoint holds after so many steps: see `util.checkpoint`."""
    schedule = settings.plan.schedule
    return {
        "model": run.model.published_state_dict(),
        "model_ema": run.ema.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        # The published code scales in any precision and refuses an empty state.
        "scaler": run.scaler.state_dict() or torch.amp.GradScaler("cpu").state_dict(),
        "config": run.model.config.to_dict(),
        "epoch": done // schedule.steps_per_epoch - 1,  # the published meaning: the last whole one
        "step": done,
        "schedule": schedule.to_dict(),
        "skipped_steps": run.agreement.skipped(),
        **settings.extras,
    }


def give_up(run: Run, reload: Reload, step: int, settings: TrainSettings) -> None:
    """Leave what it takes to find out why step after step was skipped; raises UserError."""
    schedule = settings.plan.schedule
    path = write_dump(
        settings.output_dir / f"debug-step{step + 1:08d}.pth",
        run.model,
        run.tokenizer,
        run.precision,
        reload,
        schedule.seed,
        step,
        range(dist.rank(), schedule.micro_batches, dist.world_size()),
        settings.cached,
    )
    raise UserError(
        f"loss or gradient of {settings.max_skipped} steps in a row was not finite, up to step "
        f"{step + 1} (--max_skipped); look into it with --debug_dump {path}, then resume an "
        "earlier checkpoint with a lower --blr or another --precision"
    )


def evaluate_online(run: Run, log: TrainingLog, done: int, settings: TrainSettings) -> None:
    averaged = settings.evaluation.weights == "ema"
    with stop.immediate(), run.ema.swapped_in() if averaged else nullcontext():
        evaluator = Evaluator(run.model, run.tokenizer, run.device, run.precision, run.inception)
        folder = evaluation_folder(done, settings)
        results, samples = evaluator.evaluate(settings.evaluation, folder, training=True)
    log.scalars({f"eval/{name}": value for name, value in results.items()}, done)
    if samples is not None:
        log.image("eval/samples", samples, done)
    dist.barrier()
    log.restart()  # evaluating is not training time
