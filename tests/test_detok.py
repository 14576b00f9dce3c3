"""l-DeTok against the golden data, and as --vae_path; latents normalised by channel."""

import json
import shutil

import pytest
import torch

from models.config import TokenBridgeConfig
from models.tokenizers.detok import DeTok
from models.tokenizers.kl16 import Posterior
from models.tokenizers.tokenizer import Tokenizer
from tests.conftest import GOLDEN, formula_weight, golden, golden_json, relative_error
from tests.runs import evaluate, train, use
from util.data.latent_cache import open_cache, read_json
from util.errors import UserError
from util.vae import load_vae, save_vae

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
