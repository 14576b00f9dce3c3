"""The training loop: loader -> latents -> loss -> gradients -> AdamW -> EMA -> log, checkpoint.

A step sums the gradients of G micro-batches, shared by the processes, and divides by G. Whatever
a step does, all processes do alike: skip it, save after it, end after it.
"""

import time
from collections import deque
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import default_collate

from models.tokenbridge import TokenBridge
from models.tokenizers.tokenizer import Tokenizer
from util import dist, stop
from util.data.batches import Batches, MicroBatchSampler
from util.device import Precision
from util.errors import UserError
from util.evaluation.evaluator import Evaluator
from util.evaluation.settings import EvalSettings
from util.logging import StepResult, TrainingLog
from util.optim import EMA, LRSchedule, guarded_step, seed_micro_batch, set_lr
from util.saver import EXIT_GRACE, CheckpointSaver
from util.validation import Data, Validation


@dataclass
class Run:
    """A training: its objects, and what they work on. Steps count from 0.

    loader: this process's micro-batches from the first of `steps` on, images or posteriors (cached)
    and labels; sampler: which samples they hold. facts: plain values that every checkpoint carries.
    The reports come last, made of the others; evaluator, evaluation: None without --online_eval.
    """

    model: TokenBridge
    averages: dict[str, EMA]
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    tokenizer: Tokenizer
    device: torch.device
    precision: Precision
    batches: Batches
    steps: range
    learning_rate: LRSchedule
    data: Data
    sampler: MicroBatchSampler
    loader: Iterable
    cached: bool
    skip_vote: "SkipVote"
    output_dir: Path
    facts: dict
    grad_clip: float
    max_skipped: int
    eval_freq: int
    log: TrainingLog | None = None
    saver: CheckpointSaver | None = None
    validation: Validation | None = None
    evaluator: Evaluator | None = None
    evaluation: EvalSettings | None = None

    def start(self) -> None:
        """Before the first step: the model in training mode, wrapped for several processes."""
        self.model.train()
        self.wrapped = dist.wrap(self.model, self.device)
        self.micro_batches = iter(self.loader)

    @property
    def ema(self) -> EMA:
        """The average that is validated, evaluated and saved as `model_ema`."""
        return next(iter(self.averages.values()))


def train(run: Run) -> None:
    """Raises Stopped, everything saved, if any process is asked to stop."""
    run.start()
    first = run.steps.start
    if not run.steps:
        dist.print_main(f"nothing to train: step {first} is the end of --epochs")
    try:
        with stop.deferred():
            measured = (evaluation_folder(run, first) / "metrics.json").exists()
            if evaluation_due(run, first) and not dist.gather_objects(measured)[0]:
                evaluate(run, first)  # it was stopped before its end
            if run.steps and first and run.validation.due(first):  # it may have been killed there
                run.validation(run.model, run.ema, run.log, first)
            for step in run.steps:
                lr = run.learning_rate(step)
                set_lr(run.optimizer, lr)
                result = train_step(run, step)
                stopping, in_a_row = run.skip_vote.conclude(result.skipped)
                run.log.step(step, lr, result)
                if in_a_row >= run.max_skipped:
                    give_up(run, step - run.skip_vote.lag)
                save_and_evaluate(run, step + 1, stopping)
                if stopping:
                    run.saver.close()
                    dist.cleanup()  # nobody leaves before everything is saved
                    raise stop.acknowledge()
            run.saver.close()
    finally:
        run.saver.wait(EXIT_GRACE)
        run.log.close()


def train_step(run: Run, step: int) -> StepResult:
    """One optimizer step, from gradients that are the same on any number of processes."""
    loss, waited = torch.zeros((), device=run.device), 0.0
    finite = torch.ones((), dtype=torch.bool, device=run.device)
    share = 1 / run.batches.micro_batches
    grad_scale = run.scaler.scale(torch.full((), share, device=run.device))
    to_latents = run.tokenizer.from_moments if run.cached else run.tokenizer.encode
    for j in run.sampler.own:
        dist.beat(f"step {step + 1}: waiting for data")
        started = time.perf_counter()
        batch, labels = (x.to(run.device, non_blocking=True) for x in next(run.micro_batches))
        waited += time.perf_counter() - started
        dist.beat(f"step {step + 1}: forward")
        seed_micro_batch(run.batches.seed, step, j)
        latents = to_latents(batch)
        with dist.keep_gradients_local(run.wrapped, active=j != run.sampler.own[-1]):
            with run.precision.autocast(run.device):
                loss_of_batch = run.wrapped(latents, labels, grad_scale=grad_scale)
                micro_loss = loss_of_batch / run.batches.micro_batches
            dist.beat(f"step {step + 1}: backward")
            run.scaler.scale(micro_loss).backward()
        loss += micro_loss.detach()
        finite &= micro_loss.detach().isfinite() & latents.isfinite().all()
    run.scaler.unscale_(run.optimizer)
    grad_norm = nn.utils.clip_grad_norm_(run.model.parameters(), run.grad_clip)
    skipped = run.skip_vote(finite) | ~grad_norm.isfinite()
    guarded_step(run.optimizer, skipped.float())
    run.scaler.update()
    run.optimizer.zero_grad(set_to_none=True)
    for average in run.averages.values():
        average.update(skipped.float(), step + 1)
    return StepResult(loss, grad_norm, skipped, waited)


def save_and_evaluate(run: Run, done: int, stopping: bool) -> None:
    """What is due after so many steps. An evaluation can be stopped at once, so it saves first."""
    evaluates = evaluation_due(run, done) and not stopping
    validates = run.validation.due(done) and not stopping
    ends = stopping or evaluates or done == run.steps.stop or run.saver.ends_epoch(done)
    if ends or validates:
        # For all processes: that the clock asks to save, one alone knows.
        run.log.flush(done - 1, run.learning_rate(done - 1))
    if ends or run.saver.due(done):
        run.saver.save(done, lambda: training_state(run, done))
    if validates:
        run.validation(run.model, run.ema, run.log, done)
    if evaluates:
        evaluate(run, done)


def training_state(run: Run, done: int) -> dict:
    """What a checkpoint holds after so many steps: see `util.checkpoint`."""
    (_, averaged), *others = ((n, ema.state_dict()) for n, ema in run.averages.items())
    return {
        "model": run.model.published_state_dict(),
        "model_ema": averaged,
        **({"averages": dict(others)} if others else {}),
        "optimizer": run.optimizer.state_dict(),
        # The published code scales in any precision and refuses an empty state.
        "scaler": run.scaler.state_dict() or torch.amp.GradScaler("cpu").state_dict(),
        "config": run.model.config.to_dict(),
        "epoch": done // run.batches.steps_per_epoch - 1,  # as published: the last whole one
        "step": done,
        "schedule": asdict(run.batches),
        "skipped_steps": run.skip_vote.skipped(),
        **run.facts,
    }


# --- evaluation while training


def evaluation_due(run: Run, done: int) -> bool:
    epoch, position = divmod(done, run.batches.steps_per_epoch)
    if run.evaluation is None or done == 0 or position:
        return False
    return done == run.steps.stop or epoch % run.eval_freq == 0


def evaluation_folder(run: Run, done: int) -> Path:
    return run.output_dir / f"eval-epoch{done // run.batches.steps_per_epoch}"


def evaluate(run: Run, done: int) -> None:
    average = ({"ema": run.ema, "model": None} | run.averages)[run.evaluation.weights]
    with stop.deferred(active=False), average.swapped_in() if average else nullcontext():
        figures, samples = run.evaluator.evaluate(
            run.evaluation, evaluation_folder(run, done), training=True
        )
    run.log.scalars({f"eval/{name}": figure for name, figure in figures.items()}, done)
    if samples is not None:
        run.log.image("eval/samples", samples, done)
    dist.barrier()
    run.log.restart()  # evaluating is not training time


# --- numbers that are not finite


class SkipVote:
    """What all processes must know of a step, without making the GPU wait for it.

    Two facts travel in one small all-reduce: whether a process was asked to stop, and whether one
    met numbers that are not finite, by which all skip the step, on the device. What the host must
    know is read a step late on a GPU, by then without waiting, after the same step on all.
    skipped: steps that were skipped before this run.
    """

    def __init__(self, device: torch.device, skipped: int = 0):
        self.device = device
        self.lag = 1 if device.type == "cuda" else 0
        self.counts = torch.tensor([skipped, 0], device=device)
        self.votes = torch.zeros(2, device=device)
        self.unread: deque[tuple[Tensor, torch.cuda.Event | None]] = deque()

    def __call__(self, finite: Tensor) -> Tensor:
        """finite: 0-d bool, of this process -> whether any has met numbers that are not."""
        asked = torch.full((), float(stop.requested()), device=self.device)
        self.votes = dist.all_reduce_max(torch.stack([asked, (~finite).float()]))
        return self.votes[1] > 0

    def conclude(self, skipped: Tensor) -> tuple[bool, int]:
        """skipped: 0-d bool, the same on all processes -> whether to stop, and how many of the
        latest steps in a row were skipped, `lag` steps ago.
        """
        self.counts = torch.stack([self.counts[0] + skipped, (self.counts[1] + 1) * skipped])
        values = torch.stack([self.votes[0].long(), self.counts[1]])
        host, copied = values.to("cpu", non_blocking=self.lag > 0), None  # pinned, on a GPU
        if self.lag:
            copied = torch.cuda.Event()
            copied.record()
        self.unread.append((host, copied))
        if len(self.unread) <= self.lag:
            return False, 0
        host, copied = self.unread.popleft()
        if copied is not None:
            copied.synchronize()
        asked, in_a_row = host.tolist()
        return bool(asked), in_a_row

    def skipped(self) -> int:
        """Steps skipped so far; waits for the device."""
        return int(self.counts[0])


def give_up(run: Run, step: int) -> None:
    """Raise UserError with the first module, micro-batch and samples that are not finite."""
    gathered = dist.gather_objects([find_cause(run, step, j) for j in run.sampler.own])
    causes = [cause for own in gathered for cause in own if cause]
    raise UserError(
        f"loss or gradient of {run.max_skipped} steps in a row was not finite, up to step "
        f"{step + 1} (--max_skipped): {'; '.join(causes[:3]) or 'only in the gradients'}; resume "
        "an earlier checkpoint with a lower --blr or another --precision"
    )


@torch.no_grad()
def find_cause(run: Run, step: int, j: int) -> str:
    """Where the numbers of a micro-batch leave the finite, in words; "" if they do not."""
    keys, names = run.sampler.keys(step, j), []

    def check(name: str, output) -> None:
        if not names and isinstance(output, Tensor) and not output.isfinite().all():
            names.append(name)

    batch, labels = (x.to(run.device) for x in default_collate([run.data[key] for key in keys]))
    seed_micro_batch(run.batches.seed, step, j)
    latents = run.tokenizer.from_moments(batch) if run.cached else run.tokenizer.encode(batch)
    check("its latents", latents)
    hooks = [
        module.register_forward_hook(lambda _m, _i, output, name=name: check(name, output))
        for name, module in run.model.named_modules()
        if not list(module.children())
    ]
    with run.precision.autocast(run.device):
        check("the logits", run.model(latents, labels))  # which no module puts out
    for hook in hooks:
        hook.remove()
    samples = " ".join(f"{index}{' flipped' if flip else ''}" for index, flip in keys[:8])
    return f"in micro-batch {j} (samples {samples}) first in {names[0]}" if names else ""
