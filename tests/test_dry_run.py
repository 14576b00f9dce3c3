"""--dry_run: checks what a script would do, makes one step, prints its cost, writes nothing."""

import json
from pathlib import Path

import pytest

import main_tokenbridge
from tests.runs import TRAIN_FLAGS, call, flags, on_processes

IMAGES = dict(use_cached=None, vae_path="vae.ckpt", data_path="data", latent_scale=0.5)
IMAGES |= {"channel_order": "2,0,3,1"}


def files(folder: Path) -> set[tuple[str, int]]:
    return {(str(p), p.stat().st_mtime_ns) for p in folder.rglob("*")}


@pytest.mark.parametrize("changes", [{}, IMAGES])
def test_a_training_says_its_cost_and_writes_nothing(inputs, tmp_path, capsys, changes):
    before = files(tmp_path) | files(inputs)
    argv = flags(inputs, TRAIN_FLAGS, output_dir=tmp_path / "out", epochs=5, **changes)
    call(main_tokenbridge.main, *argv, f"--metrics_file={tmp_path}/m.jsonl", "--dry_run", "--json")
    figures = json.loads(capsys.readouterr().out)
    assert files(tmp_path) | files(inputs) == before
    assert (figures["steps"], figures["images_per_step"]) == (15, 8)
    assert figures["hours"] == pytest.approx(15 * figures["seconds_per_step"] / 3600)
    assert figures["device_hours"] == figures["hours"] and 0 < figures["loss"] < 10


def test_odd_rates_and_a_damaged_checkpoint_are_said(inputs, trained, tmp_path, capsys, refusal):
    for resume, changes, expected in (
        (
            *(False, dict(warmup_epochs=None)),  # the last step is 5 of 300 to the peak
            "--warmup_epochs 100 does not end before --epochs 2: the learning rate reaches "
            "5.21e-06 of 0.000313",
        ),
        (
            *(True, dict(epochs=4, min_lr=1e-6)),
            "the learning rate of step 6 was 7.81e-05 when {checkpoint} was saved, and is 0.000276 "
            "with --epochs 4, --warmup_epochs 1 and the other flags",
        ),
        (True, dict(epochs=3, warmup_epochs=0, lr_schedule="constant", lr=7.8125e-5), None),
        (False, dict(warmup_epochs=1.9), None),
    ):
        resume = trained if resume else None
        argv = flags(inputs, TRAIN_FLAGS, output_dir=tmp_path / "out", resume=resume, **changes)
        call(main_tokenbridge.main, *argv, "--dry_run")
        lines = [line for line in capsys.readouterr().out.splitlines() if "warning:" in line]
        if expected is None:
            assert lines == []
        else:
            assert expected.format(checkpoint=trained / "checkpoint-last.pth") in lines[0], lines
    (tmp_path / "checkpoint-step00000003.pth").write_bytes(b"PK\3\4 nothing")
    line = refusal("train", inputs, output_dir=tmp_path, resume="auto", dry_run=True)
    assert "checkpoint-step00000003.pth" in line and "damaged" in line  # a run would set it aside


def test_without_data_it_says_what_imagenet_would_take(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = "--model tokenbridge_tiny --img_size 64 --batch_size 2 --accum_iter 3 --device cpu"
    call(main_tokenbridge.main, *argv.split(), "--dry_run", "--epochs", "2")
    out = capsys.readouterr().out
    assert "a training set as large as ImageNet's: 1281167 images" in out
    assert f"{2 * (1281167 // 6):,}" in out and "nothing was written" in out
    assert list(tmp_path.iterdir()) == []


def test_two_processes_share_the_step(inputs, tmp_path):
    argv = flags(inputs, TRAIN_FLAGS, output_dir=tmp_path / "out")
    result = on_processes(2, "main_tokenbridge.py", *argv, "--dry_run", "--json")
    figures = json.loads(result.stdout)
    assert figures["images_per_step"] == 16
    assert figures["device_hours"] == pytest.approx(2 * figures["hours"])
