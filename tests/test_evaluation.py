"""Generated images, and what an evaluation leaves behind."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from models.sampler import sample_latents
from models.tokenizer import Tokenizer
from models.vae import AutoencoderKL
from tests.conftest import run_script, tiny_model
from tests.measures import Pixels  # noqa: F401  registers the extractor "pixels"
from tools import compare_images
from util.device import resolve_precision
from util.ema import EMA
from util.errors import UserError
from util.evaluation import EvalSettings, evaluate, generate
from util.evaluation_results import shown_ids
from util.extractor import Extractor
from util.images import save_png, to_uint8
from util.metrics import Measure
from util.reference import Reference

CPU = torch.device("cpu")
FP32 = resolve_precision("fp32", CPU)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    torch.manual_seed(0)
    return Tokenizer(AutoencoderKL(6, (1, 1, 1), ch=32, num_res_blocks=1), latent_scale=0.5)


EVALUATION = EvalSettings(
    num_images=6, eval_bsz=4, num_iter=3, cfg=1.5, cfg_schedule="linear", temperature=1.0, seed=5
)
ENOUGH = replace(EVALUATION, num_images=12)  # for the ten splits of the score


def test_images_are_those_of_the_sampler_class_by_class(tokenizer):
    model = tiny_model()
    images = generate(model, tokenizer, range(1, 5), EVALUATION, CPU, FP32)
    labels = torch.tensor([0, 1, 1, 2])  # two images of each of three classes
    chosen = dict(num_iter=3, cfg=1.5, seed=5, image_ids=[1, 2, 3, 4])
    latents = sample_latents(model, labels, **chosen)
    assert torch.equal(images, to_uint8(tokenizer.decode(latents)))
    assert images.dtype == torch.uint8 and images.shape == (4, 3, 16, 16)


def test_evaluation_leaves_the_model_in_training_mode_and_shows_a_grid(tokenizer, tmp_path):
    model = tiny_model().train()
    found, samples = evaluate(model, tokenizer, EVALUATION, tmp_path, CPU, FP32, None)
    assert found == {} and model.training and model.head.training
    assert samples.shape == (3, 2 * 18 + 2, 3 * 18 + 2)  # a column for each class
    assert len(list((tmp_path / "images").iterdir())) == 6


def test_first_look_has_a_column_for_each_of_the_first_classes():
    assert shown_ids(num_images=6, class_num=3) == [0, 2, 4, 1, 3, 5]
    large = shown_ids(num_images=50000, class_num=1000)
    assert len(large) == 80 and large[:3] == [0, 50, 100] and large[10] == 1


def test_folder_is_named_by_what_decides_the_images():
    name = "ariter3-temp1-linearcfg1.5-image6-seed5-ema"
    assert EVALUATION.folder_name() == name


def test_training_goes_on_as_if_it_had_not_been_evaluated(tokenizer, tmp_path):
    """Weights, averages and every random generator, to the bit; the extractor draws from one."""
    model = tiny_model(proj_dropout=0.1).train()
    ema = EMA(model.published_parameters(), 0.5)
    for average in ema.averages:
        average.add_(torch.randn_like(average))
    states = (torch.get_rng_state, np.random.get_state, random.getstate)
    kept = [tensor.clone() for tensor in (*model.state_dict().values(), *ema.averages)]
    before = [state() for state in states]
    measure = Measure(Extractor("pixels", None, CPU), Reference(None, {}))
    with ema.swapped_in():
        averaged, _ = evaluate(model, tokenizer, ENOUGH, tmp_path / "a", CPU, FP32, measure)
    raw, _ = evaluate(model, tokenizer, ENOUGH, tmp_path / "b", CPU, FP32, measure)
    assert averaged["score_mean"] != raw["score_mean"]
    after = [state() for state in states]
    assert torch.equal(before[0], after[0]) and before[2] == after[2]
    assert all(np.array_equal(a, b) for a, b in zip(before[1], after[1], strict=True))
    now = (*model.state_dict().values(), *ema.averages)
    assert all(map(torch.equal, kept, now)) and model.training


def test_evaluation_while_training_takes_another_folder_where_a_script_refuses(tokenizer, tmp_path):
    folder, model = tmp_path / "eval-epoch2", tiny_model()
    for cfg in (1.5, 2.0, 1.5, 3.0):
        settings = replace(EVALUATION, cfg=cfg)
        evaluate(model, tokenizer, settings, folder, CPU, FP32, None, training=True)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["eval-epoch2", "eval-epoch2-2", "eval-epoch2-3"]
    with pytest.raises(UserError, match="settings.cfg 1.5 .now 4.0."):
        evaluate(model, tokenizer, replace(EVALUATION, cfg=4.0), folder, CPU, FP32, None)


def test_comparison_counts_the_images_that_differ(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    image = torch.full((3, 4, 4), 100, dtype=torch.uint8)
    for number, change in enumerate((0, 1, 20)):
        changed = image.clone()
        changed[0, 0, 0] += change
        for folder, shown in ((first, image), (second, changed)):
            folder.mkdir(exist_ok=True)
            save_png(shown, folder / f"{number}.png")
    assert compare_images.differences(first, second).tolist() == [0, 1, 20]
    result = run_script("tools/compare_images.py", first, second)
    assert "3 images: 2 differ at all, 1 by more than 8 levels" in result.stdout
