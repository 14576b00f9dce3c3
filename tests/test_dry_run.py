"""--dry_run: checks what a script would do, makes one step, prints its cost, writes nothing."""

import json

import pytest

import main_tokenbridge
from tests.runs import IMAGE_FLAGS, call, command, on_processes, use


@pytest.mark.parametrize("source", [{}, IMAGE_FLAGS])
def test_a_training_says_its_cost_and_writes_nothing(inputs, tmp_path, capsys, source):
    """Nor among the inputs, which their fixture sees."""
    changes = source | dict(epochs=5, metrics_file=tmp_path / "m.jsonl", dry_run=True, json=True)
    use("train", inputs, output_dir=tmp_path / "out", **changes)
    figures = json.loads(capsys.readouterr().out)
    assert list(tmp_path.iterdir()) == []
    assert (figures["steps"], figures["images_per_step"]) == (15, 8)
    assert figures["hours"] == pytest.approx(15 * figures["seconds_per_step"] / 3600)
    assert figures["device_hours"] == figures["hours"] and 0 < figures["loss"] < 10


def test_odd_rates_and_a_damaged_checkpoint_are_said(inputs, trained, tmp_path, capsys, refusal):
    late = dict(warmup_epochs=None)  # the last step is 5 of 300 to the peak
    jumps = dict(resume=trained, epochs=4, min_lr=1e-6)
    goes_on = dict(resume=trained, epochs=3, warmup_epochs=0, lr_schedule="constant", lr=7.8125e-5)
    for changes, expected in (
        (late, "epochs 2: the learning rate reaches 5.21e-06 of 0.000313"),
        (jumps, "step 6 was 7.81e-05 when {checkpoint} was saved, and is 0.000276 with --epochs 4"),
        (goes_on, None),
        (dict(warmup_epochs=1.9), None),
    ):
        use("train", inputs, output_dir=tmp_path / "out", dry_run=True, **changes)
        lines = [line for line in capsys.readouterr().out.splitlines() if "warning:" in line]
        assert len(lines) == (expected is not None), lines
        if expected:
            assert expected.format(checkpoint=trained / "checkpoint-last.pth") in lines[0]
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
    asked = command("train", inputs, output_dir=tmp_path / "out", dry_run=True, json=True)
    result = on_processes(2, *asked)
    figures = json.loads(result.stdout)
    assert figures["images_per_step"] == 16
    assert figures["device_hours"] == pytest.approx(2 * figures["hours"])
