"""Loss on held-out images: what is held out, what is measured, and that training never notices."""

import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import main_cache
import main_tokenbridge
from models.masking import draw_mask_ratio
from models.tokenizers.tokenizer import Tokenizer
from tests.conftest import tiny_model
from tests.runs import (
    CACHE_FLAGS,
    TRAIN_FLAGS,
    assert_same_training,
    call,
    flags,
    load,
    make_inputs,
    on_processes,
    refused,
    train,
)
from util import stop
from util.data.latent_cache import open_cache
from util.device import resolve_precision
from util.heldout import (
    RATIOS,
    HeldOut,
    HeldOutLoss,
    as_scalars,
    masks,
    ratio_weights,
    set_aside,
    spread,
)
from util.inputs import TrainingData
from util.saver import CheckpointSaver

CPU = torch.device("cpu")
# Both kinds of a look, held-out images that no training sees and a VAE to draw with.
LOOKING = dict(preview_freq=1, preview_images=3, preview_iter=2, vae_path="vae.ckpt")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """data/val/ beside data/train/, and a cache of it."""
    folder = make_inputs(tmp_path_factory.mktemp("inputs"))
    for name, count in (("ant", 5), ("cat", 3)):
        for path in sorted((folder / "data" / "train" / name).iterdir())[:count]:
            kept = folder / "data" / "val" / name / path.name
            kept.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, kept)
    argv = flags(folder, CACHE_FLAGS, cached_path=folder / "val", dtype="float32", split="val")
    call(main_cache.main, *argv)
    return folder


@pytest.fixture(scope="module")
def unseen(inputs, tmp_path_factory) -> dict:
    """The checkpoint of a training that nobody looks at."""
    return train(inputs, tmp_path_factory.mktemp("unseen") / "out", log_freq=1)


@pytest.fixture(scope="module")
def looked(inputs, tmp_path_factory) -> Path:
    """The output folder of the same training, looked at after steps 1, 2, 3, ..."""
    output = tmp_path_factory.mktemp("looked") / "out"
    train(inputs, output, **LOOKING, val_path=inputs / "data" / "val", val_freq=0.3, log_freq=1)
    return output


def read(folder: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    names = events.Tags()["scalars"]
    return {name: [(e.step, e.value) for e in events.Scalars(name)] for name in names}


def of_looks(found: dict) -> dict:
    return {k: v for k, v in found.items() if k.startswith(("heldout", "levels"))}


# --- what is held out


@pytest.mark.parametrize(("count", "wanted"), [(24, 6), (24, 5), (7, 7), (3, 10), (1, 1)])
def test_spread_is_even_and_takes_nothing_twice(count, wanted):
    found = spread(count, wanted)
    assert len(found) == min(count, wanted) and found == sorted(set(found))
    assert found[0] >= 0 and found[-1] < count
    gaps = np.diff([*found, found[0] + count])
    assert gaps.max() - gaps.min() <= 1


def test_images_set_aside_are_of_all_classes_and_not_trained_on(inputs):
    cache = open_cache(inputs / "cache")
    data = TrainingData(cache, cache.classes, "--cached_path", None, cache.manifest)
    rest, held_out = set_aside(data, 6)
    assert np.bincount(held_out.dataset.labels).tolist() == [2, 2, 2]
    assert len(rest.dataset) == 18 and len(held_out.dataset) == 6
    for flip in (False, True):
        parts = [part[(i, flip)] for part in (rest.dataset, held_out.dataset) for i in range(6)]
        whole = [cache[(i, flip)] for i in range(24)]
        for moments, label in parts:
            same = [torch.equal(moments, other) for other, _ in whole]
            assert sum(same) == 1 and whole[same.index(True)][1] == label


def test_holding_out_trains_on_the_others_alone(inputs, tmp_path, capsys):
    found = train(inputs, tmp_path / "out", holdout=4, epochs=1)
    assert found["schedule"]["images"] == 20
    assert "held-out loss on 4 images of 4 images that --holdout takes out" in (
        capsys.readouterr().out
    )


def test_folder_beside_the_training_s_is_found_and_so_is_its_cache(inputs, unseen, tmp_path):
    """Posteriors of one batch and of single images differ in rounding at most."""
    named = dict(data_path="data", vae_path="vae.ckpt")
    train(inputs, tmp_path / "images", **named, epochs=1)
    train(inputs, tmp_path / "cache", val_cached_path=inputs / "val", epochs=1)
    found, expected = (of_looks(read(tmp_path / name)) for name in ("images", "cache"))
    assert "heldout/loss_raw" in found and list(found) == list(expected)
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-5)


def test_what_cannot_be_held_out_is_refused_in_one_line(inputs, tmp_path, capsys):
    def told(**changes) -> str:
        argv = flags(inputs, TRAIN_FLAGS, output_dir=tmp_path / "out", **changes)
        return refused(capsys, main_tokenbridge.main, *argv)

    assert "--holdout 24 leaves nothing of the 24 images" in told(holdout=24)
    assert "comes from one of them" in told(holdout=1, val_path=inputs / "data" / "val")
    assert "--vae_path" in told(val_path=inputs / "data" / "val")
    (tmp_path / "val" / "dog").mkdir(parents=True)
    shutil.copyfile(inputs / "data" / "val" / "ant" / "0.png", tmp_path / "val" / "dog" / "0.png")
    line = told(val_path=tmp_path / "val", vae_path="vae.ckpt")
    assert "class 'dog'" in line and "--cached_path" in line
    assert "--val_cached_path" in told(val_cached_path=tmp_path / "nothing")
    assert not (tmp_path / "out").exists()


def test_unfit_folder_beside_the_training_s_is_said_and_training_goes_on(inputs, tmp_path, capsys):
    data = tmp_path / "data"
    (data / "val").mkdir(parents=True)  # as ImageNet's, unpacked without folders of classes
    train(inputs, tmp_path / "out", data_path=data, vae_path="vae.ckpt", epochs=1)
    assert capsys.readouterr().out.count("no held-out loss: ") == 1


# --- what is measured


def test_masks_grow_with_the_ratio_and_depend_on_the_image_alone():
    config = tiny_model().config
    found = masks([3, 7, 12], config)
    for ratio, mask in zip(RATIOS, found, strict=True):
        assert mask.sum(1).tolist() == [math.ceil(config.seq_len * ratio)] * 3
    assert all(bool((small <= large).all()) for small, large in zip(found, found[1:], strict=False))
    assert torch.equal(masks([12], config)[:, 0], found[:, 2])
    assert not torch.equal(found[1, 0], found[1, 1])


@pytest.mark.parametrize("minimum", [0.7, 0.3, 0.95])
def test_weights_are_how_often_training_draws_the_ratios(minimum):
    drawn = torch.tensor([draw_mask_ratio(minimum) for _ in range(4000)])
    nearest = (drawn[:, None] - torch.tensor(RATIOS)).abs().argmin(dim=1)
    counts = torch.bincount(nearest, minlength=len(RATIOS)) / len(drawn)
    torch.testing.assert_close(torch.tensor(ratio_weights(minimum)), counts, rtol=0, atol=0.03)


def test_weights_where_all_is_masked():
    assert ratio_weights(1.0) == [0, 0, 0, 0, 1]


def held_out_loss(dataset, count: int = 99) -> HeldOutLoss:
    config = tiny_model().config
    held_out = HeldOut(dataset, [2, 0, 1], "")  # labels of the training's
    tokenizer = Tokenizer(None, latent_scale=2.0)
    return HeldOutLoss(held_out, count, config, tokenizer, CPU, resolve_precision("fp32", CPU))


@pytest.fixture
def moments() -> list[tuple[torch.Tensor, int]]:
    """Nineteen posteriors, more than a batch, of small deviation: noise hardly matters."""
    values = torch.randn(19, 12, 4, 4)
    values[:, 6:] = -30
    return [(value, i % 3) for i, value in enumerate(values)]


def test_loss_is_the_model_s_own_at_every_ratio(moments):
    model = tiny_model(attn_dropout=0.5, label_drop_prob=0.9).train()  # neither has a part in it
    found = held_out_loss(moments)(model)
    assert model.training and found.shape == (len(RATIOS), 6)
    model.eval()
    latents = 2.0 * torch.stack([value[:6] for value, _ in moments])
    labels = torch.tensor([[2, 0, 1][label] for _, label in moments])
    for row, mask in zip(found, masks(range(19), model.config), strict=True):
        with torch.no_grad():
            torch.testing.assert_close(row.mean().float(), model(latents, labels, mask))
            channels = model.channel_losses(latents, labels, mask)
        torch.testing.assert_close(row.float(), channels)


def test_same_images_are_measured_whatever_was_drawn_before(moments):
    model = tiny_model()
    first = held_out_loss(moments, count=5)
    expected, state = first(model), torch.get_rng_state()
    torch.rand(3)
    assert torch.equal(held_out_loss(moments, count=5)(model), expected)
    torch.set_rng_state(state)
    first(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert first.numbers == spread(19, 5)


def test_signal_cuts_it_short_and_nothing_half_measured_is_told(moments, monkeypatch):
    loss = held_out_loss(moments)
    monkeypatch.setattr(stop, "requested", lambda: True)
    assert loss(tiny_model()) is None


def test_names_tell_channel_and_place_in_the_head(moments):
    config = tiny_model().config
    losses = torch.arange(30, dtype=torch.float64).reshape(5, 6)
    found = as_scalars(losses, "ema", config)
    weights = torch.tensor(ratio_weights(0.7), dtype=torch.float64)
    assert found["heldout/loss_ema"] == pytest.approx((weights @ losses).mean().item())
    assert found["heldout_ratio_ema/0.50"] == losses[1].mean()
    assert config.channel_order[2] == 5
    assert found["heldout_order_ema/02_channel_05"] == found["heldout_channel_ema/05"]
    assert found["heldout_channel_ema/05"] == pytest.approx((weights @ losses[:, 5]).item())


# --- training never notices


def test_looking_changes_nothing_of_the_training(unseen, looked):
    assert_same_training(load(looked), unseen)


def test_curves_begin_with_the_first_step_and_end_with_the_last(looked):
    found = read(looked)
    assert [step for step, _ in found["heldout/loss_ema"]] == [1, 2, 3, 4, 5, 6]
    assert [step for step, _ in found["levels/entropy_data"]] == [1, 3, 6]  # preview: an epoch
    assert found["heldout/loss_raw"][0][1] == pytest.approx(np.log(64), rel=0.3)
    first, last = (found["heldout_ratio_raw/1.00"][i][1] for i in (0, -1))
    assert last < first


def test_two_processes_look_as_one(inputs, looked, tmp_path):
    argv = flags(inputs, TRAIN_FLAGS, LOOKING, output_dir=tmp_path / "out", accum_iter=1)
    argv += ["--val_path", str(inputs / "data" / "val"), "--val_freq", "0.3", "--log_freq", "1"]
    result = on_processes(2, "main_tokenbridge.py", *argv)
    assert result.returncode == 0, result.stderr
    assert_same_training(load(tmp_path / "out"), load(looked))
    assert of_looks(read(tmp_path / "out")) == of_looks(read(looked))


def test_resumed_training_looks_as_if_it_had_never_stopped(inputs, looked, tmp_path, monkeypatch):
    """Killed between a checkpoint and its look: both are there in the end."""
    settings = LOOKING | dict(val_path=inputs / "data" / "val", val_freq=0.3, log_freq=1)

    def save_and_die(saver, step, state):
        saver._write(step, state(), 0.0)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(CheckpointSaver, "save", save_and_die)
        train(inputs, tmp_path / "out", save_last_freq=1, **settings)
    resumed = train(inputs, tmp_path / "out", resume="auto", **settings)
    assert_same_training(resumed, load(looked))
    assert of_looks(read(tmp_path / "out")) == of_looks(read(looked))
