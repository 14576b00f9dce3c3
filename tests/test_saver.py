"""Checkpoints are written beside the training, whole or not at all, and the right ones stay."""

import errno
import os
import threading
from pathlib import Path

import pytest
import torch

from util import files
from util import saver as saver_module
from util.checkpoint import LAST, find_checkpoint, load_checkpoint, refuse_other_run
from util.errors import UserError
from util.inputs import open_checkpoint
from util.saver import CheckpointSaver, HostCopy, SaveSettings, write_checkpoint

STEPS = 4  # an epoch


def new_saver(folder: Path, first_step: int = 0, **changes) -> CheckpointSaver:
    return CheckpointSaver(SaveSettings(folder, **changes), STEPS, first_step)


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


def test_minutes_count_from_the_last_save(tmp_path, monkeypatch):
    now = 1000.0
    monkeypatch.setattr(saver_module.time, "monotonic", lambda: now)
    saver = new_saver(tmp_path, minutes=2.0)
    now += 119
    assert not saver.due(1)
    now += 2
    assert saver.due(1)
    saver.save(1, lambda: state(1))
    saver.wait()
    assert not saver.due(2)


def test_resumed_run_does_not_save_what_it_began_with(tmp_path):
    saver = new_saver(tmp_path, first_step=6, steps=3)
    assert [step for step in range(7, 12) if saver.due(step)] == [9, 10, 11]
    saver.save(6, lambda: state(6))
    assert saver.writing is None


def test_milestone_outlives_its_step(tmp_path):
    saver = new_saver(tmp_path, last_freq=1, milestones=1, keep=1)
    save_all(saver, range(1, 9))
    assert names(tmp_path) == [
        "checkpoint-epoch0001.pth",
        "checkpoint-epoch0002.pth",
        LAST,
        "checkpoint-step00000008.pth",
    ]
    assert load_checkpoint(tmp_path / "checkpoint-epoch0001.pth").saved["step"] == 4


def test_run_that_goes_on_at_a_smaller_step_is_not_thrown_back(tmp_path):
    """As after a change to a larger global batch, whose epochs have fewer steps."""
    save_all(new_saver(tmp_path, steps=1), [99, 100])
    save_all(new_saver(tmp_path, first_step=50, steps=1), [51])
    for resume in (str(tmp_path), "auto"):
        assert find_checkpoint(resume, str(tmp_path), must_exist=True).saved["step"] == 51


def test_copies_of_checkpoints_with_other_names_are_left_alone(tmp_path):
    mine = ("checkpoint-step00000001-good.pth", "checkpoint-step00000009_old.pth")
    for name in mine:
        (tmp_path / name).write_bytes(b"mine")
    save_all(new_saver(tmp_path, steps=1, keep=1), [2, 3])
    assert names(tmp_path) == sorted([*mine, LAST, "checkpoint-step00000003.pth"])
    assert find_checkpoint("auto", str(tmp_path), must_exist=True).saved["step"] == 3


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
    saver = new_saver(tmp_path, steps=1)
    saver.save(1, lambda: {"model": {"w": weight}})
    assert names(tmp_path) == []  # back already
    weight.mul_(7)
    assert not saver.due(2)  # the disk is busy
    assert saver.due(STEPS * 5)  # the end of the fifth epoch waits for it
    release.set()
    saver.close()
    assert load_checkpoint(tmp_path / LAST).saved["model"]["w"].tolist() == [1, 1, 1]


def test_copies_reuse_their_memory_and_share_none_with_training():
    copy, weight = HostCopy(), torch.ones(2)
    first = copy({"a": [weight, 3], "b": {"c": (weight,)}})
    assert first["a"][0] is not weight and first["a"][1] == 3
    weight.fill_(5)
    assert first["a"][0].tolist() == [1, 1]
    second = copy({"a": [weight, 3], "b": {"c": (weight,)}})
    assert second["a"][0].data_ptr() == first["a"][0].data_ptr()
    assert second["b"]["c"][0].tolist() == [5, 5]


# --- a disk that refuses


class FullDisk:
    """os.write's part of a disk with so many bytes left."""

    def __init__(self, file, left: int):
        self.file, self.left = file, left

    def write(self, data) -> int:
        self.left -= len(data)
        if self.left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self.file.write(data)

    def __getattr__(self, name):
        return getattr(self.file, name)


@pytest.mark.parametrize("left", [0, 100, 2000])
def test_full_disk_is_reported_and_what_was_saved_before_stays(tmp_path, monkeypatch, capsys, left):
    saver = new_saver(tmp_path, steps=1)
    saver.save(1, lambda: state(1))
    saver.wait()
    before = names(tmp_path)
    careful = saver_module.CarefulFile
    monkeypatch.setattr(saver_module, "CarefulFile", lambda f: careful(FullDisk(f, left)))
    saver.save(2, lambda: {"model": {"w": torch.ones(10_000)}})
    saver.wait()
    assert "step 2 was not saved: [Errno 28] No space left" in capsys.readouterr().err
    assert names(tmp_path) == before and load_checkpoint(tmp_path / LAST).saved["step"] == 1
    with pytest.raises(UserError, match="step 2 was not saved.*--resume auto"):
        saver.close()
    monkeypatch.undo()
    saver.save(3, lambda: state(3))
    saver.close()
    assert load_checkpoint(tmp_path / LAST).saved["step"] == 3


def test_weights_that_are_not_finite_are_not_saved(tmp_path, capsys):
    saver = new_saver(tmp_path, steps=1)
    saver.save(1, lambda: state(1))
    saver.save(2, lambda: {"model": {"head.bias": torch.tensor([1.0, torch.nan])}})
    with pytest.raises(UserError, match="not finite any more .head.bias"):
        saver.close()
    assert load_checkpoint(tmp_path / LAST).saved["step"] == 1


def test_file_system_without_links_gets_a_copy(tmp_path, monkeypatch):
    def refuse(*_args, **_kwargs):
        raise OSError(errno.EPERM, "Operation not permitted")

    flushed, fsync = set(), os.fsync

    def noting(descriptor):
        flushed.add(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr(os, "fsync", noting)
    save_all(new_saver(tmp_path, steps=1), [1, 2])
    assert (tmp_path / LAST).stat().st_ino in flushed  # a copy is not on the disk by itself
    assert load_checkpoint(tmp_path / LAST).saved["step"] == 2
    refuse_other_run(str(tmp_path), find_checkpoint(str(tmp_path), str(tmp_path), True))


def test_leftovers_of_killed_processes_are_removed(tmp_path):
    for name in (f".{LAST}.tmp", ".checkpoint-step00000001.pth.abc.tmp"):
        (tmp_path / name).write_bytes(b"half")
    write_checkpoint(tmp_path / LAST, state(1))
    assert names(tmp_path) == [LAST]


# --- finding one again


def write_some(folder: Path, steps=(1, 2, 3)) -> None:
    save_all(new_saver(folder, steps=1, keep=9), steps)


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    middle = content.index(torch.full((3,), float(load_checkpoint(path).saved["step"])).numpy())
    content[middle] ^= 1
    path.unlink()  # not its other names
    path.write_bytes(content)


def test_auto_takes_the_newest_whole_one_and_names_the_damaged(tmp_path, capsys):
    write_some(tmp_path)
    damage(tmp_path / "checkpoint-step00000003.pth")
    damage(tmp_path / LAST)
    found = find_checkpoint("auto", str(tmp_path), must_exist=True)
    assert found.saved["step"] == 2
    printed = capsys.readouterr().err
    assert "checkpoint-step00000003.pth: damaged" in printed and "wrong checksum" in printed
    assert "checkpoint-step00000003.pth.damaged" in names(tmp_path)
    assert load_checkpoint(tmp_path / LAST).saved["step"] == 2


def test_damaged_one_is_refused_with_the_remedy(tmp_path):
    write_some(tmp_path)
    damage(tmp_path / "checkpoint-step00000003.pth")
    with pytest.raises(UserError, match="step00000003.pth: damaged.*--resume auto"):
        find_checkpoint(str(tmp_path), str(tmp_path), must_exist=False)


def test_a_file_that_is_out_of_reach_is_not_set_aside(tmp_path, monkeypatch):
    """Going on from the one before would lose what is there."""
    write_some(tmp_path)
    before = names(tmp_path)

    def stale(*_arguments):
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(files, "what_else", stale)
    with pytest.raises(UserError, match="step00000003.pth.*Stale file handle"):
        find_checkpoint("auto", str(tmp_path), must_exist=False)
    assert names(tmp_path) == before


def test_auto_without_any_whole_one_stops(tmp_path, capsys):
    write_some(tmp_path, [1])
    for name in names(tmp_path):
        damage(tmp_path / name)
    for _attempt in range(3):  # those of torchrun's --max-restarts, too
        with pytest.raises(UserError, match="all checkpoints in .* are damaged"):
            find_checkpoint("auto", str(tmp_path), must_exist=False)
    assert find_checkpoint("auto", str(tmp_path / "new"), must_exist=False) is None
    with pytest.raises(UserError, match="no whole checkpoint"):
        find_checkpoint("auto", str(tmp_path / "new"), must_exist=True)


def test_killed_between_the_file_and_its_second_name_goes_on_from_the_file(tmp_path):
    write_some(tmp_path)
    (tmp_path / LAST).unlink()
    os.link(tmp_path / "checkpoint-step00000002.pth", tmp_path / LAST)
    for resume in (str(tmp_path), "auto"):
        assert find_checkpoint(resume, str(tmp_path), must_exist=False).saved["step"] == 3


def test_a_run_does_not_write_over_another_one(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    refuse_other_run(str(folder), None)
    write_some(folder)
    with pytest.raises(UserError, match="from scratch would replace; pass --resume auto"):
        refuse_other_run(str(folder), None)
    older = load_checkpoint(folder / "checkpoint-step00000002.pth")
    with pytest.raises(UserError, match="step00000003.pth, which a run from .*step00000002"):
        refuse_other_run(str(folder), older)
    refuse_other_run(str(folder), load_checkpoint(folder / LAST))
    write_some(tmp_path / "other", [9])
    with pytest.raises(UserError, match="from .*other"):
        refuse_other_run(str(folder), load_checkpoint(tmp_path / "other" / LAST))


# --- which run a command goes on with


def test_attempts_of_torchrun_go_on_with_their_own_run(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert open_checkpoint("", str(folder)) is None  # lost before it had saved
    write_some(folder)
    for resume in ("", "auto", str(folder)):
        assert open_checkpoint(resume, str(folder)).saved["step"] == 3
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    with pytest.raises(UserError, match="from scratch"):
        open_checkpoint("", str(folder))


def test_command_that_began_from_another_run_goes_on_with_its_own(tmp_path):
    """Restarted, it must not begin from there once more."""
    pretrained, folder = tmp_path / "pretrained", tmp_path / "run"
    write_some(pretrained, [9])
    assert open_checkpoint(str(pretrained), str(folder)).saved["step"] == 9
    saver = new_saver(folder, steps=1)
    saver.save(12, lambda: state(12) | {"args": {"resume": str(pretrained)}})
    saver.close()
    assert open_checkpoint(str(pretrained), str(folder)).saved["step"] == 12
    write_some(tmp_path / "third", [5])
    with pytest.raises(UserError, match="from .*third"):
        open_checkpoint(str(tmp_path / "third"), str(folder))
