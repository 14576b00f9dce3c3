"""Validation while training: what is held out, what is measured and drawn, and no trace of it."""

import io
import math
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from models.masking import MaskRatios
from models.sampler import SamplingOptions, sample_latents
from models.tokenizers.tokenizer import Tokenizer, decode_images
from tests import runs
from tests.conftest import tiny_model
from util import stop, validation
from util.checkpoint import load_checkpoint
from util.device import resolve_precision
from util.saver import CheckpointSaver
from util.setup import build_model
from util.vae import load_vae
from util.validation import RATIOS, Validation, ratio_weights, validation_masks

CPU = torch.device("cpu")
FP32 = resolve_precision("fp32", CPU)
VALIDATED = dict(preview_freq=1, preview_images=3, preview_iter=2, vae_path="vae.ckpt")
VALIDATED |= dict(val_freq=0.3, log_freq=1)


@pytest.fixture(scope="module")
def beside(tmp_path_factory) -> Path:
    """Inputs with data/val/ beside data/train/, and a cache of it."""
    folder = runs.make_inputs(tmp_path_factory.mktemp("inputs"))
    for name, count in (("ant", 5), ("cat", 3)):
        (folder / "data" / "val" / name).mkdir(parents=True)
        for path in sorted((folder / "data" / "train" / name).iterdir())[:count]:
            shutil.copyfile(path, folder / "data" / "val" / name / path.name)
    runs.use("cache", folder, cached_path="val", dtype="float32", split="val")
    return folder


@pytest.fixture(scope="module")
def validated(beside, tmp_path_factory) -> Path:
    """The output folder of a training, validated after steps 1, 2, 3, ..."""
    output = tmp_path_factory.mktemp("validated") / "out"
    runs.train(beside, output, **VALIDATED, val_path=beside / "data" / "val")
    return output


def curves_of(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Of what validation measures."""
    own = ("validation", "levels")
    return {name: points for name, points in runs.scalars(folder).items() if name.startswith(own)}


# --- what is held out


def test_holding_out_trains_on_the_others_and_draws_nothing_without_a_vae(beside, tmp_path, capsys):
    found = runs.train(
        beside, tmp_path / "out", holdout=4, epochs=1, preview_freq=1, preview_iter=1
    )
    assert found["schedule"]["images"] == 20
    said = capsys.readouterr().out
    assert "validation loss on 4 images of 4 images that --holdout takes out" in said
    assert said.count("no preview images") == 1
    tags = runs.events_of(tmp_path / "out").Tags()
    assert tags["images"] == [] and "levels/generated_ema" in tags["histograms"]


def test_folder_beside_the_training_s_is_found_and_so_is_its_cache(beside, tmp_path, capsys):
    """Posteriors of one batch and of single images differ in rounding at most."""
    runs.train(beside, tmp_path / "images", data_path="data", vae_path="vae.ckpt", epochs=1)
    runs.train(beside, tmp_path / "cache", val_cached_path=beside / "val", epochs=1)
    curves, expected = (curves_of(tmp_path / name) for name in ("images", "cache"))
    assert "validation/loss_raw" in curves and list(curves) == list(expected)
    for name, values in expected.items():
        np.testing.assert_allclose(curves[name], values, rtol=1e-5)
    capsys.readouterr()
    (tmp_path / "data" / "val").mkdir(parents=True)  # as ImageNet's, without folders of classes
    runs.train(beside, tmp_path / "out", data_path=tmp_path / "data", vae_path="vae.ckpt", epochs=1)
    assert capsys.readouterr().out.count("no validation loss: ") == 1


def test_what_cannot_be_held_out_is_refused_in_one_line(beside, tmp_path, refusal):
    line = partial(refusal, "train", beside)
    assert "--holdout 24 leaves nothing of the 24 of" in line(holdout=24)
    assert "comes from one of them" in line(holdout=1, val_path=beside / "data" / "val")
    assert "--vae_path" in line(val_path=beside / "data" / "val")
    (tmp_path / "val" / "dog").mkdir(parents=True)
    shutil.copyfile(beside / "data" / "val" / "ant" / "0.png", tmp_path / "val" / "dog" / "0.png")
    other = line(val_path=tmp_path / "val", vae_path="vae.ckpt")
    assert "class 'dog'" in other and "--cached_path" in other
    assert "--val_cached_path" in line(val_cached_path=tmp_path / "nothing")


# --- what is measured


def test_masks_grow_with_the_ratio_and_depend_on_the_image_alone():
    length = tiny_model().config.seq_len
    masks = validation_masks([3, 7, 12], length)
    for ratio, mask in zip(RATIOS, masks, strict=True):
        assert mask.sum(1).tolist() == [math.ceil(length * ratio)] * 3
    assert all(bool((small <= large).all()) for small, large in zip(masks, masks[1:], strict=False))
    assert torch.equal(validation_masks([12], length)[:, 0], masks[:, 2])
    assert not torch.equal(masks[1, 0], masks[1, 1])


@pytest.mark.parametrize(
    "ratios", [("normal", 0.7), ("normal", 0.3), ("normal", 0.95), ("exp", 0.2)]
)
def test_weights_are_how_often_training_draws_the_ratios(ratios):
    ratios = MaskRatios(*ratios)
    drawn = torch.tensor([ratios.draw() for _ in range(4000)])
    nearest = (drawn[:, None] - torch.tensor(RATIOS)).abs().argmin(dim=1)
    counts = torch.bincount(nearest, minlength=len(RATIOS)) / len(drawn)
    torch.testing.assert_close(torch.tensor(ratio_weights(ratios)), counts, rtol=0, atol=0.03)
    assert ratio_weights(MaskRatios("normal", 1.0)) == [0, 0, 0, 0, 1]


def new_validation(dataset, count: int = 99) -> Validation:
    settings = validation.ValidationSettings(1, count, 1, 3, 6, SamplingOptions(num_iter=2))
    images = validation.ValidationSet(dataset, [2, 0, 1], "")  # labels of the training's
    return Validation(settings, Tokenizer(None, latent_scale=2.0), CPU, FP32, dataset, images)


@pytest.fixture
def moments() -> list[tuple[torch.Tensor, int]]:
    """Nineteen posteriors, more than a batch, of small deviation: noise hardly matters."""
    values = torch.randn(19, 12, 4, 4)
    values[:, 6:] = -30
    return [(value, i % 3) for i, value in enumerate(values)]


def test_loss_is_the_model_s_own_at_every_ratio(moments):
    model = tiny_model(attn_dropout=0.5, label_drop_prob=0.9).train()  # neither has a part in it
    losses = new_validation(moments).loss(model)
    assert model.training and losses.shape == (len(RATIOS), 6)
    model.eval()
    latents = 2.0 * torch.stack([value[:6] for value, _ in moments])
    labels = torch.tensor([[2, 0, 1][label] for _, label in moments])
    for row, mask in zip(losses, validation_masks(range(19), model.config.seq_len), strict=True):
        with torch.no_grad():
            torch.testing.assert_close(row.mean().float(), model(latents, labels, mask))
            channels = model.channel_losses(latents, labels, mask)
        torch.testing.assert_close(row.float(), channels)


def test_same_images_are_measured_whatever_was_drawn_before(moments, monkeypatch):
    model = tiny_model()
    first = new_validation(moments, count=5)
    expected = first.loss(model)
    torch.rand(3)
    assert torch.equal(new_validation(moments, count=5).loss(model), expected)
    assert first.numbers == validation.evenly_spread(19, 5)
    with stop.deferred():  # as in training: nothing half measured is said
        monkeypatch.setattr(stop, "requested", lambda: True)
        assert new_validation(moments).loss(tiny_model()) is None


def test_names_say_ratio_and_channel_where_a_head_has_them():
    """A continuous head has a loss of a whole token."""
    config = tiny_model().config
    losses = torch.arange(30, dtype=torch.float64).reshape(5, 6)
    named = validation.as_scalars(losses, "ema", config)
    weights = torch.tensor(ratio_weights(config.mask_ratios), dtype=torch.float64)
    assert named["validation/loss_ema"] == pytest.approx((weights @ losses).mean().item())
    assert named["validation_ratio_ema/0.50"] == losses[1].mean()
    assert named["validation_channel_ema/05"] == pytest.approx((weights @ losses[:, 5]).item())
    whole_token = torch.ones(len(RATIOS), 1, dtype=torch.float64)
    named = validation.as_scalars(whole_token, "raw", config)
    assert named["validation/loss_raw"] == 1.0 and len(named) == 2 + len(RATIOS)
    assert named["validation/loss_per_scalar_raw"] == 1 / 6


# --- what is drawn


@pytest.mark.parametrize(("side", "shown"), [(16, 16), (256, 128)])
def test_large_images_are_shrunk(side, shown):
    images = torch.randint(0, 256, (4, 3, side, side), dtype=torch.uint8)
    picture = validation.side_by_side(images, images)
    width = 2 * (shown + 2) + 2  # two columns
    assert picture.shape == (3, width, 2 * width + validation.GAP)
    first = picture[:, 2 : 2 + shown, 2 : 2 + shown].float()
    assert first.mean().item() == pytest.approx(images[0].float().mean().item(), abs=1)


def test_grid_and_levels_are_those_of_the_weights(beside, validated):
    """Six steps: after the first and the ends of both epochs."""
    events = runs.events_of(validated)
    grids = events.Images("validation/raw_and_average")
    assert [grid.step for grid in grids] == [1, 3, 6]
    checkpoint = load_checkpoint(validated / "checkpoint-last.pth")
    tokenizer = Tokenizer(load_vae(beside / "vae.ckpt"), checkpoint.config.latent_scale)
    pictures = []
    for key in ("model", "model_ema"):
        model = build_model(checkpoint.config, checkpoint, key).eval()
        latents = sample_latents(model, torch.tensor([0, 1, 2]), num_iter=2, seed=1)
        pictures.append(decode_images(tokenizer, latents))
        counts = validation.count_levels(model, latents).sum(dim=0)
        name = {"model": "raw", "model_ema": "ema"}[key]
        logged = events.Histograms(f"levels/generated_{name}")[-1].histogram_value
        assert logged.num == 3 * 4 * 16
        assert logged.sum == (counts * torch.arange(64)).sum()
    expected = validation.side_by_side(*pictures)
    with Image.open(io.BytesIO(grids[-1].encoded_image_string)) as image:
        assert np.array_equal(np.asarray(image), expected.permute(1, 2, 0).numpy())
    text = events.Tensors("validation/classes_row_by_row/text_summary")[0].tensor_proto
    assert text.string_val[0] == b"ant, bee, cat"


# --- training goes on as without


def test_validation_changes_nothing_on_one_or_two_processes(trained, validated, beside, tmp_path):
    runs.assert_same_training(runs.load(validated), runs.load(trained))
    curves = curves_of(validated)
    assert [step for step, _ in curves["validation/loss_ema"]] == [1, 2, 3, 4, 5, 6]
    assert curves["validation/loss_raw"][0][1] == pytest.approx(np.log(64), rel=0.3)
    assert curves["validation_ratio_raw/1.00"][-1][1] < curves["validation_ratio_raw/1.00"][0][1]
    runs.train_on(2, beside, tmp_path / "out", **VALIDATED, val_path=beside / "data" / "val")
    runs.assert_same_training(runs.load(tmp_path / "out"), runs.load(validated))
    assert curves_of(tmp_path / "out") == curves_of(validated)


def test_killed_between_checkpoint_and_validation_has_both_in_the_end(
    beside, validated, tmp_path, monkeypatch
):
    settings = VALIDATED | dict(val_path=beside / "data" / "val")

    def save_and_die(saver, step, state):
        saver._write(step, state(), 0.0)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(CheckpointSaver, "save", save_and_die)
        runs.train(beside, tmp_path / "out", save_last_freq=1, **settings)
    assert runs.load(tmp_path / "out")["epoch"] == 0
    resumed = runs.train(beside, tmp_path / "out", resume="auto", num_workers=1, **settings)
    assert resumed["epoch"] == 1 and resumed["step"] == 6
    runs.assert_same_training(resumed, runs.load(validated))
    assert curves_of(tmp_path / "out") == curves_of(validated)
