"""main_tokenbridge.py as a user calls it: however it is started, it trains and draws the same."""

import json
from unittest import mock

import numpy as np
import pytest
import torch

import engine_tokenbridge
import main_tokenbridge
from tests import runs
from util import stop
from util.checkpoint import load_checkpoint


def test_two_nodes_train_as_one_draw_together_and_only_one_writes(inputs, trained, tmp_path):
    """They meet at an address; dropout is on, as every micro-batch has its own random numbers,
    whichever process has it; and what is recomputed in backward is reduced all the same.

    To the bit: the mean of two gradients is the same whoever adds them. Adam would make a visible
    difference of any other: its first steps have the same length for the smallest gradients.
    Of Open MPI, which a flag asks for. Slurm's variables are read in test_dist.py, and its
    processes train in test_scripts.py, torchrun's in test_validation.py.
    """
    settings = dict(online_eval=True, vae_path="vae.ckpt", num_images=6, num_iter=2, eval_bsz=2)
    settings |= dict(dist_url=f"tcp://127.0.0.1:{runs.free_port()}", grad_checkpointing=True)
    settings |= dict(dist_on_itp=True, accum_iter=1, num_workers=1)
    asked = runs.command("train", inputs, **settings, output_dir=tmp_path / "out")
    names = [f"OMPI_COMM_WORLD_{name}" for name in ("RANK", "LOCAL_RANK", "SIZE")]
    env = [dict(zip(names, (rank, 0, 2), strict=True)) for rank in (0, 1)]
    results = runs.fork_together(*[asked] * 2, env=env)
    assert [code for code, _, _ in results] == [0, 0], results
    printed = "".join(out for _, out, _ in results)
    assert "2 processes (Open MPI (--dist_on_itp)), backend gloo" in printed
    assert printed.count("step 6/6") == printed.count("saved") == 1 and "left 0:00:00" in printed
    runs.assert_same_training(runs.load(tmp_path / "out"), runs.load(trained))
    found, expected = runs.scalars(tmp_path / "out"), runs.scalars(trained)
    assert set(expected) == {
        *("train/loss", "train/lr", "train/grad_norm"),
        *("speed/images_per_second", "speed/data_wait_percent"),
        *("speed/tflops_per_device", "speed/memory_gib"),
    }
    for tag in ("train/loss", "train/lr", "train/grad_norm"):
        np.testing.assert_allclose(found[tag], expected[tag], rtol=1e-5)
    written = sorted(path.name.split(".")[0] for path in (tmp_path / "out").iterdir())
    checkpoints = ["checkpoint-last", "checkpoint-step00000006"]
    assert written == [*checkpoints, "config", "eval-epoch2", "events"]
    assert len(list((tmp_path / "out" / "eval-epoch2" / "images").iterdir())) == 6


# --- going on


def test_resuming_on_another_global_batch_goes_on_at_the_same_epoch(inputs, tmp_path, capsys):
    """Three steps an epoch before, six after: epoch 1 begins at step 6, its rate too.

    On the same it ends with the bits of an uninterrupted one: tests/faults, test_validation.py.
    """
    runs.train(inputs, tmp_path / "out", epochs=1)
    capsys.readouterr()
    runs.train(inputs, tmp_path / "out", resume=tmp_path / "out", accum_iter=1, log_freq=1)
    printed = capsys.readouterr().out
    lines = [line for line in printed.splitlines() if "  step " in line]
    assert len(lines) == 6 and "step 7/12" in lines[0]
    assert "going on at the same epoch, 1.00, with micro_batches 1 (was 2)" in printed


def test_images_and_their_cached_latents_train_the_same_but_for_float16(inputs, trained, tmp_path):
    """Without a cache the scale and order that it measured are named by flags."""
    config = runs.load(trained)["config"]
    changes = {name: config[name] for name in ("latent_scale", "channel_order")}
    changes["channel_order"] = ",".join(map(str, changes["channel_order"]))
    found = runs.train(inputs, tmp_path / "out", **runs.IMAGE_FLAGS | changes)
    assert found["config"] == config and found["vae_sha256"] == runs.load(trained)["vae_sha256"]
    loss, expected = (runs.scalars(f)["train/loss"][-1][1] for f in (tmp_path / "out", trained))
    assert loss == pytest.approx(expected, rel=1e-3)


def test_published_cache_trains(inputs, tmp_path):
    """CLASS/IMAGE.npz and nothing else: the scale is KL-16's, the channels those of the flags."""
    cache = tmp_path / "cache"
    runs.use("cache", inputs, cached_path=cache, format="npz")
    for path in cache.glob("*.json"):
        path.unlink()
    geometry = dict(vae_embed_dim=runs.CHANNELS, vae_stride=runs.STRIDE)
    found = runs.train(inputs, tmp_path / "out", cached_path=cache, **geometry)
    config = found["config"]
    assert config["latent_scale"] == 0.2325 and config["channel_order"] == [0, 1, 2, 3]
    assert found["vae_sha256"] is None and runs.scalars(tmp_path / "out")["train/loss"][-1][1] < 5


# --- ways to train


def test_evaluating_while_training_changes_nothing_of_it_and_is_made_up_for(
    inputs, trained, tmp_path, capsys
):
    sampling = dict(online_eval=True, eval_freq=1, vae_path="vae.ckpt", num_images=6, num_iter=2)
    sampling |= dict(eval_bsz=6, cfg=2, resume="auto")
    stopped = mock.patch.object(engine_tokenbridge, "evaluate", side_effect=stop.Stopped("SIGTERM"))
    with stopped, pytest.raises(stop.Stopped):
        runs.train(inputs, tmp_path / "out", **sampling)
    assert load_checkpoint(tmp_path / "out" / "checkpoint-step00000003.pth")  # saved before
    found = runs.train(inputs, tmp_path / "out", **sampling)
    runs.assert_same_training(found, runs.load(trained))
    assert "FID and IS are not computed" in capsys.readouterr().out
    assert (tmp_path / "out" / "eval-epoch2" / "metrics.json").exists()
    runs.train(inputs, tmp_path / "raw", **sampling, eval_weights="model", epochs=1)
    grids = [path.read_bytes() for path in tmp_path.glob("*/eval-epoch1/grid.png")]
    assert len(grids) == 2 and grids[0] != grids[1]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_lower_precision_trains_with_full_precision_weights(inputs, trained, tmp_path, precision):
    found = runs.train(inputs, tmp_path / "out", precision=precision)
    state = runs.tensors({key: found[key] for key in ("model", "model_ema", "optimizer")})
    assert {t.dtype for t in state.values()} == {torch.float32}
    # Six steps: the scaler that is used has counted those without overflow.
    assert (found["scaler"]["_growth_tracker"] > 0) == (precision == "fp16")
    for tag, tolerance in (("train/loss", 1e-2), ("train/grad_norm", 0.05)):  # of no scaled ones
        value, expected = (
            runs.scalars(folder)[tag][-1][1] for folder in (tmp_path / "out", trained)
        )
        assert value == pytest.approx(expected, rel=tolerance) and value != expected


def test_bad_images_are_skipped_counted_and_named(own, tmp_path, capfd):
    (own / "data" / "train" / "bee" / "3.png").write_bytes(b"broken")
    settings = runs.IMAGE_FLAGS | dict(skip_bad_images=True, num_workers=1)
    runs.train(own, tmp_path / "out", **settings)
    captured = capfd.readouterr()
    assert "skipped images 1" in captured.out and captured.err.count("skipped: ") == 1
    assert runs.scalars(tmp_path / "out")["data/skipped_images"][-1][1] == 1


# --- --dry_run: all is checked, one step is made, nothing is written


@pytest.mark.parametrize("source", [{}, runs.IMAGE_FLAGS])
def test_a_training_says_its_cost_and_writes_nothing(inputs, tmp_path, capsys, source):
    """Nor among the inputs, which their fixture sees."""
    changes = source | dict(epochs=5, metrics_file=tmp_path / "m.jsonl", dry_run=True, json=True)
    runs.use("train", inputs, output_dir=tmp_path / "out", **changes)
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
        runs.use("train", inputs, output_dir=tmp_path / "out", dry_run=True, **changes)
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
    runs.call(main_tokenbridge.main, *argv.split(), "--dry_run", "--epochs", "2")
    out = capsys.readouterr().out
    assert "a training set as large as ImageNet's: 1281167 images" in out
    assert f"{2 * (1281167 // 6):,}" in out and "nothing was written" in out
    assert list(tmp_path.iterdir()) == []


def test_two_processes_share_the_step(inputs, tmp_path):
    asked = runs.command("train", inputs, output_dir=tmp_path / "out", dry_run=True, json=True)
    result = runs.on_processes(2, *asked)
    figures = json.loads(result.stdout)
    assert figures["images_per_step"] == 16
    assert figures["device_hours"] == pytest.approx(2 * figures["hours"])
