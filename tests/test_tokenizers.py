"""Tokenizers against golden data: KL-16, LlamaGen's VQ-16, l-DeTok; and scripts that use them."""

import json
import math
import shutil

import pytest
import torch
from torch.nn import functional as F
from torchvision.transforms.functional import to_tensor

from benchmarks import correctness
from models.config import TokenBridgeConfig
from models.tokenizers import kl16 as vae_module
from models.tokenizers import vq
from models.tokenizers.detok import DeTok
from models.tokenizers.kl16 import AutoencoderKL, Posterior
from models.tokenizers.tokenizer import Tokenizer, from_uint8
from models.tokenizers.vq import VQModel
from tests.conftest import GOLDEN, complaint, formula_weight, golden, golden_json, relative_error
from tests.runs import evaluate, train, use
from util.data.latent_cache import open_cache, read_json
from util.errors import UserError
from util.vae import load_vae, save_vae


def small_vae(**changes):
    torch.manual_seed(0)
    return AutoencoderKL(**dict(embed_dim=4, ch_mult=(1, 1), ch=32, num_res_blocks=1) | changes)


@torch.no_grad()
def test_encoding_and_decoding_match_golden_and_samples_have_their_mean_and_std():
    assert correctness.vae(torch.device("cpu")) < 1e-5
    parameters = torch.tensor([3.0, -2.0]).view(1, 2, 1, 1).expand(1, 2, 64, 64)
    sample = Posterior(parameters).sample(torch.Generator().manual_seed(0))
    assert sample.mean() == pytest.approx(3.0, abs=0.03)
    assert sample.std() == pytest.approx(math.exp(-1.0), rel=0.03)
    assert Posterior(torch.full((1, 2, 1, 1), 1e4)).std.item() == pytest.approx(math.exp(10.0))


@torch.no_grad()
def test_a_small_vae_has_another_stride_and_what_does_not_fit_is_refused():
    vae = small_vae(ch_mult=(1, 2, 2, 2))
    assert vae.stride == 8 and not vae.is_kl16
    posterior = vae.encode(torch.randn(2, 3, 32, 24))
    assert posterior.mean.shape == (2, 4, 4, 3)
    assert vae.decode(posterior.mean).shape == (2, 3, 32, 24)
    with pytest.raises(ValueError, match="stride 8"):
        vae.encode(torch.randn(2, 3, 30, 24))
    state = vae.state_dict()
    state.pop("quant_conv.bias")
    with pytest.raises(ValueError, match=r"quant_conv\.bias"):
        vae.load_published(state)
    for name, value in (("ch", 48), ("wings", 2)):
        with pytest.raises(ValueError, match=name):
            small_vae(**{name: value})


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_neither_layout_nor_overwriting_changes_what_comes_out(monkeypatch, layout):
    vae = small_vae(ch_mult=(1, 2), num_res_blocks=2).eval()
    images = torch.randn(2, 3, 16, 24)
    kept = images.clone()
    with torch.no_grad():
        posterior = vae.encode(images.contiguous(memory_format=layout))
        decoded = vae.decode(posterior.mean)
    assert posterior.parameters.is_contiguous() and decoded.is_contiguous()
    assert torch.equal(images, kept)
    with_gradients = vae.encode(images)
    assert relative_error(with_gradients.parameters.detach(), posterior.parameters) < 1e-5
    assert relative_error(vae.decode(with_gradients.mean).detach(), decoded) < 1e-5
    monkeypatch.setattr(vae_module, "fastest_layout", lambda x: x)
    assert relative_error(vae.encode(images).parameters.detach(), posterior.parameters) < 1e-5
    assert relative_error(vae.decode(posterior.mean).detach(), decoded) < 1e-5


@torch.no_grad()
def test_a_frozen_tokenizer_scales_latents_and_takes_bytes_as_torchvision_does():
    values = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(2, 3, -1, -1)
    expected = torch.stack([to_tensor(v.permute(1, 2, 0).numpy()) for v in values]) * 2 - 1
    assert torch.equal(from_uint8(values), expected)
    tokenizer, generator = Tokenizer(small_vae(), 0.25).train(), torch.Generator()
    found, posterior = (tokenizer.posterior(x) for x in (values, expected))
    assert torch.equal(found.parameters, posterior.parameters)
    latents = posterior.sample(generator.manual_seed(1)) * 0.25
    assert torch.equal(tokenizer.encode(values, generator.manual_seed(1)), latents)
    again = tokenizer.from_moments(found.parameters, generator.manual_seed(1))
    assert torch.equal(again, latents)
    decoded = tokenizer.vae.decode(latents / 0.25).clamp(-1, 1)
    assert torch.equal(tokenizer.decode(latents), decoded)
    assert not tokenizer.vae.training
    assert not any(p.requires_grad for p in tokenizer.parameters())


# --- LlamaGen's VQ-16


def small_vq(**changes) -> VQModel:
    torch.manual_seed(0)
    sizes = dict(codebook_size=40, embed_dim=4, z_channels=6, ch_mult=(1, 2), ch=32)
    return VQModel(**sizes | dict(num_res_blocks=1) | changes).eval()


@pytest.fixture(scope="module", params=sorted(path.stem for path in GOLDEN.glob("vq*.npz")))
def published(request) -> tuple[VQModel, dict]:
    """The tokenizer of a golden file, its weights by formula, and the file's arrays."""
    data = golden(request.param)
    model = VQModel(codebook_size=int(data["codebook_size"]))
    named = model.named_parameters()
    model.load_published({name: formula_weight(name, tuple(p.shape)) for name, p in named})
    return model.eval(), data


@torch.no_grad()
def test_encode_and_decode_match_golden(published):
    model, data = published
    z = model.before_quantizer(data["image"])
    assert relative_error(z, data["before_quantizer"]) < 1e-5
    indices, expected = model.indices(data["image"]), data["indices"]
    normalised = F.normalize(data["before_quantizer"], dim=1).movedim(1, -1)
    both = (model.codebook[i] for i in (indices, expected))
    found, best = ((normalised - code).square().sum(-1) for code in both)
    assert indices.dtype == torch.int64 and ((indices == expected) | (found - best < 1e-5)).all()
    same = (indices == expected)[:, None].expand_as(data["quantized"])
    assert same.float().mean() > 0.9
    assert relative_error(model.codes(indices)[same], data["quantized"][same]) < 1e-5
    codes = data["codes"].view(data["indices"].shape)
    assert relative_error(model.decode(model.codes(codes)), data["decoded"]) < 1e-4


@torch.no_grad()
def test_its_posterior_is_the_code_and_any_latents_are_decoded():
    model, images = small_vq(), torch.randn(2, 3, 8, 12)
    assert model.stride == 2 and not model.is_kl16
    codes = model.codes(model.indices(images))
    posterior = model.encode(images)
    assert codes.shape == (2, 4, 4, 6) and torch.equal(posterior.mean, codes)
    assert (posterior.sample() - codes).abs().max() < 2e-6
    assert torch.allclose(model.codebook.norm(dim=1), torch.ones(40))
    assert model.decode(torch.randn(2, 4, 4, 6)).shape == images.shape
    for name, value in (("ch", 48), ("wings", 2)):
        with pytest.raises(ValueError, match=name):
            small_vq(**{name: value})


def test_the_nearest_code_is_that_of_brute_force_and_the_gradient_passes_through(monkeypatch):
    """Also where distances are computed in pieces; the codes themselves get no gradient."""
    monkeypatch.setattr(vq, "ROWS", 7)
    z, codebook = torch.randn(2, 5, 3, 4), torch.randn(11, 4)
    distances = (z[..., None, :] - codebook).square().sum(-1)
    assert torch.equal(vq.nearest(z, codebook), distances.argmin(-1))
    model, z = small_vq(), torch.randn(1, 4, 3, 3, requires_grad=True)
    codes, indices = model.quantize(z)
    weights = torch.randn_like(codes)
    (codes * weights).sum().backward()
    (expected,) = torch.autograd.grad((F.normalize(z, dim=1) * weights).sum(), z)
    assert torch.equal(codes.detach(), model.codes(indices).detach())
    assert torch.allclose(z.grad, expected)
    assert model.quantize.embedding.weight.grad is None


@torch.no_grad()
@pytest.mark.parametrize("form", ["own", "half", "published"])
def test_a_file_is_read_by_its_names(tmp_path, form):
    model, path = small_vq(), tmp_path / "vq.ckpt"
    if form == "published":  # without settings, or the record of the codes that were used
        torch.save({"model": dict(model.named_parameters()), "steps": 3}, path)
    else:
        save_vae(path, model.half() if form == "half" else model)
    found, images = load_vae(path, 4).eval(), torch.rand(1, 3, 8, 8)
    assert isinstance(found, VQModel) and found.config == model.config
    assert torch.equal(found.indices(images), model.float().indices(images))


def test_a_damaged_file_is_one_line(tmp_path):
    for damage, message in (
        (lambda s: s.pop("quant_conv.weight"), "it has no tensor quant_conv.weight"),
        (lambda s: s.pop("decoder.mid.1.q.bias"), "missing (first: decoder.mid.1.q.bias)"),
        (lambda s: s.update({vq.EMBEDDING: torch.zeros(5)}), "weight is (5,), not (5, 4)"),
        (lambda s: s.update({"encoder.conv_in.weight": torch.zeros(48, 3, 3, 3)}), "ch 48"),
        (
            lambda s: s.update({"quantize.more": torch.zeros(1)}),
            "unexpected (first: quantize.more)",
        ),
    ):
        path = tmp_path / "vq.ckpt"
        damage(state := small_vq().state_dict())
        torch.save({"model": state}, path)
        line = complaint(load_vae, path)
        assert line.startswith(f"--vae_path {path}: ") and message in line


# --- l-DeTok

SMALL = golden_json("tokenizers_config")["detok"]
TINY = dict(img_size=16, patch_size=4, embed_dim=4, encoder=(64, 1, 1), decoder=(64, 2, 1))


@pytest.mark.parametrize("name", sorted(path.stem for path in GOLDEN.glob("detok*.npz")))
@torch.no_grad()
def test_posterior_and_pixels_match_golden(name):
    data = golden(name)
    sizes = [SMALL["sizes"][SMALL[f"vit_{part}_model_size"]] for part in ("enc", "dec")]
    both = [tuple(size[k] for k in ("width", "layers", "heads")) for size in sizes]
    model = DeTok(SMALL["img_size"], SMALL["patch_size"], SMALL["token_channels"], *both).eval()
    shapes = {n: tuple(t.shape) for n, t in model.state_dict().items()}
    model.load_published({n: formula_weight(n, shape) for n, shape in shapes.items()})
    posterior = model.encode(data["image"])
    for part in ("mean", "logvar"):
        found = getattr(posterior, part).flatten(2).mT
        assert relative_error(found, data[f"posterior_{part}"]) < 1e-5
    mean, std = (data[f"channel_{part}"].view(1, -1, 1, 1) for part in ("mean", "std"))
    assert relative_error((posterior.mean - mean) / std, data["latents"]) < 1e-5
    decoded = model.decode(data["decode_latents"] * std + mean)
    assert relative_error(decoded, data["decoded_raw"]) < 1e-5
    assert relative_error(decoded.clamp(-1, 1) / 2 + 0.5, data["decoded_0_1"]) < 1e-5


def test_its_files_give_their_averages_and_images_are_of_one_size(tmp_path):
    torch.manual_seed(0)
    raw, averaged = DeTok(**TINY), DeTok(**TINY)
    saved = {"model": raw.state_dict(), "model_ema": averaged.state_dict()}
    torch.save(saved | {"epoch": 3}, tmp_path / "detok.pth")
    model = load_vae(tmp_path / "detok.pth", 4)
    assert model.config == averaged.config and model.stride == 4 and not model.is_kl16
    for name, tensor in averaged.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor)
    save_vae(tmp_path / "again.pth", model)
    image = torch.rand(1, 3, 16, 16)
    assert torch.equal(load_vae(tmp_path / "again.pth").moments(image), model.moments(image))
    with pytest.raises(ValueError, match="16 x 16 alone"):
        model.encode(torch.rand(1, 3, 32, 32))
    saved["model_ema"].popitem()
    torch.save(saved, tmp_path / "detok.pth")
    with pytest.raises(UserError, match="detok.pth: tensors do not match: 1 missing"):
        load_vae(tmp_path / "detok.pth")


@pytest.fixture(scope="module")
def place(inputs, tmp_path_factory):
    """inputs with l-DeTok's file as vae.ckpt, and their cache."""
    folder = tmp_path_factory.mktemp("detok")
    shutil.copytree(inputs / "data", folder / "data")
    state = DeTok(**TINY).state_dict()
    torch.save({"model": state, "model_ema": state}, folder / "vae.ckpt")
    use("cache", folder, cached_path="cache")
    return folder


def test_its_latents_are_normalised_by_their_means_and_stds(place, tmp_path):
    saved = train(place, tmp_path / "run", holdout=4, val_freq=1)
    config = TokenBridgeConfig.from_dict(saved["config"])
    tokenizer = Tokenizer(load_vae(place / "vae.ckpt"), *config.latent_norm)
    cache = open_cache(place / "cache")
    moments = torch.stack([cache[i, flip][0] for i in range(len(cache)) for flip in (0, 1)])
    std, mean = torch.std_mean(tokenizer.mode(Posterior(moments)), dim=(0, 2, 3), correction=0)
    assert mean.abs().max() < 1e-3 and (std - 1).abs().max() < 1e-3  # moments are of fp16
    latents = torch.randn(2, 4, 4, 4)
    torch.testing.assert_close(tokenizer.scaled(tokenizer.unscaled(latents)), latents)
    how = dict(resume=tmp_path / "run", no_metrics=True)
    first, second = (evaluate(place, tmp_path / str(n), **how, eval_bsz=n) for n in (3, 5))
    assert len(first) == 12 and first == second


def test_without_a_cache_its_statistics_are_asked_for(place, tmp_path, refusal):
    images = dict(use_cached=False, cached_path=None, vae_path="vae.ckpt", data_path="data")
    assert "main_cache.py measures" in refusal("train", place, **images)
    stats = place / "cache" / "manifest.json"
    saved = train(place, tmp_path / "run", **images, epochs=1, latent_stats=stats)
    cached = train(place, tmp_path / "cached", epochs=1)
    assert saved["config"]["latent_std"] == cached["config"]["latent_std"]
    shown = dict(latent_scale=None, latent_stats=stats)
    use("reconstruct", place, **shown, output_dir=tmp_path / "pictures")
    assert "main_cache.py measures" in refusal("reconstruct", place, latent_scale=None)
    assert "images of 16 px alone" in refusal("reconstruct", place, **shown, img_size=32)


def test_statistics_that_are_wrong_or_not_read_are_refused(place, inputs, tmp_path, refusal):
    known, path = read_json(place / "cache" / "manifest.json"), tmp_path / "stats.json"
    for change, told in (
        ({"channel_std": [1, 2, 3]}, "are not of all latent channels"),
        ({"channel_mean": None}, "--latent_stats"),
        ({"vae_sha256": "0" * 64}, "of another VAE"),
    ):
        path.write_text(json.dumps(known | change))
        assert told in refusal("train", place, latent_stats=path)
    assert "--latent_stats is read with" in refusal("train", inputs, latent_stats=path)
    train(place, tmp_path / "run", epochs=1)
    path.write_text(json.dumps(known | {"channel_std": [1, 2, 3, 4]}))
    again = dict(output_dir=tmp_path / "run", resume="auto", latent_stats=path)
    assert "other statistics than --latent_stats" in refusal("train", place, **again)


def test_other_latents_are_normalised_on_request_and_levels_fit_them(inputs, tmp_path, refusal):
    channel = dict(latent_norm="channel", quantizer="calibrated", quant_bits=3)
    saved = train(inputs, tmp_path / "run", **channel)
    config, manifest = saved["config"], open_cache(inputs / "cache").manifest
    assert list(config["latent_mean"]) == manifest["channel_mean"]
    assert list(config["latent_std"]) == manifest["channel_std"]
    scaled = train(inputs, tmp_path / "scaled", **channel | {"latent_norm": "scale"})
    levels = [run["model"]["reconstruction_values"] for run in (saved, scaled)]
    mean, std = (torch.tensor(config[f"latent_{name}"])[:, None] for name in ("mean", "std"))
    expected = levels[1] / scaled["config"]["latent_scale"]
    torch.testing.assert_close(levels[0] * std + mean, expected, rtol=1e-3, atol=1e-3)
    told = "--latent_scale is not read with --latent_norm channel"
    assert told in refusal("train", inputs, **channel, latent_scale=2)
    other = channel | dict(latent_norm="scale", resume=tmp_path / "run")
    assert "has --latent_norm channel, not scale" in refusal("train", inputs, **other)
