"""The Python interface that draws images."""

import numpy as np
import pytest
import torch
from PIL import Image

from models.generate import generate
from models.hub import Origin
from models.sampler import sample_latents
from models.tokenizers.kl16 import AutoencoderKL
from models.tokenizers.tokenizer import Tokenizer
from tests.conftest import tiny_model

LABELS = [0, 1, 2, 0, 1]
SAMPLING = dict(num_iter=3, cfg=2.0, temperature=0.9, seed=5)


@pytest.fixture(scope="module")
def model():
    return tiny_model(latent_scale=0.5)


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    return AutoencoderKL(6, (1, 1, 1), ch=32, num_res_blocks=1)


def test_images_are_the_sampled_latents_decoded_and_rounded(model, vae):
    images = generate(model, vae, LABELS, **SAMPLING)
    latents = sample_latents(model, torch.tensor(LABELS), **SAMPLING)
    decoded = vae.decode(latents / 0.5).clamp(-1, 1).permute(0, 2, 3, 1).detach().numpy()
    assert images.shape == (5, 16, 16, 3) and images.dtype == np.uint8
    assert np.abs(images.astype(float) - (decoded + 1) * 127.5).max() <= 0.5 + 1e-4
    assert Image.fromarray(images[0]).size == (16, 16)


def test_an_image_depends_on_its_number_and_not_on_its_batch(model, vae):
    images = generate(model, vae, LABELS, **SAMPLING)
    assert np.array_equal(generate(model, vae, LABELS, batch_size=2, **SAMPLING), images)
    alone = generate(model, vae, torch.tensor([LABELS[3]]), image_ids=[3], **SAMPLING)
    assert np.array_equal(alone[0], images[3])
    assert not np.array_equal(images[0], images[3])  # of one class, from other noise


def test_seed_labels_and_settings_decide(model, vae):
    images = generate(model, vae, LABELS, **SAMPLING)
    assert np.array_equal(generate(model, vae, np.array(LABELS), **SAMPLING), images)
    for change in ({"seed": 6}, {"cfg": 1.0}, {"temperature": 0.0}, {"num_iter": 5}):
        assert not np.array_equal(generate(model, vae, LABELS, **SAMPLING | change), images)
    assert not np.array_equal(generate(model, vae, LABELS[::-1], **SAMPLING), images)


def test_further_options_reach_the_sampler(model, vae):
    images = generate(model, vae, LABELS, **SAMPLING)
    for options in ({"head_input": "published"}, {"order": "raster"}, {"order": "confidence"}):
        other = generate(model, vae, LABELS, **options, **SAMPLING)
        assert not np.array_equal(images, other), options
    with pytest.raises(TypeError, match="colour"):
        generate(model, vae, LABELS, colour="red", **SAMPLING)


def test_classes_have_names_and_those_never_trained_are_refused(vae):
    model = tiny_model(latent_scale=0.5)
    model.origin = Origin(classes=("ant", "bee"))
    named = generate(model, vae, ["bee", 0], **SAMPLING)
    assert np.array_equal(named, generate(model, vae, [1, 0], **SAMPLING))
    for wrong, told in (([2], "class 2 was never trained"), (["wasp"], "names .'ant', 'bee'.")):
        with pytest.raises(ValueError, match=told):
            generate(model, vae, wrong)


def test_a_tokenizer_brings_its_own_scale(model, vae):
    images = generate(model, Tokenizer(vae, 0.5), LABELS, **SAMPLING)
    assert np.array_equal(images, generate(model, vae, LABELS, **SAMPLING))
    assert not np.array_equal(images, generate(model, Tokenizer(vae, 2.0), LABELS, **SAMPLING))


def test_the_model_stays_in_its_mode_and_the_random_state_as_it_is(vae):
    model = tiny_model(attn_dropout=0.5, proj_dropout=0.5).train()
    state = torch.get_rng_state()
    images = generate(model, vae, LABELS, **SAMPLING)
    assert model.training and torch.equal(torch.get_rng_state(), state)
    assert np.array_equal(images, generate(model.eval(), vae, LABELS, **SAMPLING))


def test_precision_is_of_the_model_and_the_vae_stays_in_fp32(model, vae):
    seen = []
    handle = vae.decoder.conv_in.register_forward_hook(lambda _m, _i, out: seen.append(out.dtype))
    plain = generate(model, vae, LABELS, precision="fp32", **SAMPLING)
    assert np.array_equal(plain, generate(model, vae, LABELS, **SAMPLING))  # auto, on a CPU
    layer = model.backbone.encoder_blocks[0] if hasattr(model.backbone, "encoder_blocks") else None
    dtypes = []
    hook = (layer or model.head).register_forward_hook(lambda *_: dtypes.append(bf16_is_on()))
    half = generate(model, vae, LABELS, precision="bf16", **SAMPLING)
    hook.remove()
    handle.remove()
    assert half.dtype == np.uint8 and (layer is None or all(dtypes) and dtypes)
    assert set(seen) == {torch.float32}


def bf16_is_on() -> bool:
    return torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") is torch.bfloat16


def test_progress_is_shown_on_request(model, vae, capsys):
    generate(model, vae, [0], num_iter=1)
    assert capsys.readouterr().err == ""
    generate(model, vae, [0], num_iter=1, progress=True)
    assert "generating" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("labels", "changes", "fragment"),
    [
        ([0, 3], {}, "labels .* not all in"),
        ([-1], {}, "labels .* not all in"),
        ([], {}, "labels"),
        ([0.5], {}, "labels .* class numbers"),
        ([[0, 1]], {}, "labels .* class numbers"),
        ([0], {"image_ids": [1, 2]}, "image_ids"),
        ([0], {"batch_size": 0}, "batch_size 0"),
        ([0], {"num_iter": 0}, "num_iter 0"),
        ([0], {"temperature": -1}, "temperature -1"),
        ([0], {"cfg_schedule": "cosine"}, "cosine"),
        ([0], {"order": "spiral"}, "spiral"),
        ([0], {"precision": "fp8"}, "fp8"),
    ],
)
def test_values_out_of_range_are_named(model, vae, labels, changes, fragment):
    with pytest.raises(ValueError, match=fragment):
        generate(model, vae, labels, **changes)


def test_a_vae_of_another_shape_is_refused(model, vae):
    other = AutoencoderKL(4, (1, 1, 1), ch=32, num_res_blocks=1)
    with pytest.raises(ValueError, match="4 channels and stride 4.* 6 and 4"):
        generate(model, other, [0])
    with pytest.raises(ValueError, match="no VAE"):
        generate(model, Tokenizer(None, 1.0), [0])
