"""A folder of diffusers as tokenizer: the numbers of diffusers' own, and every script with it."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.generate import generate
from models.tokenbridge import TokenBridge
from models.tokenizers.kl16 import AutoencoderKL
from models.tokenizers.tokenizer import Tokenizer, from_uint8
from tests.conftest import relative_error
from tests.runs import call, flags, train, use
from util import export
from util.data.images import ImageDataset
from util.data.latent_cache import open_cache
from util.data.listing import list_images
from util.vae import load_vae, save_vae, vae_digest

diffusers = pytest.importorskip("diffusers", reason="an extra: pip install -e '.[diffusers]'")
single_file_utils = pytest.importorskip("diffusers.loaders.single_file_utils")

WEIGHTS = "diffusion_pytorch_model"
SIZES = {"latent_channels": 4, "layers_per_block": 1, "norm_num_groups": 4}


def network(levels: int = 2, **changes):
    """One of diffusers' with random weights, biases and norms included; its stride 2^(levels-1)."""
    torch.manual_seed(0)
    made = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        **SIZES | {"block_out_channels": (8,) * levels} | changes,
    )
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return made.eval()


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A folder to read, not to change."""
    folder = tmp_path_factory.mktemp("saved") / "vae"
    network().save_pretrained(folder)
    return folder


@pytest.fixture
def own(saved, tmp_path) -> Path:
    """A copy of it to change."""
    return Path(shutil.copytree(saved, tmp_path / "vae"))


def edit_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v != "absent"}))


def assert_same_network(vae, expected) -> None:
    """The posterior and the decoded images are those of diffusers' own object."""
    stride = 2 ** (len(expected.config.block_out_channels) - 1)
    assert (vae.channels, vae.stride) == (expected.config.latent_channels, stride)
    images = torch.randn(2, 3, 4 * stride, 2 * stride)
    with torch.no_grad():
        found, wanted = vae.encode(images), expected.encode(images).latent_dist
        assert relative_error(found.mean, wanted.mean) < 1e-5
        assert relative_error(found.std, wanted.std) < 1e-5
        decoded = vae.decode(wanted.mean)
        assert relative_error(decoded, expected.decode(wanted.mean).sample) < 1e-5
    assert found.parameters.is_contiguous() and decoded.is_contiguous()


@pytest.mark.parametrize(
    ("levels", "changes"),
    [
        (4, {}),  # as Stable Diffusion and SDXL; then without 1x1, as SD 3 and Flux
        (5, dict(latent_channels=32, use_quant_conv=False, use_post_quant_conv=False)),
        (2, dict(mid_block_add_attention=False, layers_per_block=2)),
    ],
)
def test_posterior_and_images_are_those_of_diffusers(tmp_path, levels, changes):
    made = network(levels, **changes)
    made.save_pretrained(tmp_path)
    random_state = torch.get_rng_state()
    vae = load_vae(tmp_path).eval()
    assert torch.equal(torch.get_rng_state(), random_state)
    assert_same_network(vae, made)
    assert not vae.is_kl16
    with pytest.raises(ValueError, match=f"stride {vae.stride}"):
        vae.encode(torch.zeros(1, 3, 2 * vae.stride, vae.stride + 1))


def test_a_variant_in_a_pipelines_folder_is_read(tmp_path):
    made = network().half()
    made.save_pretrained(tmp_path / "vae", variant="fp16")
    assert_same_network(load_vae(tmp_path).eval(), made.float())


@pytest.mark.parametrize("quant_conv", [True, False], ids=["as SDXL's", "as Flux's"])
def test_a_file_in_the_names_of_latent_diffusion_is_the_network_of_diffusers(tmp_path, quant_conv):
    """One .safetensors file without settings, as they are passed around; the shape is found."""
    variant = {"encoder_attention": (), "quant_conv": quant_conv}
    made = AutoencoderKL(4, (1, 2, 2), ch=32, num_res_blocks=1, **variant)
    save_file(made.state_dict(), tmp_path / "vae.safetensors")
    use = {"use_quant_conv": quant_conv, "use_post_quant_conv": quant_conv}
    theirs = network(3, norm_num_groups=32, block_out_channels=(32, 64, 64), **use)
    config = dict(theirs.config) | {"_class_name": "AutoencoderKL"}
    theirs.load_state_dict(single_file_utils.convert_ldm_vae_checkpoint(made.state_dict(), config))
    found = load_vae(tmp_path / "vae.safetensors")
    assert_same_network(found.eval(), theirs)
    save_vae(tmp_path / "vae.ckpt", found)
    assert load_vae(tmp_path / "vae.ckpt").config == found.config


def test_a_folder_is_known_by_its_settings_and_weights(own, saved):
    assert vae_digest(own) == vae_digest(saved)
    edit_config(own, _diffusers_version="0.0.1", _name_or_path="elsewhere")
    assert vae_digest(own) == vae_digest(saved), "where it was saved says nothing of what it is"
    edit_config(own, scaling_factor=100.0, shift_factor=7.0)
    changed = vae_digest(own)
    images = torch.randn(2, 3, 8, 8)  # scale and shift are diffusers' pipelines', not applied
    found, expected = (Tokenizer(load_vae(path), 0.5).posterior(images) for path in (own, saved))
    assert torch.equal(found.parameters, expected.parameters)
    state = load_file(own / f"{WEIGHTS}.safetensors")
    state["decoder.conv_out.bias"][0] += 1
    save_file(state, own / f"{WEIGHTS}.safetensors")
    assert len({vae_digest(saved), changed, vae_digest(own)}) == 3


def test_its_posteriors_are_cached_and_a_training_on_them_needs_no_diffusers_and_draws(
    inputs, saved, tmp_path, monkeypatch
):
    use("cache", inputs, vae_path=saved, cached_path=tmp_path / "c")
    cache = open_cache(tmp_path / "c")
    manifest = cache.manifest
    assert manifest["latent_scale"] == manifest["measured_latent_scale"] != 0.2325
    images = ImageDataset(list_images(inputs / "data").samples, 16)
    with torch.no_grad():
        expected = network().encode(from_uint8(torch.stack([image for image, _ in images])))
    found = torch.stack([cache[(i, False)][0] for i in range(len(cache))]).float()
    torch.testing.assert_close(found, expected.latent_dist.parameters, rtol=2e-3, atol=2e-3)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "diffusers", None)
        changes = dict(cached_path=tmp_path / "c", patch_size=2, epochs=1)
        trained = train(inputs, tmp_path / "out", **changes)
    config = trained["config"]
    assert trained["vae_sha256"] == manifest["vae_sha256"] == vae_digest(saved)
    assert (config["vae_embed_dim"], config["vae_stride"], config["patch_size"]) == (4, 2, 2)
    assert config["latent_scale"] == manifest["latent_scale"]
    assert list(config["channel_order"]) == manifest["channel_order"]
    argv = dict(resume=tmp_path / "out", output_dir=tmp_path, vae_path=saved)
    call(export.main, *flags(inputs, argv))
    model = TokenBridge.from_pretrained(tmp_path)
    assert model.origin.vae_sha256 == vae_digest(saved)
    assert generate(model, load_vae(saved), [0, 2], num_iter=2).shape == (2, 16, 16, 3)


@pytest.fixture
def caching(inputs, refusal):
    """The line by which a cache of a VAE is refused."""
    return lambda vae: refusal("cache", inputs, vae_path=vae)


def test_configuration_of_something_else_is_refused(own, saved, caching):
    for changes, said in (
        ({"_class_name": "AutoencoderTiny"}, "AutoencoderTiny; only AutoencoderKL"),
        ({"_class_name": "absent"}, "no class of diffusers"),
        ({"latent_channels": 8}, "size mismatch"),
        ({"layers_per_block": 2}, "missing"),
        ({"use_quant_conv": False}, "quant_conv"),
        ({"up_block_types": ["UpDecoderBlock2D", "Nonsense"]}, "Nonsense"),
        ({"made_up": 1}, "unknown settings: made_up"),
    ):
        shutil.copy(saved / "config.json", own)
        edit_config(own, **changes)
        line = caching(own)
        assert said in line and "--vae_path" in line


def test_what_is_no_such_folder_says_what_to_name(own, caching):
    """Of several variants, full precision is preferred."""
    file, digest = own / f"{WEIGHTS}.safetensors", vae_digest(own)
    assert vae_digest(file) == digest
    assert_same_network(load_vae(file).eval(), network())
    for name in ("fp16", "ema"):
        shutil.copy(file, own / f"{WEIGHTS}.{name}.safetensors")
    assert vae_digest(own) == digest
    torch.save(network().state_dict(), own / "pickled.pt")
    file.rename(own / "mine.safetensors")
    for name in ("pickled.pt", "mine.safetensors"):
        assert "one in diffusers' names needs its folder" in caching(own / name)
    assert f"{WEIGHTS}.ema.safetensors, {WEIGHTS}.fp16" in caching(own)
    for path in own.glob(f"{WEIGHTS}.*"):
        path.unlink()
    (own / f"{WEIGHTS}.bin").write_bytes(b"a pickle")
    assert "no .bin file is read" in caching(own)


def test_a_missing_library_and_damaged_files_are_named(own, caching, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    assert "pip install -e '.[diffusers]'" in caching(own)
    monkeypatch.undo()
    path = own / f"{WEIGHTS}.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    for damaged in (path, own):
        assert f"--vae_path {damaged}" in caching(damaged)
    for content in ("{", "[]"):
        (own / "config.json").write_text(content)
        assert "config.json" in caching(own)
