"""Generated images, and what an evaluation leaves behind."""

import pytest
import torch

from models.sampler import sample_latents
from models.tokenizer import Tokenizer
from models.vae import AutoencoderKL
from tests.conftest import tiny_model
from util.device import resolve_precision
from util.evaluation import EvalSettings, evaluate, generate
from util.evaluation_results import shown_ids
from util.images import to_uint8

CPU = torch.device("cpu")
FP32 = resolve_precision("fp32", CPU)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    torch.manual_seed(0)
    return Tokenizer(AutoencoderKL(6, (1, 1, 1), ch=32, num_res_blocks=1), latent_scale=0.5)


EVALUATION = EvalSettings(
    num_images=6, eval_bsz=4, num_iter=3, cfg=1.5, cfg_schedule="linear", temperature=1.0, seed=5
)


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
