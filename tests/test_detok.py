"""l-DeTok against the golden data, and as --vae_path."""

import pytest
import torch

from models.tokenizers import detok
from models.tokenizers.detok import DeTok
from tests.conftest import GOLDEN, formula_weight, golden, golden_json, relative_error
from util.errors import UserError
from util.vae import load_vae, save_vae

LAYOUTS = golden_json("tokenizer_layouts")
SMALL = golden_json("tokenizers_config")["detok"]
TINY = dict(img_size=16, patch_size=4, embed_dim=4, encoder=(64, 1, 1), decoder=(64, 2, 1))


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name.startswith("detok")])
def test_layout_and_count_are_the_published_ones_and_tell_the_settings(name):
    tensors = LAYOUTS[name]["tensors"]
    with torch.device("meta"):
        state = {n: torch.empty(shape) for n, shape in tensors.items()}
        model = DeTok(**detok.settings_of(state))
    assert {n: list(t.shape) for n, t in model.state_dict().items()} == tensors
    assert sum(p.numel() for p in model.parameters()) == LAYOUTS[name]["parameters"]


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
    for part, name in ((posterior.mean, "posterior_mean"), (posterior.logvar, "posterior_logvar")):
        assert relative_error(part.flatten(2).mT, data[name]) < 1e-5
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
