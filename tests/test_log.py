"""The training log: means over its steps, figures in TensorBoard, and what was skipped."""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from util.log import StepResult, TrainingLog


@pytest.fixture
def new_log(tmp_path) -> Iterator[Callable[..., TrainingLog]]:
    """Makes logs and closes them: TensorBoard's thread must not outlive tmp_path."""
    settings = dict(every=2, images=10, total_steps=6, steps_per_epoch=3, count_skipped=lambda: 0)
    with ExitStack() as stack:

        def make(folder: Path, **changes) -> TrainingLog:
            log = TrainingLog(str(folder), **settings | changes)
            stack.callback(log.close)
            return log

        yield make


def step(
    log: TrainingLog,
    number: int,
    loss: float,
    norm: float = 1.0,
    waited: float = 0.0,
    skipped: bool = False,
):
    result = StepResult(torch.tensor(loss), torch.tensor(norm), torch.tensor(skipped), waited)
    log.step(number, 0.5, result)


def read(folder: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(folder)).Reload()
    names = events.Tags()["scalars"]
    return {name: [(e.step, e.value) for e in events.Scalars(name)] for name in names}


def test_figures_are_means_over_the_steps_between(new_log, tmp_path, capsys):
    log = new_log(tmp_path)
    for number, (loss, norm) in enumerate([(1, 4), (2, 6), (5, 1)]):
        step(log, number, loss, norm)
    log.flush(2, 0.25)  # the end of an epoch, after one step
    log.close()
    found = read(tmp_path)
    assert found["train/loss"] == [(2, 1.5), (3, 5.0)]
    assert found["train/grad_norm"] == [(2, 5.0), (3, 1.0)]
    assert found["train/lr"] == [(2, 0.5), (3, 0.25)]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("epoch 0.67  step 2/6  loss 1.5000  lr 5.00e-01  grad 5.00  ")
    assert lines[1].startswith("epoch 1.00  step 3/6  loss 5.0000") and len(lines) == 2


def test_speed_data_wait_and_time_left_follow_the_clock(new_log, tmp_path, monkeypatch, capsys):
    now = iter([0.0, 4.0, 4.0])  # made; read and made anew after two steps
    monkeypatch.setattr(time, "perf_counter", lambda: next(now))
    log = new_log(tmp_path, total_steps=62)
    step(log, 0, 1.0, waited=1.0)
    step(log, 1, 1.0, waited=0.5)
    line = capsys.readouterr().out
    assert "5.0 images/s" in line and "data wait 38 %" in line and "left 0:02:00" in line


def test_nothing_is_read_from_the_device_between(new_log, tmp_path, monkeypatch):
    """Every step waiting for the device would cost more than the log is worth."""
    log = new_log(tmp_path, every=20)
    for name in ("item", "tolist", "__float__", "__bool__", "cpu"):
        monkeypatch.setattr(torch.Tensor, name, None)
    for number in range(5):
        step(log, number, 1.0)


def test_folder_is_made_with_the_first_figures(new_log, tmp_path):
    log = new_log(tmp_path / "logs")
    step(log, 0, 1.0)
    assert not (tmp_path / "logs").exists()
    step(log, 1, 1.0)
    assert (tmp_path / "logs").exists()


def test_nothing_since_the_last_time_is_nothing_to_write(new_log, tmp_path, capsys):
    new_log(tmp_path / "logs").flush(0, 0.1)
    assert capsys.readouterr().out == "" and not (tmp_path / "logs").exists()


@pytest.mark.parametrize(("loss", "norm"), [(float("nan"), 1.0), (1.0, float("inf"))])
def test_skipped_steps_are_told_and_not_in_the_means(new_log, tmp_path, capsys, loss, norm):
    log = new_log(tmp_path, every=3)
    step(log, 0, 2.0, 4.0)
    step(log, 1, loss, norm, skipped=True)
    step(log, 2, 3.0, 5.0)
    log.close()
    found = read(tmp_path)
    assert found["train/loss"] == [(3, 2.5)] and found["train/grad_norm"] == [(3, 4.5)]
    assert found["train/skipped_steps"] == [(3, 1.0)]
    assert capsys.readouterr().out.splitlines()[0].endswith("skipped steps 1")


def test_only_skipped_steps_have_no_loss(new_log, tmp_path, capsys):
    log = new_log(tmp_path)
    for number in (0, 1):
        step(log, number, float("nan"), skipped=True)
    log.close()
    assert "train/loss" not in read(tmp_path) and "loss nan" in capsys.readouterr().out


def test_resumed_log_hides_what_a_killed_run_wrote_later(new_log, tmp_path):
    log = new_log(tmp_path, every=1)
    for number in range(4):
        step(log, number, 1.0)
    log.close()
    resumed = new_log(tmp_path, every=1, first_step=2)
    step(resumed, 2, 5.0)
    resumed.close()
    assert read(tmp_path)["train/loss"] == [(1, 1.0), (2, 1.0), (3, 5.0)]
    anew = new_log(tmp_path, every=1)  # killed before its first checkpoint
    step(anew, 0, 7.0)
    anew.close()
    assert read(tmp_path)["train/loss"] == [(1, 7.0)]


def test_figures_stand_at_the_same_steps_wherever_a_run_began(new_log, tmp_path):
    log = new_log(tmp_path, every=2, first_step=1)
    for number in (1, 2, 3):
        step(log, number, float(number))
    log.close()
    assert read(tmp_path)["train/loss"] == [(2, 1.0), (4, 2.5)]


def test_skipped_images_are_told_when_there_are_any(new_log, tmp_path, capsys):
    skipped = iter([0, 3])
    log = new_log(tmp_path, every=1, count_skipped=lambda: next(skipped))
    step(log, 0, 1.0)
    step(log, 1, 1.0)
    first, second = capsys.readouterr().out.splitlines()
    assert "skipped" not in first and second.endswith("skipped images 3")
    log.close()
    assert read(tmp_path)["data/skipped_images"] == [(2, 3.0)]


def test_further_figures_and_images(new_log, tmp_path):
    log = new_log(tmp_path)
    log.scalars({"eval/fid": 2.5}, 7)
    log.image("eval/samples", torch.zeros(3, 4, 4, dtype=torch.uint8), 7)
    log.close()
    assert read(tmp_path) == {"eval/fid": [(7, 2.5)]}
    assert EventAccumulator(str(tmp_path)).Reload().Tags()["images"] == ["eval/samples"]


def test_other_processes_write_nothing(new_log, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("util.dist.is_main", lambda: False)
    log = new_log(tmp_path / "logs", every=1)
    step(log, 0, 1.0)
    log.scalars({"eval/fid": 2.5}, 1)
    log.close()
    assert capsys.readouterr().out == "" and not (tmp_path / "logs").exists()
