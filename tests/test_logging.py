"""The training log and --metrics_file: means over steps, each step once, whatever happens."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from unittest import mock

import pytest
import torch
import wandb
from tensorboard.summary.writer import event_file_writer

from models.flops import Meter
from tests.conftest import ROOT, complaint
from tests.runs import evaluate, load, scalars, train
from util.data.batches import Batches
from util.logging import MetricsFile, StepResult, TrainingLog
from util.report import load as report

CPU = torch.device("cpu")
METER = Meter(2e9, CPU)


@pytest.fixture
def new_log() -> Iterator[Callable[..., TrainingLog]]:
    """Makes logs and closes them: TensorBoard's thread must not outlive tmp_path."""
    with ExitStack() as stack:

        def make(folder: Path, meter=METER, count_skipped=lambda: 0, **changes):
            settings = dict(every=2, batches=Batches(10, 1, 30, 0), first_step=0, last_step=6)
            settings |= dict(folder=str(folder), about={}) | changes
            log = TrainingLog(meter, count_skipped, **settings)
            stack.callback(log.close)
            return log

        yield make


def step(log, number: int, loss: float, norm: float = 1.0, waited=0.0, skipped=False) -> None:
    result = StepResult(torch.tensor(loss), torch.tensor(norm), torch.tensor(skipped), waited)
    log.step(number, 0.5, result)


def test_figures_are_means_over_the_steps_between(new_log, tmp_path, capsys):
    log = new_log(tmp_path)
    for number, (loss, norm) in enumerate([(1, 4), (2, 6), (5, 1)]):
        step(log, number, loss, norm)
    log.flush(2, 0.25)  # the end of an epoch, after one step
    log.flush(2, 0.25)  # nothing since
    log.close()
    figures = scalars(tmp_path)
    assert figures["train/loss"] == [(2, 1.5), (3, 5.0)]
    assert figures["train/grad_norm"] == [(2, 5.0), (3, 1.0)]
    assert figures["train/lr"] == [(2, 0.5), (3, 0.25)]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("epoch 0.67  step 2/6  loss 1.5000  lr 5.00e-01  grad 5.00  ")
    assert lines[1].startswith("epoch 1.00  step 3/6  loss 5.0000") and len(lines) == 2


def test_speed_and_share_of_the_peak_follow_the_clock(new_log, tmp_path, monkeypatch, capsys):
    """Two steps of 10 images and 2 GFLOP each in 4 s are 10 GFLOP/s, half of it on each of two."""
    now = iter([0.0, 4.0, 4.0])  # made; read and made anew after two steps
    monkeypatch.setattr(time, "perf_counter", lambda: next(now))
    monkeypatch.setattr("util.dist.world_size", lambda: 2)
    monkeypatch.setattr("util.logging.peak_memory", lambda device: 3 * 2**29)
    log = new_log(tmp_path, meter=Meter(flops=2e9, device=CPU, peak=2e10), last_step=62)
    step(log, 0, 1.0, waited=2.0)
    step(log, 1, 1.0, waited=1.0)
    log.close()
    figures = scalars(tmp_path)
    assert figures["speed/tflops_per_device"] == [(2, pytest.approx(0.005))]
    assert figures["speed/percent_of_peak"] == [(2, 25.0)]
    assert figures["speed/memory_gib"] == [(2, 1.5)]
    line = capsys.readouterr().out
    assert "5.0 images/s  5 GFLOP/s (25 %)  1.5 GiB  data wait 38 %  left 0:02:00" in line


def test_nothing_is_read_from_the_device_between(new_log, tmp_path, monkeypatch):
    """Every step waiting for the device would cost more than the log is worth."""
    log = new_log(tmp_path, every=20)
    for name in ("item", "tolist", "__float__", "__bool__", "cpu"):
        monkeypatch.setattr(torch.Tensor, name, None)
    for number in range(5):
        step(log, number, 1.0)


@pytest.mark.parametrize(("loss", "norm"), [(float("nan"), 1.0), (1.0, float("inf"))])
def test_skipped_steps_are_counted_and_not_in_the_means(new_log, tmp_path, capsys, loss, norm):
    log = new_log(tmp_path, every=3, count_skipped=lambda: 3)
    step(log, 0, 2.0, 4.0)
    step(log, 1, loss, norm, skipped=True)
    step(log, 2, 3.0, 5.0)
    for number in (3, 4, 5):
        step(log, number, loss, norm, skipped=True)
    log.close()
    figures = scalars(tmp_path)
    assert figures["train/loss"] == [(3, 2.5)] and figures["train/grad_norm"] == [(3, 4.5)]
    assert figures["train/skipped_steps"] == [(3, 1.0), (6, 3.0)]
    assert figures["data/skipped_images"] == [(3, 3.0), (6, 3.0)]
    first, second = capsys.readouterr().out.splitlines()
    assert first.endswith("skipped steps 1  skipped images 3") and "loss nan" in second


def test_resumed_log_hides_what_a_killed_run_wrote_later(new_log, tmp_path, monkeypatch):
    """So does the report about it."""
    # Files of one second and process are read by their number as text, in which 10 is before 9.
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))
    log = new_log(tmp_path, every=1)
    for number in range(4):
        step(log, number, 1.0)
    log.close()
    resumed = new_log(tmp_path, every=1, first_step=2)
    step(resumed, 2, 5.0)
    resumed.close()
    found = report.load(tmp_path).trainings[""].scalars
    assert found == scalars(tmp_path) and found["train/loss"] == [(1, 1.0), (2, 1.0), (3, 5.0)]


# --- --track

TRACK_AND_DIE = """
import os, sys
from tests.test_logging import METER, Batches, TrainingLog, step
batches, (folder, name) = Batches(10, 1, 30, 0), sys.argv[1:]
log = TrainingLog(METER, lambda: 0, folder, 1, batches, 0, 6, {}, track=name)
step(log, 0, 1.0)
os.kill(os.getpid(), 9)
"""


@pytest.fixture
def local(monkeypatch, tmp_path):
    """Neither a key nor a place of the user's."""
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HOME", "TRACKIO_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "home"))


def tracked(name: str, folder: Path, run_id: str) -> set[int]:
    """Steps with a loss; wandb has no reader of its own files."""
    if name == "trackio":
        from trackio.sqlite_storage import SQLiteStorage  # reads TRACKIO_DIR

        rows = SQLiteStorage.get_logs("tokenbridge", run_id)
        return {row["step"] for row in rows if "train/loss" in row}
    wandb.teardown()  # as at the end of a process: its service writes what it holds
    text = b"".join(file.read_bytes() for file in folder.glob(f"wandb/*/run-{run_id}.wandb"))
    return {int(step) for step in re.findall(rb"\x04step\x82\x01.(\d+)", text)}


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_killed_training_goes_on_in_the_same_run(name, local, new_log, tmp_path, capfd):
    folder = tmp_path / "run"
    killed = [sys.executable, "-c", TRACK_AND_DIE, str(folder), name]
    assert subprocess.run(killed, cwd=ROOT, capture_output=True).returncode == -9
    run_id = (folder / f"{name}.id").read_text().strip()
    log = new_log(folder, every=1, first_step=2, track=name)
    for number in range(2, 6):
        step(log, number, 5.0)
    log.image("validation/raw", torch.zeros(3, 8, 8, dtype=torch.uint8), 6)
    log.close()
    assert tracked(name, folder, run_id) >= {3, 4, 5, 6}
    assert any("media" in path.parts for path in tmp_path.rglob("*.png"))
    assert ("wandb: offline (no key); wandb sync" in capfd.readouterr().out) == (name == "wandb")
    step(new_log(folder, every=1, track=name), 0, 1.0)  # from scratch
    assert (folder / f"{name}.id").read_text().strip() != run_id


def test_what_hinders_a_tracker_is_said_and_other_processes_have_none(
    local, inputs, new_log, tmp_path, capsys, monkeypatch, refusal
):
    """Nor do they make the folder, which nobody makes before a first figure: test_errors.py."""
    monkeypatch.setenv("WANDB_MODE", "sideways")
    log = new_log(tmp_path, every=1, track="wandb")
    step(log, 0, 1.0)
    step(log, 1, 1.0)
    log.close()
    assert capsys.readouterr().err.count("warning: --track wandb: ") == 1
    assert len(scalars(tmp_path)["train/loss"]) == 2
    with monkeypatch.context() as patch:
        patch.setattr("util.dist.is_main", lambda: False)
        step(new_log(tmp_path / "other", every=1, track="wandb"), 0, 1.0)
    assert not (tmp_path / "other").exists()
    missing = mock.Mock(side_effect=PackageNotFoundError("wandb"))
    monkeypatch.setattr("util.logging.version", missing)
    assert "--track wandb: pip install" in refusal("train", inputs, track="wandb")


# --- --metrics_file


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def fill(path: Path, first_step: int, *steps: int) -> None:
    file = MetricsFile(str(path), first_step)
    for number in steps:
        file.write({"train/loss": number + 0.5}, number)


def test_resumed_run_goes_on_as_if_nothing_had_been(tmp_path):
    fill(tmp_path / "new" / "m.jsonl", 0, 10, 20, 30)
    with open(tmp_path / "new" / "m.jsonl", "a") as file:
        file.write('{"step": 40, "train/lo')  # killed
    fill(tmp_path / "new" / "m.jsonl", 20, 30, 40)
    fill(tmp_path / "whole.jsonl", 0, 10, 20, 30, 40)
    assert (tmp_path / "new" / "m.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    fill(tmp_path / "whole.jsonl", 0, 5)  # from scratch: that of the other run stays
    assert [line["step"] for line in lines_of(tmp_path / "whole.jsonl")] == [5]
    assert len(lines_of(tmp_path / "whole.jsonl.old")) == 4


def test_repeated_figures_are_replaced_others_stay_and_infinities_are_null(tmp_path):
    file = MetricsFile(str(tmp_path / "m.jsonl"))
    file.write({"a/fid": 1.0}, None)
    file.write({"b/fid": float("inf")}, None, replace=True)
    file.write({"a/fid": 3.0}, None, replace=True)
    file.write({"a/fid": 4.0}, 7, replace=True)
    assert lines_of(tmp_path / "m.jsonl") == [
        {"step": None, "b/fid": None},
        {"step": None, "a/fid": 3.0},
        {"step": 7, "a/fid": 4.0},
    ]


@pytest.mark.parametrize("content", ["hello\n", "[1]\n", '{"loss": 1}\n', "\n"])
def test_file_of_something_else_is_left_alone(tmp_path, content):
    (tmp_path / "m.jsonl").write_text(content)
    assert "--metrics_file" in complaint(MetricsFile, str(tmp_path / "m.jsonl"), 0)
    assert (tmp_path / "m.jsonl").read_text() == content


def test_full_disk_loses_figures_and_not_the_run(tmp_path, capsys):
    file = MetricsFile(str(tmp_path / "m.jsonl"), 0)
    file.write({"a": 1.0}, 1)
    (tmp_path / "m.jsonl").rename(tmp_path / "aside")
    os.symlink("/dev/full", tmp_path / "m.jsonl")
    file.write({"a": 2.0}, 2)
    assert "No space left on device" in capsys.readouterr().err
    (tmp_path / "m.jsonl").unlink()
    (tmp_path / "aside").rename(tmp_path / "m.jsonl")
    file.write({"a": 3.0}, 3)
    assert [line["step"] for line in lines_of(tmp_path / "m.jsonl")] == [1, 3]


def test_training_and_evaluation_write_into_one_file(inputs, tmp_path, capsys, refusal):
    """Six steps, the last two of them twice; then the figures of an evaluation, as JSON too."""
    figures, output = tmp_path / "figures.jsonl", tmp_path / "out"
    settings = dict(metrics_file=figures, log_freq=2)
    train(inputs, output, **settings, epochs=1)
    assert [line["step"] for line in lines_of(figures)] == [2, 3]
    assert set(lines_of(figures)[0]) > {"train/loss", "train/lr", "train/grad_norm"}
    with open(figures, "a") as file:
        file.write('{"step": 4, "train/loss": 9.0}\n')  # of a run that was killed
    train(inputs, output, **settings, resume="auto")
    assert [line["step"] for line in lines_of(figures)] == [2, 3, 4, 6]
    settings = dict(num_images=3, cfg=[1, 2], metrics_file=figures, json=True, no_metrics=True)
    capsys.readouterr()
    evaluate(inputs, tmp_path / "ev", output, **settings)
    printed = json.loads(capsys.readouterr().out)
    assert [e["settings"]["cfg"] for e in printed["evaluations"]] == [1.0, 2.0]
    assert printed["checkpoint"] == str(output / "checkpoint-last.pth")
    assert load(output)["step"] == printed["step"] == 6
    assert "--json" in refusal("train", inputs, json=True)  # of a training
