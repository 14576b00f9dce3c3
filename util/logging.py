"""What a run says: the training log, --track, --metrics_file, --json, the settings of its call.

Statistics are summed on the device; every `every` steps they are summed over the processes, read
once, and written by the main process.
"""

import argparse
import json
import math
import os
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from uuid import uuid4

import torch
import yaml
from torch import Tensor

from models.flops import Meter, peak_memory, readable
from util import dist
from util.args import PUBLISHED, SAVED_BY, to_save
from util.data.batches import Batches
from util.errors import as_user_error, program
from util.files import LOCK, atomic_write, check_writable

ABOUT = "run/about"  # TensorBoard's text of how a run was begun or gone on with
FLAG = "--metrics_file"


# --- the training log


@dataclass(frozen=True)
class StepResult:
    """One optimizer step, on this process; 0-d tensors on the device.

    loss: this process's part of the global batch's mean. grad_norm: before clipping, of all.
    skipped: bool, the same on all. waited: seconds for data.
    """

    loss: Tensor
    grad_norm: Tensor
    skipped: Tensor
    waited: float


class NoWriter:
    """Of the processes that write nothing."""

    def __getattr__(self, name: str):
        return lambda *args, **kwargs: None


@dataclass
class TrainingLog:
    """Scalars for TensorBoard, --track and --metrics_file, and a progress line.

    meter: what an image costs, and the device. count_skipped: how many unreadable images this
    process has passed over so far. every: steps between two lines. first_step: what TensorBoard
    and --metrics_file know of later steps is of a run that was killed, and goes. about:
    environment, flags and so on.
    """

    meter: Meter
    count_skipped: Callable[[], int]
    folder: str
    every: int
    batches: Batches
    first_step: int
    last_step: int
    about: dict
    metrics_path: str | None = None
    track: str | None = None  # wandb or trackio, besides

    def __post_init__(self):
        self.metrics_file = MetricsFile(self.metrics_path, self.first_step)
        if self.track:
            remedy = f"pip install -c requirements.lock -e '.[{self.track}]'"
            with as_user_error(f"--track {self.track}: {remedy}", (PackageNotFoundError,)):
                version(self.track)
        self.restart()

    @cached_property
    def writer(self):
        """TensorBoard's, on the main process.

        Made when there is something to write: a run that stops at its first image leaves no folder.
        """
        if not dist.is_main():
            return NoWriter()
        from torch.utils.tensorboard import SummaryWriter  # slow to import

        writer = SummaryWriter(self.folder, purge_step=self.first_step + 1)
        text = json.dumps(self.about, indent=1, default=str)
        # Indented, it is a block of code for TensorBoard and still JSON.
        writer.add_text(ABOUT, textwrap.indent(text, "    "), self.first_step)
        return writer

    @cached_property
    def tracker(self):
        """--track's, likewise."""
        return Tracker(self) if self.track and dist.is_main() else NoWriter()

    def restart(self) -> None:
        """Begin counting steps and time anew."""
        self.sums: Tensor | None = None
        self.steps, self.waited = 0, 0.0
        self.started = time.perf_counter()

    def step(self, step: int, lr: float, result: StepResult) -> None:
        """Count one step, and write at every multiple of `every`."""
        values = torch.stack([result.loss, result.grad_norm]).float()
        # A skipped step has no loss; what was not finite must not spoil the mean of the others.
        values = torch.where(result.skipped, 0.0, values)
        values = torch.cat([values, (~result.skipped).float()[None]])
        self.sums = values if self.sums is None else self.sums + values
        self.steps += 1
        self.waited += result.waited
        if (step + 1) % self.every == 0:
            self.flush(step, lr)

    def flush(self, step: int, lr: float) -> None:
        """Write what was counted since the last time."""
        if self.steps == 0:
            return
        extra = self.sums.new_tensor([self.waited, self.count_skipped()])
        sums = dist.all_reduce_sum(torch.cat([self.sums, extra]))
        loss, grad_norm, taken, waited, unreadable = sums.tolist()
        memory = self.sums.new_tensor([peak_memory(self.meter.device)])
        memory = dist.all_reduce_max(memory).item()
        elapsed = time.perf_counter() - self.started
        processes = dist.world_size()
        taken /= processes  # the same steps on all processes
        speed = self.batches.global_batch * self.steps / elapsed
        scalars = {
            "train/lr": lr,
            "speed/images_per_second": speed,
            "speed/data_wait_percent": 100 * waited / processes / elapsed,
        }
        scalars |= self.meter.figures(speed, processes, memory)
        if taken:
            scalars["train/loss"] = loss / taken
            scalars["train/grad_norm"] = grad_norm / taken / processes
        skipped = {"train/skipped_steps": self.steps - taken, "data/skipped_images": unreadable}
        scalars |= {name: count for name, count in skipped.items() if count}
        self.scalars(scalars, step + 1)
        self.writer.flush()
        dist.print_main(self._line(step + 1, scalars, elapsed / self.steps))
        self.restart()

    def _line(self, done: int, scalars: dict[str, float], seconds_per_step: float) -> str:
        seconds = round((self.last_step - done) * seconds_per_step)
        left = timedelta(seconds=seconds) if seconds < 86400 else f"{seconds / 3600:.0f} h"
        work = readable(scalars["speed/tflops_per_device"] * 1e12, "FLOP/s")
        if "speed/percent_of_peak" in scalars:
            work += f" ({scalars['speed/percent_of_peak']:.0f} %)"
        speed = scalars["speed/images_per_second"]
        notes = {"train/skipped_steps": "skipped steps", "data/skipped_images": "skipped images"}
        return (
            f"epoch {done / self.batches.steps_per_epoch:.2f}  "
            f"step {done}/{self.last_step}  "
            f"loss {scalars.get('train/loss', math.nan):.4f}  lr {scalars['train/lr']:.2e}  "
            f"grad {scalars.get('train/grad_norm', math.nan):.2f}  "
            f"{speed:.{0 if speed >= 100 else 1}f} images/s  {work}  "
            f"{scalars['speed/memory_gib']:.1f} GiB  "
            f"data wait {scalars['speed/data_wait_percent']:.0f} %  left {left}"
            + "".join(f"  {text} {scalars[n]:.0f}" for n, text in notes.items() if n in scalars)
        )

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Write figures, such as those of an evaluation, wherever a run is logged."""
        for name, number in values.items():
            self.writer.add_scalar(name, number, step)
        self.tracker.log(values, step)
        self.metrics_file.write(values, step)

    def histogram(self, name: str, counts: Tensor, step: int) -> None:
        """counts: [K] whole numbers, how often 0, 1, ..., K - 1 came up."""
        values = torch.arange(len(counts)).repeat_interleave(counts)
        self.writer.add_histogram(name, values, step, bins=torch.arange(len(counts) + 1) - 0.5)

    def image(self, name: str, image: Tensor, step: int) -> None:
        """image: uint8 [3, H, W]."""
        self.writer.add_image(name, image, step)
        self.tracker.log({name: image}, step)

    def close(self) -> None:
        for name in ("writer", "tracker"):
            if name in self.__dict__:  # asking for it would make its folder
                getattr(self, name).close()


class Tracker:
    """--track: curves and images under TensorBoard's names, in wandb or trackio.

    FOLDER/NAME.id keeps the run's id: a training that goes on, killed or not, does so in the same
    run, and one that begins from scratch in a new one. Trackers cannot forget: steps logged beyond
    the checkpoint come twice. What goes wrong is reported, and the training goes on without.
    """

    def __init__(self, log: TrainingLog):
        self.name, self.run, folder = log.track, None, Path(log.folder)
        kept = folder / f"{self.name}.id"
        run_id = f"{folder.absolute().name[:40]}-{uuid4().hex[:8]}"
        with self._reported():
            self.library = import_module(self.name)
            if log.first_step and kept.exists():
                run_id = kept.read_text().strip()
            with atomic_write(kept) as file:
                file.write(f"{run_id}\n".encode())
            about = json.loads(json.dumps(log.about, default=str))
            project = os.environ.get("WANDB_PROJECT", "tokenbridge")
            options = dict(project=project, config=about, resume="allow")
            if self.name == "wandb":
                self.run = self._start_wandb(run_id, folder, **options)
            else:  # in TRACKIO_DIR, by default in the home folder; it says so itself
                options |= dict.fromkeys(("embed", "auto_log_gpu", "auto_log_cpu"), False)
                self.run = self.library.init(name=run_id, **options)

    def _start_wandb(self, run_id: str, folder: Path, **options):
        """Online if WANDB_MODE says so or, without it, if wandb's server knows the key."""
        wandb, mode, why = self.library, os.environ.get("WANDB_MODE"), "WANDB_MODE"
        if mode is None:
            try:
                mode, why = ("online", "") if wandb.login(prompt=False) else ("offline", "no key")
            except wandb.Error as error:
                mode, why = "offline", " ".join(str(error).split())
        quiet = wandb.Settings(console="off", silent=True)
        run = wandb.init(id=run_id, dir=folder, mode=mode, settings=quiet, **options)
        run.define_metric("*", step_metric="step")  # wandb's own steps may not come twice
        remedy = f"{mode} ({why}); wandb sync --append {folder}/wandb/offline-run-*"
        print(f"wandb: {run.url if mode == 'online' else remedy}")
        return run

    def log(self, values: dict[str, float | Tensor], step: int) -> None:
        if self.run is None:
            return
        with self._reported():
            for name in [name for name in values if isinstance(values[name], Tensor)]:
                pixels = values[name].movedim(0, -1).cpu().numpy()
                values = values | {name: self.library.Image(pixels)}
            if self.name == "wandb":
                self.run.log({"step": step} | values)
            else:
                self.run.log(values, step=step)

    def close(self) -> None:
        with self._reported():
            if self.run is not None:
                self.run.finish()

    @contextmanager
    def _reported(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of another's network, disk or service
            self.run = None
            print(f"warning: --track {self.name}: {error}; goes on without", file=sys.stderr)


# --- figures for other programs


class MetricsFile:
    """--metrics_file: {"step": 20, "train/loss": 3.97, ...}, a line of JSON each time.

    The step is the number of steps done, null of a published checkpoint, which does not know it.
    The main process alone writes; what goes wrong while writing is reported, and the work goes on.
    first_step: with which a training goes on; what a killed one wrote of later steps goes, and the
    whole file of another training, to .old, where this one begins.
    Raises UserError if the file is not one of these, or cannot be.
    """

    def __init__(self, path: str | None, first_step: int | None = None):
        self.path = Path(path) if path and dist.is_main() else None
        self.first_step = first_step
        if self.path is not None:
            check_writable(self.path.parent, FLAG)
            self._lines()

    def write(self, values: dict[str, float], step: int | None, replace: bool = False) -> None:
        """Append the figures after so many steps. replace: the same ones of an earlier time go."""
        if self.path is None or not values:
            return
        first, self.first_step = self.first_step, None
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if first == 0 and self._lines():
                os.replace(self.path, f"{self.path}.old")
            elif first is not None:
                self._keep(lambda line: line["step"] is None or line["step"] <= first)
            if replace:
                self._keep(lambda line: line["step"] != step or not set(line) & set(values))
            content = json.dumps(finite({"step": step} | values)).encode() + b"\n"
            with open(self.path, "ab", buffering=0) as file:
                end = file.tell()
                if file.write(content) < len(content):  # a part would spoil the next line
                    file.truncate(end)
                    raise OSError("the disk is full")
        except OSError as error:
            print(f"warning: {FLAG} {self.path}: {error}; its figures are lost", file=sys.stderr)

    def _lines(self) -> list[dict]:
        """The whole lines there are; the one that a killed process was writing is not."""
        if not self.path.exists():
            return []
        with as_user_error(f"{FLAG} {self.path}: no file of figures", (OSError, ValueError)):
            text = self.path.read_text(encoding="utf-8")
            lines = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
            if all(isinstance(line, dict) and "step" in line for line in lines):
                return lines
            raise ValueError("it has other lines; name a new file")

    def _keep(self, condition: Callable[[dict], bool]) -> None:
        """Keep the lines that fulfil it."""
        if self.path.exists():
            kept = [json.dumps(line) + "\n" for line in self._lines() if condition(line)]
            with atomic_write(self.path) as file:
                file.write("".join(kept).encode())


@contextmanager
def figures_on_stdout(asked: bool) -> Iterator[dict]:
    """--json: a dict to fill, which the main process prints at the end; all else goes to stderr."""
    figures: dict = {}
    with redirect_stdout(sys.stderr) if asked else nullcontext():
        yield figures
    if asked and dist.is_main():
        print(json.dumps(finite(figures), indent=1), flush=True)


def finite(value):
    """JSON has no NaN and no infinity: null."""
    if isinstance(value, dict):
        return {key: finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# --- the settings of a call


def changed(args: argparse.Namespace, parser: argparse.ArgumentParser) -> str:
    """What is not as by default, in one line."""
    words = []
    for name, setting in to_save(args).items():
        if setting not in (parser.get_default(name), PUBLISHED.get(name, parser)):
            parts = setting if isinstance(setting, list) else [setting]
            words.append(f"{name}={' '.join(map(str, parts))}")
    return f"settings: {', '.join(words) or 'the defaults'}"


@contextmanager
def settings_saved(args: argparse.Namespace, path: Path, remarks: str = "") -> Iterator[None]:
    """Leave a file beside what a job makes that makes the same call again, from the main process.

    A job that fails before it has left anything else leaves nothing at all. remarks: what the
    settings led to, for comments.
    """
    if dist.is_main():
        settings = to_save(args) | {SAVED_BY: program()}
        text = "".join(f"# {line}\n" for line in remarks.splitlines())
        text += yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
        with as_user_error(f"{path}: cannot write", (OSError,)):
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(path) as file:
                file.write(text.encode())
    try:
        yield
    except BaseException:
        if dist.is_main() and {p.name for p in path.parent.iterdir()} <= {path.name, LOCK}:
            path.unlink(missing_ok=True)
        raise
