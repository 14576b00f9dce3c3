"""A folder of diffusers as tokenizer: the numbers of diffusers' own, and every script with it."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import main_cache
import main_tokenbridge
import reconstruction
from models.generate import generate
from models.patchify import patchify
from models.tokenbridge import TokenBridge
from models.tokenizers.diffusers import DiffusersVAE
from models.tokenizers.kl16 import AutoencoderKL
from models.tokenizers.tokenizer import Tokenizer, from_uint8
from tests.conftest import relative_error
from tests.runs import CACHE_FLAGS, TRAIN_FLAGS, call, evaluate, flags, make_inputs, refused, train
from util import doctor, export
from util.data.images import ImageDataset
from util.data.latent_cache import open_cache
from util.data.listing import list_images
from util.errors import UserError
from util.vae_files import load_vae, save_vae, vae_digest

diffusers = pytest.importorskip("diffusers", reason="an extra: pip install -e '.[diffusers]'")
single_file_utils = pytest.importorskip("diffusers.loaders.single_file_utils")

WEIGHTS = "diffusion_pytorch_model"
SIZES = {"latent_channels": 4, "layers_per_block": 1, "norm_num_groups": 4}
NO_QUANT_CONV = {"use_quant_conv": False, "use_post_quant_conv": False}
# The tiny model on the cache of a folder: 8 x 8 latents of 4 channels, 16 tokens of 16 scalars.
FOLDER_FLAGS = {"cached_path": "diffusers_cache", "patch_size": 2}


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


@pytest.fixture(scope="module")
def inputs(saved, tmp_path_factory) -> Path:
    """data/, the folder vae/ and its cache diffusers_cache/."""
    folder = make_inputs(tmp_path_factory.mktemp("inputs"))
    shutil.copytree(saved, folder / "vae")
    cache = folder / "diffusers_cache"
    call(main_cache.main, *flags(folder, CACHE_FLAGS, vae_path="vae", cached_path=cache))
    return folder


@pytest.fixture(scope="module")
def trained(inputs, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("trained")
    train(inputs, output, **FOLDER_FLAGS, epochs=1, batch_size=12, accum_iter=1)
    return output


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


# --- the network


@pytest.mark.parametrize(
    ("levels", "changes"),
    [
        (4, {}),  # as Stable Diffusion and SDXL
        (
            4,
            dict(latent_channels=16, use_quant_conv=False, use_post_quant_conv=False),
        ),  # SD 3, Flux
        (5, dict(latent_channels=32)),
        (2, dict(mid_block_add_attention=False, layers_per_block=2)),
    ],
)
def test_posterior_and_images_are_those_of_diffusers(tmp_path, levels, changes):
    made = network(levels, **changes)
    made.save_pretrained(tmp_path)
    vae = load_vae(tmp_path).eval()
    assert_same_network(vae, made)
    assert not vae.is_kl16
    with pytest.raises(ValueError, match=f"stride {vae.stride}"):
        vae.encode(torch.zeros(1, 3, 2 * vae.stride, vae.stride + 1))


@pytest.mark.parametrize("form", ["pipeline", "shards", "variant", "shards of a variant"])
def test_all_forms_of_a_folder_are_read(tmp_path, form):
    made, options = network(), {}
    if "variant" in form:
        made, options = made.half(), {"variant": "fp16"}
    if "shards" in form:
        options["max_shard_size"] = "20KB"
    place = tmp_path / "vae" if form == "pipeline" else tmp_path
    made.save_pretrained(place, **options)
    assert (len(list(place.glob("*.safetensors"))) > 1) == ("shards" in form)
    assert_same_network(load_vae(tmp_path).eval(), made.float())


def test_full_precision_is_preferred_and_two_variants_are_a_choice(own, capsys):
    plain = vae_digest(own)
    for name in ("fp16", "ema"):
        shutil.copy(own / f"{WEIGHTS}.safetensors", own / f"{WEIGHTS}.{name}.safetensors")
    assert vae_digest(own) == plain
    (own / f"{WEIGHTS}.safetensors").unlink()
    with pytest.raises(UserError, match=r"ema\.safetensors, .*fp16\.safetensors; leave one"):
        load_vae(own)


def test_attention_in_the_names_of_early_diffusers_is_read(own):
    new = ("to_q", "to_k", "to_v", "to_out.0")
    old = ("query", "key", "value", "proj_attn")
    state = load_file(own / f"{WEIGHTS}.safetensors")
    for now, then in zip(new, old, strict=True):
        state = {k.replace(f"attentions.0.{now}", f"attentions.0.{then}"): state[k] for k in state}
    assert sum(".proj_attn." in name for name in state) == 4
    save_file(state, own / f"{WEIGHTS}.safetensors")
    assert_same_network(load_vae(own).eval(), network())


@pytest.mark.parametrize("quant_conv", [True, False], ids=["as SDXL's", "as Flux's"])
def test_a_file_in_the_names_of_latent_diffusion_is_the_network_of_diffusers(tmp_path, quant_conv):
    """One .safetensors file without settings, as they are passed around; the shape is found."""
    variant = {"encoder_attention": (), "quant_conv": quant_conv}
    made = AutoencoderKL(4, (1, 2, 2), ch=32, num_res_blocks=1, **variant)
    save_file(made.state_dict(), tmp_path / "vae.safetensors")
    use = {"use_quant_conv": quant_conv, "use_post_quant_conv": quant_conv}
    config = dict(network(3, norm_num_groups=32, block_out_channels=(32, 64, 64), **use).config)
    config["_class_name"] = "AutoencoderKL"
    state = single_file_utils.convert_ldm_vae_checkpoint(made.state_dict(), config)
    found = load_vae(tmp_path / "vae.safetensors")
    assert_same_network(found.eval(), DiffusersVAE(config, state).network)
    save_vae(tmp_path / "vae.ckpt", found)
    assert load_vae(tmp_path / "vae.ckpt").config == found.config


def test_scale_and_shift_of_the_configuration_are_not_applied(own, saved):
    """The tokenizer has the only scale; diffusers leaves its own to the pipelines, too."""
    edit_config(own, scaling_factor=100.0, shift_factor=7.0)
    images = torch.randn(2, 3, 8, 8)
    found, expected = (Tokenizer(load_vae(path), 0.5).posterior(images) for path in (own, saved))
    assert torch.equal(found.parameters, expected.parameters)


def test_a_folder_is_known_by_its_settings_and_weights(own, saved):
    assert vae_digest(own) == vae_digest(saved)
    edit_config(own, _diffusers_version="0.0.1", _name_or_path="elsewhere")
    assert vae_digest(own) == vae_digest(saved), "where it was saved says nothing of what it is"
    edit_config(own, scaling_factor=2.0)
    changed = vae_digest(own)
    state = load_file(own / f"{WEIGHTS}.safetensors")
    state["decoder.conv_out.bias"][0] += 1
    save_file(state, own / f"{WEIGHTS}.safetensors")
    assert len({vae_digest(saved), changed, vae_digest(own)}) == 3


@pytest.mark.parametrize(
    ("changes", "parameters"),
    [({}, 83_653_863), (dict(latent_channels=16, **NO_QUANT_CONV), 83_819_683)],
    ids=["Stable Diffusion 1, 2 and XL", "Stable Diffusion 3 and Flux"],
)
def test_published_architectures_have_their_shape(changes, parameters):
    """As docs/tokenizers.md has it; on the meta device, so without their numbers."""
    sizes = dict(layers_per_block=2, norm_num_groups=32, block_out_channels=(128, 256, 512, 512))
    with torch.device("meta"):
        made = network(4, **SIZES | sizes | changes)
    config = dict(made.config) | {"_class_name": "AutoencoderKL"}
    vae = DiffusersVAE(config, made.state_dict())
    assert (vae.channels, vae.stride) == (made.config.latent_channels, 8)
    assert sum(p.numel() for p in vae.parameters()) == parameters


def test_global_random_state_is_left_alone(saved):
    """Whatever tokenizer it has, a run draws the same numbers."""
    before = torch.get_rng_state()
    load_vae(saved)
    assert torch.equal(torch.get_rng_state(), before)


# --- the scripts


def test_cache_holds_diffusers_posteriors_and_measures_them(inputs, saved):
    cache = open_cache(inputs / "diffusers_cache")
    manifest = cache.manifest
    assert manifest["vae_sha256"] == vae_digest(saved)
    assert manifest["latent_shape"] == [4, 8, 8] and manifest["vae_stride"] == 2
    assert manifest["latent_scale"] == manifest["measured_latent_scale"] != 0.2325
    images = ImageDataset(list_images(str(inputs / "data")).samples, 16)
    pixels = torch.stack([images[i][0] for i in range(len(images))])
    with torch.no_grad():
        expected = network().encode(from_uint8(pixels)).latent_dist
    found = np.stack([cache[(i, False)][0] for i in range(len(cache))])
    assert np.allclose(found, expected.parameters.numpy(), rtol=2e-3, atol=2e-3)  # float16
    scaled = expected.sample(torch.Generator().manual_seed(0)) * manifest["latent_scale"]
    assert scaled.std().item() == pytest.approx(1, rel=0.02)


def test_training_takes_shape_scale_and_order_from_the_cache(inputs, trained):
    saved = torch.load(trained / "checkpoint-last.pth", weights_only=True)
    config, manifest = saved["config"], open_cache(inputs / "diffusers_cache").manifest
    assert saved["step"] == 2 and saved["vae_sha256"] == manifest["vae_sha256"]
    assert (config["vae_embed_dim"], config["vae_stride"], config["patch_size"]) == (4, 2, 2)
    assert config["latent_scale"] == manifest["latent_scale"]
    assert list(config["channel_order"]) == manifest["channel_order"]
    model = TokenBridge(**config)
    channel = torch.arange(4.0).view(1, 4, 1, 1).expand(1, *model.config.latent_shape)
    order = torch.as_tensor(model.head.order)
    in_order = patchify(channel, 2)[..., order]  # the channel that each scalar of a token is of
    assert in_order.shape == (1, 16, 16)
    expected = torch.tensor(config["channel_order"]).repeat_interleave(4)
    assert (in_order == expected).all()


def test_evaluation_decodes_with_the_folder(inputs, trained, tmp_path):
    settings = dict(num_images=3, no_metrics=True, keep_images=True, vae_path="vae")
    images = evaluate(inputs, tmp_path, trained, **settings)
    assert len(images) == 3
    record = json.loads(next(tmp_path.glob("*/metrics.json")).read_text())
    assert record["files"]["vae"]["sha256"] == vae_digest(inputs / "vae")


def test_exported_weights_draw_with_the_folder(inputs, trained, tmp_path):
    call(export.main, *flags(inputs, dict(resume=trained, output_dir=tmp_path, vae_path="vae")))
    model = TokenBridge.from_pretrained(tmp_path)
    assert model.origin.vae_sha256 == vae_digest(inputs / "vae")
    images = generate(model, load_vae(inputs / "vae"), [0, 2], num_iter=2)
    assert images.shape == (2, 16, 16, 3) and images.dtype == np.uint8


def test_training_on_images_takes_what_a_cache_has_measured(inputs, trained, tmp_path, capsys):
    changes = dict(use_cached=None, data_path="data", vae_path="vae", patch_size=2, epochs=1)
    previews = dict(preview_freq=1, preview_images=3, preview_iter=2)
    measured = dict(cached_path="diffusers_cache")
    found = train(inputs, tmp_path / "out", **changes, **measured, **previews)
    events = b"".join(path.read_bytes() for path in (tmp_path / "out").glob("events.*"))
    assert events.count(b"\x89PNG") == 2, "previews by the folder's decoder: step 1 and the end"
    expected = torch.load(trained / "checkpoint-last.pth", weights_only=True)
    assert found["config"] == expected["config"]
    assert found["vae_sha256"] == expected["vae_sha256"]
    argv = flags(inputs, TRAIN_FLAGS, changes, output_dir=tmp_path / "none", cached_path=None)
    line = refused(capsys, main_tokenbridge.main, *argv)
    assert "--latent_scale and --channel_order" in line and "--cached_path" in line
    argv = flags(inputs, TRAIN_FLAGS, changes, output_dir=tmp_path / "none", cached_path="cache")
    assert "another VAE" in refused(capsys, main_tokenbridge.main, *argv)
    assert not (tmp_path / "none").exists()


def test_training_on_a_cache_needs_no_diffusers(inputs, trained, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    changes = FOLDER_FLAGS | dict(epochs=1, batch_size=12, accum_iter=1)
    found = train(inputs, tmp_path / "out", **changes)
    expected = torch.load(trained / "checkpoint-last.pth", weights_only=True)
    assert found["vae_sha256"] == expected["vae_sha256"]
    assert all(torch.equal(found["model"][k], t) for k, t in expected["model"].items())


def test_reconstruction_reads_the_folder_and_its_cache(inputs, tmp_path):
    own = dict(image_dir="data", output_dir=tmp_path, vae_path="vae", bits=[-1, 8], no_metrics=True)
    common = dict(img_size=16, device="cpu", num_workers=0, images_per_class=2)
    call(reconstruction.main, *flags(inputs, common, own, cached_path="diffusers_cache"))
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["vae_sha256"] == vae_digest(inputs / "vae")
    continuous, quantized = (found["psnr"] for found in results["results"])
    assert abs(continuous - quantized) < 1.0


def test_doctor_examines_the_folder(inputs, capsys):
    examined = flags(inputs, TRAIN_FLAGS, FOLDER_FLAGS, vae_path="vae", output_dir="/tmp/none")
    call(doctor.main, *examined, "--json")
    report = json.loads(capsys.readouterr().out)
    found = {check["name"]: check for check in report["checks"]}
    assert "4 channels, stride 2" in found["VAE"]["text"] and found["VAE"]["state"] == "ok"
    assert vae_digest(inputs / "vae") in found["VAE"]["text"]
    assert found["cache"]["state"] == found["model"]["state"] == "ok"


# --- what is refused, each in one line and with exit code 2


def cache_refusal(capsys, inputs: Path, vae: Path, **changes) -> str:
    argv = flags(inputs, CACHE_FLAGS, vae_path=vae, cached_path=vae.parent / "new", **changes)
    line = refused(capsys, main_cache.main, *argv)
    assert not (vae.parent / "new").exists() and "--vae_path" in line
    return line


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"_class_name": "VQModel"}, ["VQModel", "AutoencoderKL"]),
        ({"_class_name": "AutoencoderTiny"}, ["AutoencoderTiny"]),
        ({"_class_name": "AutoencoderKLCogVideoX"}, ["AutoencoderKLCogVideoX"]),
        ({"_class_name": "absent"}, ["no class of diffusers"]),
        ({"in_channels": 4}, ["in_channels is 4"]),
        ({"latent_channels": 8}, ["tensors do not match", "of another shape"]),
        ({"latent_channels": "absent"}, ["nothing of latent_channels"]),
        ({"layers_per_block": 1 << 40}, ["sizes"]),
        ({"layers_per_block": 1000}, ["blocks"]),
        ({"block_out_channels": [8, 8, 8]}, ["blocks"]),
        ({"block_out_channels": 8}, ["no lists"]),
        ({"use_quant_conv": False}, ["unexpected", "quant_conv"]),
        ({"up_block_types": ["UpDecoderBlock2D", "Nonsense"]}, ["Nonsense"]),
        ({"made_up": 1}, ["made_up", "a newer one"]),
    ],
    ids=str,
)
def test_configuration_of_something_else_is_refused(inputs, own, capsys, changes, said):
    edit_config(own, **changes)
    line = cache_refusal(capsys, inputs, own)
    assert all(words in line for words in said), line


def damage_header(path: Path) -> None:
    path.write_bytes(b"\xff" * 8 + path.read_bytes()[8:])


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize("damage", [damage_header, cut, lambda path: path.write_bytes(b"")])
def test_damaged_weights_are_refused(inputs, own, capsys, damage):
    damage(own / f"{WEIGHTS}.safetensors")
    assert "damaged" in cache_refusal(capsys, inputs, own)


def test_missing_and_integer_tensors_are_refused(inputs, own, capsys):
    path = own / f"{WEIGHTS}.safetensors"
    state = load_file(path)
    save_file(state | {"quant_conv.bias": state["quant_conv.bias"].int()}, path)
    assert "quant_conv.bias is torch.int32" in cache_refusal(capsys, inputs, own)
    del state["quant_conv.bias"]
    save_file(state, path)
    assert "1 missing (first: quant_conv.bias)" in cache_refusal(capsys, inputs, own)


@pytest.mark.parametrize("content", ["{", "[]", " " * (1 << 21), "[" * 100_000])
def test_damaged_configuration_is_refused(inputs, own, capsys, content):
    (own / "config.json").write_text(content)
    assert "config.json" in cache_refusal(capsys, inputs, own)


class Bomb:
    """Would create a file where it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_pickled_weights_are_refused_and_never_read(inputs, own, capsys):
    (own / f"{WEIGHTS}.safetensors").unlink()
    assert "save it again" in cache_refusal(capsys, inputs, own)
    torch.save({"model": Bomb(own / "exploded")}, own / f"{WEIGHTS}.bin")
    line = cache_refusal(capsys, inputs, own)
    assert f"{WEIGHTS}.bin" in line and "save_pretrained" in line
    assert not (own / "exploded").exists()


@pytest.mark.parametrize("name", ["../vae.safetensors", "/etc/passwd", 7, "gone.safetensors"])
def test_an_index_leads_nowhere_else(inputs, own, capsys, name):
    whole = own / f"{WEIGHTS}.safetensors"
    whole.rename(own.parent / "vae.safetensors")
    index = own / f"{WEIGHTS}.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"quant_conv.bias": name}}))
    line = cache_refusal(capsys, inputs, own)
    assert ("no gone.safetensors" if name == "gone.safetensors" else "no file of this") in line
    index.write_text("{}")
    assert "damaged" in cache_refusal(capsys, inputs, own)


def test_what_is_no_such_folder_says_what_to_name(inputs, own, capsys):
    file = own / f"{WEIGHTS}.safetensors"
    assert vae_digest(file) == vae_digest(own)
    assert_same_network(load_vae(file).eval(), network())
    (own / "config.json").unlink()
    assert "put the config.json" in cache_refusal(capsys, inputs, file)
    assert "without config.json" in cache_refusal(capsys, inputs, own)
    save_vae(own / "kl16.ckpt", AutoencoderKL(4, (1, 1), ch=32, num_res_blocks=1))
    assert "name the file kl16.ckpt" in cache_refusal(capsys, inputs, own)


def test_flags_that_do_not_fit_are_refused(inputs, own, capsys):
    assert "--vae_embed_dim 16" in cache_refusal(capsys, inputs, own, vae_embed_dim=16)
    argv = flags(inputs, CACHE_FLAGS, vae_path=own, cached_path=own.parent / "new", img_size=15)
    assert "--img_size 15 is not a multiple" in refused(capsys, main_cache.main, *argv)


def test_without_diffusers_the_line_says_how_to_install_it(inputs, own, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    assert "pip install -e '.[diffusers]'" in cache_refusal(capsys, inputs, own)


def test_cache_of_another_folder_is_refused(inputs, tmp_path, capsys):
    network(use_quant_conv=False).save_pretrained(tmp_path / "vae")
    argv = flags(inputs, TRAIN_FLAGS, FOLDER_FLAGS, vae_path=tmp_path / "vae", output_dir=tmp_path)
    assert "another VAE" in refused(capsys, main_tokenbridge.main, *argv)
