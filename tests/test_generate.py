"""The Python interface that draws images."""

from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from nbclient import NotebookClient
from PIL import Image

from models.generate import edit, generate
from models.hub import Origin
from models.sampler import sample_latents
from models.tokenbridge import TokenBridge
from models.tokenizers.kl16 import AutoencoderKL
from models.tokenizers.tokenizer import Tokenizer
from tests.conftest import ROOT, tiny_model
from util.vae import save_vae

LABELS = [0, 1, 2, 0, 1]
SAMPLING = dict(num_iter=3, cfg=2.0, temperature=0.9, seed=5)


@pytest.fixture(scope="module")
def model():
    return tiny_model(latent_scale=0.5)


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    return AutoencoderKL(6, (1, 1, 1), ch=32, num_res_blocks=1)


@pytest.fixture(scope="module")
def images(model, vae):
    return generate(model, vae, LABELS, **SAMPLING)


def assert_decoded(images: np.ndarray, vae: AutoencoderKL, latents: torch.Tensor) -> None:
    """They are the latents decoded and rounded."""
    decoded = vae.decode(latents / 0.5).clamp(-1, 1).permute(0, 2, 3, 1).detach().numpy()
    assert images.shape == decoded.shape and images.dtype == np.uint8
    assert np.abs(images.astype(float) - (decoded + 1) * 127.5).max() <= 0.5 + 1e-4


def test_images_are_the_sampled_latents_decoded_and_rounded_whatever_the_batch(model, vae, images):
    assert_decoded(images, vae, sample_latents(model, torch.tensor(LABELS), **SAMPLING))
    # An image depends on its number and all options, and not on its batch.
    assert np.array_equal(generate(model, vae, LABELS, batch_size=2, **SAMPLING), images)
    assert np.array_equal(generate(model, vae, np.array(LABELS), **SAMPLING), images)
    alone = generate(model, vae, torch.tensor([LABELS[3]]), image_ids=[3], **SAMPLING)
    assert np.array_equal(alone[0], images[3])
    assert not np.array_equal(images[0], images[3])  # of one class, from other noise
    changes = dict(seed=6, cfg=1.0, temperature=0.0, num_iter=5, head_input="published")
    for change in (*changes.items(), ("order", "raster"), ("order", "confidence")):
        assert not np.array_equal(generate(model, vae, LABELS, **SAMPLING | dict([change])), images)


def test_an_edited_image_is_drawn_anew_where_the_mask_touches_a_position(model, vae):
    image = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    mask = np.zeros((16, 16), bool)
    mask[7, 9] = True  # one pixel of the position in row 1, column 2
    found = edit(model, vae, Image.fromarray(image), mask, [0, 2], batch_size=1, **SAMPLING)
    assert not np.array_equal(*found)
    latents = Tokenizer(vae, 0.5).posterior(torch.from_numpy(image).permute(2, 0, 1)[None]).mean
    known = torch.ones(2, 4, 4, dtype=torch.bool)
    known[:, 1, 2] = False
    given = dict(known=latents.expand(2, -1, -1, -1) * 0.5, known_mask=known)
    assert_decoded(found, vae, sample_latents(model, torch.tensor([0, 2]), **given, **SAMPLING))
    with pytest.raises(ValueError, match=r"\(8, 8, 3\) uint8"):
        edit(model, vae, image[:8, :8], mask, [0])
    with pytest.raises(ValueError, match="not of one image"):
        generate(model, vae, [0, 2, 1], **given, **SAMPLING)


def test_classes_have_names_and_those_never_trained_are_refused(vae):
    model = tiny_model(latent_scale=0.5)
    model.origin = Origin(classes=("ant", "bee"))
    named = generate(model, vae, ["bee", 0], **SAMPLING)
    assert np.array_equal(named, generate(model, vae, [1, 0], **SAMPLING))
    for wrong, told in (([2], "class 2 was never trained"), (["wasp"], "names .'ant', 'bee'.")):
        with pytest.raises(ValueError, match=told):
            generate(model, vae, wrong)


def test_a_tokenizer_brings_its_own_scale_and_what_does_not_fit_is_named(model, vae, images):
    assert np.array_equal(generate(model, Tokenizer(vae, 0.5), LABELS, **SAMPLING), images)
    assert not np.array_equal(generate(model, Tokenizer(vae, 2.0), LABELS, **SAMPLING), images)
    other = AutoencoderKL(4, (1, 1, 1), ch=32, num_res_blocks=1)
    with pytest.raises(ValueError, match=r"\(4, 4, None\).*\(6, 4, None\)"):
        generate(model, other, [0])
    with pytest.raises(ValueError, match="no VAE"):
        generate(model, Tokenizer(None, 1.0), [0])
    for labels in ([0, 3], [], [0.5], [[0, 1]]):
        with pytest.raises(ValueError, match="labels .* (not all in|class numbers)"):
            generate(model, vae, labels)
    for name, value in dict(image_ids=[1, 2], batch_size=0, num_iter=0, precision="fp8").items():
        with pytest.raises(ValueError, match=name):
            generate(model, vae, [0], **{name: value})


def test_precision_is_of_the_model_whose_mode_and_random_state_stay_as_they_are(model, vae, images):
    dtypes = []
    layers = model.backbone.encoder_blocks[0].attn.proj, vae.decoder.conv_in
    hooks = [x.register_forward_hook(lambda _m, _i, y: dtypes.append(y.dtype)) for x in layers]
    assert np.array_equal(generate(model, vae, LABELS, precision="fp32", **SAMPLING), images)
    assert set(dtypes) == {torch.float32}  # as auto is, on a CPU
    dtypes.clear()
    generate(model, vae, LABELS, precision="bf16", **SAMPLING)
    assert set(dtypes[:-1]) == {torch.bfloat16} and dtypes[-1] == torch.float32
    for hook in hooks:
        hook.remove()
    model, state = tiny_model(attn_dropout=0.5, proj_dropout=0.5).train(), torch.get_rng_state()
    images = generate(model, vae, LABELS, **SAMPLING)
    assert model.training and torch.equal(torch.get_rng_state(), state)
    assert np.array_equal(images, generate(model.eval(), vae, LABELS, **SAMPLING))


# --- the notebook runs from its first cell to its last, without a network

NOTEBOOK = ROOT / "demo" / "generate.ipynb"


def run(folder: Path, monkeypatch, **env: str) -> tuple[str, int]:
    """Execute it in that folder, without a network; all that is printed, and how many pictures."""
    offline = {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    places = ("JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR")
    for name, value in (env | offline | dict.fromkeys(places, str(folder / "jupyter"))).items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    resources = {"metadata": {"path": str(folder)}}
    NotebookClient(notebook, timeout=120, kernel_name="python3", resources=resources).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    pictures = sum("image/png" in output.get("data", {}) for output in outputs)
    return "".join(output.get("text", "") for output in outputs), pictures


def test_it_runs_with_the_weights_of_a_folder(tmp_path, monkeypatch):
    """And what it saves is what the same calls give here."""
    model = tiny_model(latent_scale=0.5)
    vae = AutoencoderKL(6, (1, 1, 1), ch=32, num_res_blocks=1)
    model.save_pretrained(tmp_path / "exported")
    save_vae(tmp_path / "vae.ckpt", vae)
    env = {"TOKENBRIDGE_MODEL": "exported", "TOKENBRIDGE_VAE": "vae.ckpt"}
    printed, pictures = run(tmp_path, monkeypatch, **env)
    assert "random weights" not in printed and pictures == 5
    settings = dict(num_iter=16, cfg=2.0, temperature=0.5, seed=0)
    expected = generate(model, vae, [0, 1, 2], **settings).astype(int)
    saved = [Image.open(tmp_path / "output" / "notebook" / f"{i}.png") for i in range(3)]
    # Another number of threads may round differently.
    assert np.abs(np.stack(saved).astype(int) - expected).max() <= 2
    again = TokenBridge.from_pretrained(tmp_path / "output" / "notebook" / "model")
    assert torch.equal(again.backbone.fake_latent, model.backbone.fake_latent)


def test_it_runs_with_nothing_at_all(tmp_path, monkeypatch):
    monkeypatch.delenv("TOKENBRIDGE_MODEL", raising=False)
    printed, pictures = run(tmp_path, monkeypatch)
    assert "random weights, whose images are noise" in printed and pictures == 5
    assert "largest difference of a byte: 0" in printed
    cells = nbformat.read(NOTEBOOK, as_version=4).cells  # which are kept without outputs
    assert [cell for cell in cells if cell.get("outputs") or cell.get("execution_count")] == []
