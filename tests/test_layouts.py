"""Names, shapes, count and order, which numbers an optimizer's state, of the published files."""

import pytest
import torch
from torch import Tensor, nn

from models.config import preset
from models.tokenbridge import TokenBridge
from models.tokenizers import detok, vq
from models.tokenizers.kl16 import AutoencoderKL
from tests.conftest import golden_json

FILES = ("state_dict_layouts", "mar_layouts", "tokenizer_layouts")
LAYOUTS = {name: layout for file in FILES for name, layout in golden_json(file).items()}


def built(name: str, tensors: dict[str, Tensor]) -> nn.Module:
    """The published model, or a tokenizer with the settings that its tensors tell."""
    if name == "kl16":
        return AutoencoderKL()
    if name.startswith("vq"):
        return vq.VQModel(**vq.VQModel.settings_of(tensors))
    if name.startswith("detok"):
        return detok.DeTok(**detok.DeTok.settings_of(tensors))
    return TokenBridge(**preset(name))


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_and_count_are_the_published_ones(name):
    layout = LAYOUTS[name]
    shapes = layout["shapes"] if "shapes" in layout else layout["tensors"]
    with torch.device("meta"):
        model = built(name, {n: torch.empty(shape) for n, shape in shapes.items()})
    state = getattr(model, "published_state_dict", model.state_dict)()
    assert {n: list(t.shape) for n, t in state.items()} == shapes
    assert list(state) == list(shapes) or name.startswith("detok")  # which is never trained
    assert sum(p.numel() for p in model.parameters()) == layout["parameters"]
    if "buffers" in layout:
        named = getattr(model, "published_parameters", model.named_parameters)()
        assert sorted(set(state) - {n for n, _ in named}) == layout["buffers"]
    if name == "vq16":
        assert model.config == vq.VQ16 and (model.channels, model.stride) == (8, 16)
    elif name == "kl16":
        assert model.stride == 16 and model.is_kl16
