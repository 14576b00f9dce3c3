"""Checkpoints are written beside the training, whole or not at all, and the right ones stay."""

import errno
import os
import threading
from argparse import Namespace
from pathlib import Path
from unittest import mock

import torch

from tests.conftest import complaint
from util import files
from util import saver as saver_module
from util.checkpoint import LAST, Checkpoint, find_checkpoint, load_checkpoint, refuse_other_run
from util.saver import CheckpointSaver
from util.setup import open_checkpoint

STEPS = 4  # an epoch


def new_saver(folder: Path, first_step: int = 0, **changes) -> CheckpointSaver:
    return CheckpointSaver(folder, STEPS, first_step, **changes)


def state(step: int) -> dict:
    return {"model": {"w": torch.full((3,), float(step))}, "step": step, "epoch": 0}


def save_all(saver: CheckpointSaver, steps) -> None:
    for step in steps:
        if saver.due(step):
            saver.save(step, lambda step=step: state(step))
            saver.wait()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- when and which


def test_epochs_steps_and_milestones_are_saved_and_the_last_ones_stay(tmp_path):
    saver = new_saver(tmp_path, last_freq=2, steps=3, milestones=3, keep=2)
    save_all(saver, range(1, 5 * STEPS + 1))
    # every 3 steps after the last one saved; epochs 2 and 4 (steps 8, 16); milestone epoch 3
    assert names(tmp_path) == [
        "checkpoint-epoch0003.pth",
        LAST,
        "checkpoint-step00000016.pth",
        "checkpoint-step00000019.pth",
    ]
    assert load_checkpoint(tmp_path / LAST).saved["step"] == 19
    assert load_checkpoint(tmp_path / "checkpoint-epoch0003.pth").saved["step"] == 12


def test_run_that_goes_on_at_a_smaller_step_is_not_thrown_back(tmp_path):
    """As after a change to a larger global batch, whose epochs have fewer steps."""
    save_all(new_saver(tmp_path, steps=1), [99, 100])
    save_all(new_saver(tmp_path, first_step=50, steps=1), [51])
    for resume in (str(tmp_path), "auto"):
        assert find_checkpoint(resume, str(tmp_path), must_exist=True).saved["step"] == 51
    (tmp_path / LAST).unlink()  # as if killed between the file and its second name
    torch.save(state(50), tmp_path / LAST)
    for resume in (str(tmp_path), "auto"):
        assert find_checkpoint(resume, str(tmp_path), must_exist=False).saved["step"] == 51


# --- beside the training


def test_training_goes_on_while_a_copy_is_written(tmp_path, monkeypatch):
    """What is saved is what was there when it was asked for, whatever training does then."""
    release = threading.Event()
    write = saver_module.write_checkpoint

    def slowly(path, content):
        assert release.wait(10)
        write(path, content)

    monkeypatch.setattr(saver_module, "write_checkpoint", slowly)
    weight = torch.ones(3)
    now = 1000.0
    monkeypatch.setattr(saver_module.time, "monotonic", lambda: now)
    saver = new_saver(tmp_path, minutes=2.0)
    now += 119
    assert not saver.due(1)
    now += 2  # minutes count from the last save
    assert saver.due(1)
    saver.save(1, lambda: {"model": {"w": weight}})
    assert names(tmp_path) == []  # back already
    weight.mul_(7)
    now += 121
    assert not saver.due(2)  # the disk is busy
    assert saver.due(STEPS * 5)  # the end of the fifth epoch waits for it
    release.set()
    saver.close()
    assert load_checkpoint(tmp_path / LAST).saved["model"]["w"].tolist() == [1, 1, 1]


# --- a disk that refuses


def test_weights_that_are_not_finite_are_not_saved_and_what_was_before_stays(tmp_path, capsys):
    """A full disk: tests/faults."""
    saver = new_saver(tmp_path, steps=1)
    saver.save(1, lambda: state(1))
    saver.save(2, lambda: {"model": {"head.bias": torch.tensor([1.0, torch.nan])}})
    line = complaint(saver.close)
    assert "step 2 was not saved" in line and "not finite any more (head.bias" in line
    assert "training goes on" in capsys.readouterr().err
    assert load_checkpoint(tmp_path / LAST).saved["step"] == 1
    saver.save(3, lambda: state(3))
    saver.close()
    assert load_checkpoint(tmp_path / LAST).saved["step"] == 3


def test_file_system_without_links_gets_a_copy(tmp_path, monkeypatch):
    refuse = mock.Mock(side_effect=OSError(errno.EPERM, "Operation not permitted"))
    monkeypatch.setattr(os, "link", refuse)
    save_all(new_saver(tmp_path, steps=1), [1, 2])
    assert load_checkpoint(tmp_path / LAST).saved["step"] == 2
    refuse_other_run(str(tmp_path), find_checkpoint(str(tmp_path), str(tmp_path), True))


# --- finding one again


def write_some(folder: Path, steps=(1, 2, 3)) -> None:
    save_all(new_saver(folder, steps=1, keep=9), steps)


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    middle = content.index(torch.full((3,), float(load_checkpoint(path).saved["step"])).numpy())
    content[middle] ^= 1
    path.unlink()  # not its other names
    path.write_bytes(content)


def test_auto_takes_the_newest_whole_one_names_the_damaged_and_stops_without_any(tmp_path, capsys):
    write_some(tmp_path)
    damage(tmp_path / "checkpoint-step00000003.pth")
    damage(tmp_path / LAST)
    found = find_checkpoint("auto", str(tmp_path), must_exist=True)
    assert found.saved["step"] == 2
    printed = capsys.readouterr().err
    assert "checkpoint-step00000003.pth: damaged" in printed and "wrong checksum" in printed
    assert "checkpoint-step00000003.pth.damaged" in names(tmp_path)
    assert load_checkpoint(tmp_path / LAST).saved["step"] == 2
    for path in sorted(tmp_path.glob("*.pth")):
        damage(path)
    for _attempt in range(3):  # those of torchrun's --max-restarts, too
        line = complaint(find_checkpoint, "auto", str(tmp_path), must_exist=False)
        assert f"all checkpoints in {tmp_path} are damaged" in line
    new = ("auto", str(tmp_path / "new"))
    assert find_checkpoint(*new, must_exist=False) is None
    assert "no whole checkpoint" in complaint(find_checkpoint, *new, must_exist=True)


def test_a_file_that_is_out_of_reach_is_not_set_aside(tmp_path, monkeypatch):
    """Going on from the one before would lose what is there."""
    write_some(tmp_path)
    before = names(tmp_path)
    stale = mock.Mock(side_effect=OSError(errno.ESTALE, "Stale file handle"))
    monkeypatch.setattr(files, "what_else", stale)
    line = complaint(find_checkpoint, "auto", str(tmp_path), must_exist=False)
    assert "step00000003.pth" in line and "Stale file handle" in line
    assert names(tmp_path) == before


def test_a_run_does_not_write_over_another_one(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    refuse_other_run(str(folder), None)
    write_some(folder)
    line = complaint(refuse_other_run, str(folder), None)
    assert "from scratch would replace; pass --resume auto" in line
    older = load_checkpoint(folder / "checkpoint-step00000002.pth")
    line = complaint(refuse_other_run, str(folder), older)
    assert f"step00000003.pth, which a run from {older.path}" in line
    refuse_other_run(str(folder), load_checkpoint(folder / LAST))


# --- which run a command goes on with


def begin(resume: str | Path, folder: Path) -> Checkpoint | None:
    return open_checkpoint(Namespace(resume=str(resume), output_dir=str(folder), finetune=""))


def test_attempts_of_torchrun_go_on_with_their_own_run(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert begin("", folder) is None  # lost before it had saved
    write_some(folder)
    for resume in ("", "auto", str(folder)):
        assert begin(resume, folder).saved["step"] == 3
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert "from scratch" in complaint(begin, "", folder)


def test_command_that_began_from_another_run_goes_on_with_its_own(tmp_path):
    """Restarted, it must not begin from there once more."""
    pretrained, folder = tmp_path / "pretrained", tmp_path / "run"
    write_some(pretrained, [9])
    assert begin(pretrained, folder).saved["step"] == 9
    saver = new_saver(folder, steps=1)
    saver.save(12, lambda: state(12) | {"args": {"resume": str(pretrained)}})
    saver.close()
    assert begin(pretrained, folder).saved["step"] == 12
    write_some(tmp_path / "third", [5])
    assert f"from {tmp_path / 'third'}" in complaint(begin, tmp_path / "third", folder)
