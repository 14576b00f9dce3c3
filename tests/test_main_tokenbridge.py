"""main_tokenbridge.py as a user calls it: however it is started, it trains and draws the same."""

from unittest import mock

import numpy as np
import pytest
import torch

import engine_tokenbridge
from tests import runs
from util import stop
from util.checkpoint import load_checkpoint
from util.vae import load_vae, save_vae


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
    for tag in ("train/loss", "train/lr", "train/grad_norm"):
        np.testing.assert_allclose(found[tag], expected[tag], rtol=1e-5)
    written = sorted(path.name.split(".")[0] for path in (tmp_path / "out").iterdir())
    checkpoints = ["checkpoint-last", "checkpoint-step00000006"]
    assert written == [*checkpoints, "config", "eval-epoch2", "events"]
    assert len(list((tmp_path / "out" / "eval-epoch2" / "images").iterdir())) == 6


# --- going on


def test_resumed_training_equals_uninterrupted(inputs, trained, tmp_path):
    runs.interrupted(inputs, tmp_path / "out")
    assert runs.load(tmp_path / "out")["epoch"] == 0
    resumed = runs.train(inputs, tmp_path / "out", resume=tmp_path / "out", num_workers=1)
    assert resumed["epoch"] == 1 and resumed["step"] == 6
    runs.assert_same_training(resumed, runs.load(trained))


def test_resuming_on_another_global_batch_goes_on_at_the_same_epoch(inputs, tmp_path, capsys):
    """Three steps an epoch before, six after: epoch 1 begins at step 6, its rate too."""
    runs.interrupted(inputs, tmp_path / "out")
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


def test_evaluating_while_training_changes_nothing_of_it(inputs, trained, tmp_path, capsys):
    sampling = dict(vae_path="vae.ckpt", num_images=6, num_iter=2, eval_bsz=6, eval_freq=1, cfg=2)
    found = runs.train(inputs, tmp_path / "out", online_eval=True, **sampling)
    runs.assert_same_training(found, runs.load(trained))
    assert "FID and IS are not computed" in capsys.readouterr().out
    raw = tmp_path / "raw"
    runs.train(inputs, raw, online_eval=True, eval_weights="model", epochs=1, **sampling)
    grids = [(out / "eval-epoch1" / "grid.png").read_bytes() for out in (tmp_path / "out", raw)]
    assert grids[0] != grids[1]


def test_evaluation_that_was_stopped_is_made_up_for(inputs, tmp_path):
    sampling = dict(online_eval=True, eval_freq=1, vae_path="vae.ckpt", no_metrics=True)
    sampling |= dict(num_images=6, num_iter=2, eval_bsz=2, resume="auto")
    stopped = mock.patch.object(engine_tokenbridge, "evaluate", side_effect=stop.Stopped("SIGTERM"))
    with stopped, pytest.raises(stop.Stopped):
        runs.train(inputs, tmp_path / "out", **sampling)
    assert load_checkpoint(tmp_path / "out" / "checkpoint-step00000003.pth")  # saved before
    runs.train(inputs, tmp_path / "out", **sampling)
    for epoch in (1, 2):
        assert (tmp_path / "out" / f"eval-epoch{epoch}" / "metrics.json").exists()


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


def test_log_holds_all_figures(inputs, tmp_path, capsys):
    """lr = blr * global batch / 256, warmed up over an epoch of three steps."""
    runs.train(inputs, tmp_path / "out", log_freq=1, log_dir=tmp_path / "logs")
    written = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert written == ["checkpoint-last.pth", "checkpoint-step00000006.pth", "config.yaml"]
    found = runs.scalars(tmp_path / "logs")
    assert set(found) == {
        *("train/loss", "train/lr", "train/grad_norm"),
        *("speed/images_per_second", "speed/data_wait_percent"),
        *("speed/tflops_per_device", "speed/memory_gib"),
    }
    assert [step for step, _ in found["train/loss"]] == [1, 2, 3, 4, 5, 6]
    lr = 1e-2 * 8 / 256
    expected = [0, lr / 3, lr * 2 / 3, lr, lr * 0.75, lr * 0.25]
    np.testing.assert_allclose([v for _, v in found["train/lr"]], expected, rtol=1e-5, atol=1e-12)
    assert found["train/loss"][0][1] == pytest.approx(np.log(64), rel=0.3)


def test_bad_images_are_skipped_counted_and_named(own, tmp_path, capfd):
    (own / "data" / "train" / "bee" / "3.png").write_bytes(b"broken")
    settings = runs.IMAGE_FLAGS | dict(skip_bad_images=True, num_workers=1)
    runs.train(own, tmp_path / "out", **settings)
    captured = capfd.readouterr()
    assert "skipped images 1" in captured.out and captured.err.count("skipped: ") == 1
    assert runs.scalars(tmp_path / "out")["data/skipped_images"][-1][1] == 1


# --- evaluation


def test_another_vae_is_worth_a_warning_and_folders_say_the_weights(
    inputs, trained, tmp_path, capsys
):
    """What is drawn does not depend on processes: test_evaluation_restart.py."""
    vae = load_vae(inputs / "vae.ckpt")
    vae.decoder.conv_out.bias.data.add_(0.1)
    save_vae(tmp_path / "vae.ckpt", vae)
    runs.evaluate(inputs, tmp_path / "own", trained)
    assert "warning" not in capsys.readouterr().err
    changes = dict(vae_path=tmp_path / "vae.ckpt", eval_weights="model")
    runs.evaluate(inputs, tmp_path / "other", trained, **changes)
    assert capsys.readouterr().err.count("trained with another VAE") == 1
    names = {path.name for path in tmp_path.glob("*/ariter*")}
    assert names == {f"ariter4-temp1-linearcfg2-image12-seed1-{w}" for w in ("ema", "model")}
