"""--dry_run: builds and checks what a training would, makes one step, tells, and writes nothing."""

import json
from pathlib import Path

import pytest

import main_tokenbridge
from tests.runs import (
    TRAIN_FLAGS,
    call,
    flags,
    on_processes,
    refused,
)


def told(capsys, *argv, script=main_tokenbridge) -> dict:
    capsys.readouterr()
    call(script.main, *map(str, argv), "--dry_run", "--json")
    return json.loads(capsys.readouterr().out)


def files(folder: Path) -> set[tuple[str, int]]:
    return {(str(p), p.stat().st_mtime_ns) for p in folder.rglob("*")}


@pytest.mark.parametrize("cached", [True, False])
def test_says_what_the_run_will_be_and_writes_nothing(inputs, tmp_path, capsys, cached):
    before = files(tmp_path) | files(inputs)
    changes = {} if cached else dict(use_cached=None, vae_path="vae.ckpt", data_path="data")
    argv = flags(inputs, TRAIN_FLAGS, output_dir=tmp_path / "out", epochs=5, **changes)
    argv += ["--channel_order", "2,0,3,1", "--latent_scale", "0.5"] if not cached else []
    found = told(capsys, *argv, "--metrics_file", tmp_path / "m.tsv")
    assert files(tmp_path) | files(inputs) == before
    assert (found["images"], found["steps_per_epoch"], found["steps_to_go"]) == (24, 3, 15)
    assert found["images_per_step"] == 8 and found["processes"] == 1
    assert found["hours"] == pytest.approx(15 * found["seconds_per_step"] / 3600)
    assert found["device_hours"] == found["hours"]
    assert (found["seconds_encoding"] > 0) == (not cached)
    assert 0 < found["loss"] < 10


@pytest.mark.parametrize(
    ("resume", "changes", "expected"),
    [
        (
            *(False, dict(warmup_epochs=None)),  # the last step is 5 of 300 to the peak
            "--warmup_epochs 100 does not end before --epochs 2: the learning rate reaches "
            "5.21e-06 of 0.000313; --warmup_epochs 0.5 would be a quarter",
        ),
        (
            *(True, dict(epochs=4, min_lr=1e-6)),
            "the learning rate of step 6 was 7.81e-05 when {checkpoint} was saved, and is 0.000276 "
            "with these flags, --epochs 4 (was 2), --min_lr 1e-06 (was 0.0)",
        ),
        (True, dict(epochs=3, warmup_epochs=0, lr_schedule="constant", lr=7.8125e-5), None),
        (False, dict(warmup_epochs=1.9), None),
    ],
)
def test_a_rate_that_stays_low_or_jumps_is_told(
    inputs, trained, tmp_path, capsys, resume, changes, expected
):
    resume = trained if resume else None
    argv = flags(inputs, TRAIN_FLAGS, output_dir=tmp_path / "out", resume=resume, **changes)
    call(main_tokenbridge.main, *argv, "--dry_run")
    told = [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
    if expected is None:
        assert told == []
    else:
        assert expected.format(checkpoint=trained / "checkpoint-last.pth") in told[0], told


def test_damaged_checkpoint_is_told_and_stays(inputs, tmp_path, capsys):
    """A run would set it aside."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "checkpoint-step00000003.pth").write_bytes(b"PK\3\4 nothing")
    before = files(tmp_path)
    argv = flags(inputs, TRAIN_FLAGS, output_dir=tmp_path / "out", resume="auto")
    line = refused(capsys, main_tokenbridge.main, *argv, "--dry_run")
    assert "checkpoint-step00000003.pth" in line and "damaged" in line
    assert files(tmp_path) == before


def test_works_where_there_is_no_data(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = "--model tokenbridge_tiny --img_size 64 --batch_size 2 --accum_iter 3 --device cpu"
    found = told(capsys, *argv.split(), "--class_num", "10")
    assert found["images"] is None and "hours" not in found
    assert found["images_per_step"] == 6 and list(tmp_path.iterdir()) == []
    call(main_tokenbridge.main, *argv.split(), "--dry_run")
    out = capsys.readouterr().out
    assert "no --data_path or --cached_path" in out and "nothing was written" in out


@pytest.mark.parametrize(
    ("given", "fragment"),
    [
        (dict(data_path="missing", use_cached=None, vae_path="vae.ckpt"), "--data_path"),
        (dict(cached_path="missing"), "--cached_path"),
        (dict(vae_path="missing", use_cached=None, data_path="data"), "--vae_path"),
        (dict(class_num=2), "3 classes, --class_num is 2"),
        (dict(global_batch=7), "--global_batch 7"),
    ],
)
def test_what_would_stop_the_run_stops_the_dry_run(inputs, tmp_path, capsys, given, fragment):
    argv = flags(inputs, TRAIN_FLAGS, output_dir=tmp_path / "out", accum_iter=None) + flags(
        inputs, {k: v for k, v in given.items()}
    )
    argv = [word for word in argv if not (word == "--use_cached" and "use_cached" in given)]
    assert fragment in refused(capsys, main_tokenbridge.main, *argv, "--dry_run")
    assert not (tmp_path / "out").exists()


def test_two_processes_share_the_step(inputs, tmp_path):
    argv = flags(inputs, TRAIN_FLAGS, output_dir=tmp_path / "out")
    result = on_processes(2, "main_tokenbridge.py", *argv, "--dry_run", "--json")
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["processes"] == 2 and found["images_per_step"] == 16
    assert found["device_hours"] == pytest.approx(2 * found["hours"])
