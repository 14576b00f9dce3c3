"""Preview grids: the same images at every look, raw and averaged side by side, and explained."""

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from models.sampler import SamplingOptions, sample_latents
from models.tokenizers.tokenizer import Tokenizer
from tests.conftest import tiny_model
from tests.runs import make_inputs, train
from util import preview
from util.build import build_model
from util.checkpoint import load_checkpoint
from util.device import resolve_precision
from util.preview import CAPTION, GAP, PreviewSettings
from util.vae import load_vae

CPU = torch.device("cpu")
FP32 = resolve_precision("fp32", CPU)
SETTINGS = PreviewSettings(3, SamplingOptions(num_iter=2, cfg=2.0, temperature=0.9, seed=4))


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """inputs and out: six steps, a preview after steps 1, 3 and 6. Two classes have no images."""
    folder = tmp_path_factory.mktemp("preview")
    inputs = make_inputs(folder / "inputs")
    settings = dict(preview_freq=1, preview_images=3, preview_iter=2, vae_path="vae.ckpt")
    settings |= dict(class_num=5)
    train(inputs, folder / "out", **settings, cfg=2, temperature=0.9, seed=4)
    return folder


@pytest.fixture(scope="module")
def events(trained) -> EventAccumulator:
    return EventAccumulator(str(trained / "out"), size_guidance={"images": 0}).Reload()


def test_labels_go_evenly_through_the_classes():
    for count, class_num, expected in (
        (4, 1000, [0, 250, 500, 750]),
        (6, 3, [0, 0, 1, 1, 2, 2]),
        (1, 10, [0]),
    ):
        settings = replace(SETTINGS, images=count)
        assert settings.labels(class_num).tolist() == expected
    chosen = replace(SETTINGS, classes=(4, 1))
    assert chosen.labels(1000).tolist() == [4, 4, 1]


def test_images_are_the_same_at_every_look():
    model, state = tiny_model(), torch.get_rng_state()
    first = preview.draw(model, SETTINGS, CPU, FP32)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    assert torch.equal(preview.draw(model, SETTINGS, CPU, FP32), first)


@pytest.mark.parametrize(("side", "shown"), [(16, 64), (32, 64), (48, 96), (100, 100), (256, 128)])
def test_tiles_have_a_size_to_look_at(side, shown):
    images = torch.randint(0, 256, (2, 3, side, side), dtype=torch.uint8)
    tiles = preview.as_tiles(images)
    assert tiles.shape == (2, 3, shown, shown) and tiles.dtype == torch.uint8
    if side < shown:
        assert torch.equal(tiles[:, :, :: shown // side, :: shown // side], images)
    assert tiles.float().mean().item() == pytest.approx(images.float().mean().item(), abs=1)


def test_raw_is_left_and_averaged_right():
    raw, averaged = (torch.full((4, 3, 64, 64), value, dtype=torch.uint8) for value in (50, 90))
    picture = preview.side_by_side(raw, averaged, 0.99, 10)
    width = (picture.shape[2] - GAP) // 2
    left, right = picture[:, CAPTION:, :width], picture[:, CAPTION:, width + GAP :]
    assert set(left.unique().tolist()) == {50, 255} and set(right.unique().tolist()) == {90, 255}
    assert bool((picture[:, :CAPTION] < 100).any()), "no caption"
    other = preview.side_by_side(raw, averaged, 0.99, 20)
    differing = (picture != other).any(dim=0).nonzero()
    assert differing[:, 0].max() < CAPTION and differing[:, 1].min() > width  # the share is told


def test_age_of_the_average_is_told_while_it_matters():
    assert preview.initial_share(0.5, 3) == 0.125
    early = preview.about_average(0.9999, 1000)
    assert "90% of it" in early and "0.9999^1000" in early and "no fault" in early
    assert "until about step 46,050" in early  # 0.9999^46050 = 0.01
    late = preview.about_average(0.9999, 50_000)
    assert "less than 1 %" in late and "fault" not in late


@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_age_of_averages_that_forget_at_once_or_never(rate):
    assert f"--ema_rate {rate:g}" in preview.about_average(rate, 10)


def test_a_grid_stands_at_every_look_and_holds_what_the_weights_draw(trained, events):
    grids = events.Images("preview/raw_and_average")
    assert [grid.step for grid in grids] == [1, 3, 6]
    assert len({grid.encoded_image_string for grid in grids}) == 3
    checkpoint = load_checkpoint(trained / "out" / "checkpoint-last.pth")
    vae = load_vae(trained / "inputs" / "vae.ckpt")
    tokenizer = Tokenizer(vae, checkpoint.config.latent_scale)
    drawn = []
    for key in ("model", "model_ema"):
        model = build_model(checkpoint.config, checkpoint, key).eval()
        latents = sample_latents(
            model, torch.tensor([0, 1, 2]), num_iter=2, cfg=2, temperature=0.9, seed=4
        )
        drawn.append(preview.decode(tokenizer, latents))
    expected = preview.side_by_side(*drawn, rate=0.9, steps=6)
    with Image.open(io.BytesIO(grids[-1].encoded_image_string)) as image:
        assert np.array_equal(np.asarray(image), expected.permute(1, 2, 0).numpy())


def test_levels_of_data_and_of_images_are_counted(trained, events):
    found = {
        name: events.Histograms(f"levels/{name}")[-1].histogram_value
        for name in ("data", "generated_raw", "generated_ema")
    }
    assert found["data"].num == 24 * 4 * 16 and found["generated_ema"].num == 3 * 4 * 16
    checkpoint = load_checkpoint(trained / "out" / "checkpoint-last.pth")
    model = build_model(checkpoint.config, checkpoint, "model").eval()
    latents = sample_latents(
        model, torch.tensor([0, 1, 2]), num_iter=2, cfg=2, temperature=0.9, seed=4
    )
    distances = (latents.flatten()[:, None] - model.quantizer.decode(torch.arange(64))).abs()
    counts = torch.bincount(distances.argmin(dim=1), minlength=64)
    limits, buckets = found["generated_raw"].bucket_limit, found["generated_raw"].bucket
    assert dict(zip(limits, buckets, strict=True)) == {i + 0.5: n for i, n in enumerate(counts)}


def test_explanation_stands_beside_the_grid(events):
    (first, *_) = events.Tensors("preview/about_the_average/text_summary")
    assert first.step == 1 and b"90% of it" in first.tensor_proto.string_val[0]
    assert b"of the classes ant, bee, cat." in first.tensor_proto.string_val[0]


def test_cached_latents_without_a_vae_have_no_grid_and_it_is_said_once(trained, tmp_path, capsys):
    train(trained / "inputs", tmp_path / "out", preview_freq=1, preview_iter=1)
    assert capsys.readouterr().out.count("no preview images") == 1
    tags = EventAccumulator(str(tmp_path / "out")).Reload().Tags()
    assert tags["images"] == [] and "levels/generated_ema" in tags["histograms"]
