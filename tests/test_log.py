"""The training log: means over its steps, figures in TensorBoard, and what was skipped."""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from util.device import Precision
from util.flops import HARDWARE, Meter, find_hardware, peak_flops, peak_memory, readable
from util.log import StepResult, TrainingLog

CPU = torch.device("cpu")


@pytest.fixture
def new_log(tmp_path) -> Iterator[Callable[..., TrainingLog]]:
    """Makes logs and closes them: TensorBoard's thread must not outlive tmp_path."""
    settings = dict(every=2, images=10, total_steps=6, steps_per_epoch=3, count_skipped=lambda: 0)
    settings |= dict(meter=Meter(flops=2e9, device=CPU))
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


def test_share_of_the_peak_follows_the_clock(new_log, tmp_path, monkeypatch, capsys):
    """Two steps of 10 images and 2 GFLOP each in 4 s are 10 GFLOP/s, half of it on each of two."""
    now = iter([0.0, 4.0, 4.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(now))
    monkeypatch.setattr("util.dist.world_size", lambda: 2)
    monkeypatch.setattr("util.log.peak_memory", lambda device: 3 * 2**29)
    log = new_log(tmp_path, meter=Meter(flops=2e9, device=CPU, peak=2e10))
    for number in (0, 1):
        step(log, number, 1.0)
    log.close()
    found = read(tmp_path)
    assert found["speed/tflops_per_device"] == [(2, pytest.approx(0.005))]
    assert found["speed/percent_of_peak"] == [(2, 25.0)]
    assert found["speed/memory_gib"] == [(2, 1.5)]
    line = capsys.readouterr().out
    assert "images/s  5 GFLOP/s (25 %)  1.5 GiB  data wait" in line and line.count("\n") == 1


def test_without_a_known_peak_there_is_no_share(new_log, tmp_path, capsys):
    log = new_log(tmp_path, every=1)
    step(log, 0, 1.0)
    log.close()
    assert "FLOP/s  " in capsys.readouterr().out
    assert "speed/percent_of_peak" not in read(tmp_path)


def test_memory_is_that_of_the_process_with_most(new_log, tmp_path, monkeypatch):
    monkeypatch.setattr("util.dist.all_reduce_max", lambda tensor: tensor.fill_(2**31))
    log = new_log(tmp_path, every=1)
    step(log, 0, 1.0)
    log.close()
    assert read(tmp_path)["speed/memory_gib"] == [(1, 2.0)]


def test_line_of_a_large_run_fits_a_terminal(new_log, tmp_path, monkeypatch, capsys):
    now = iter([0.0, 27.0, 27.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(now))
    meter = Meter(flops=2.2e11, device=CPU, peak=989e12)
    sizes = dict(every=20, images=2048, total_steps=250_000, steps_per_epoch=625)
    log = new_log(tmp_path, meter=meter, **sizes)
    for number in range(123_440, 123_460):
        step(log, number, 3.1234)
    line = capsys.readouterr().out
    assert "1517 images/s  334 TFLOP/s (34 %)" in line and "left 47 h" in line
    assert len(line) <= 140


def test_a_process_knows_its_peak_memory():
    """At least the interpreter and torch; in bytes, so neither too little nor absurdly much."""
    held = torch.ones(2**24)
    assert held.nbytes < peak_memory(CPU) < 2**37


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA A100 80GB PCIe", "A100-PCIe"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100-PCIe"),
        ("NVIDIA H100 NVL", "H100-NVL"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA B200", "B200"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA GeForce RTX 4090", "RTX-4090"),
        ("Tesla V100-SXM2-32GB", "V100"),
    ],
)
def test_devices_are_known_by_the_names_that_torch_gives(name, key):
    assert find_hardware(name) is HARDWARE[key]
    assert sum(find_hardware(name) is hardware for hardware in HARDWARE.values()) == 1


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA GH200 480GB",
        "NVIDIA GB200",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce GTX 1080",
        "AMD Instinct MI300X",
    ],
)
def test_relatives_and_slices_have_no_known_peak(name):
    assert find_hardware(name) is None


def test_peaks_are_those_of_the_precision(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100-SXM2-16GB")
    found = {
        name: peak_flops(torch.device("cuda"), Precision(name, None))
        for name in ("bf16", "fp16", "fp32")
    }
    assert found == {"bf16": None, "fp16": 125e12, "fp32": 15.7e12}
    assert peak_flops(CPU, Precision("fp32", None)) is None


def test_figures_are_readable():
    assert readable(3.974e14, "FLOP/s") == "397 TFLOP/s"
    assert readable(0.0, "B") == "0 B" and readable(999.6, "B") == "1 KB"
    assert readable(1.5e20, "FLOP") == "150 EFLOP"


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
