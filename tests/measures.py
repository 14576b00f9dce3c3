"""What tests measure with: random Inception weights, a small extractor, a checkpoint to draw from.

The extractor is registered with torch-fidelity as "pixels" when this module is imported, as any
extractor of a user's is: `--feature_extractor tests.measures:pixels`.
"""

from argparse import Namespace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.registry import register_feature_extractor

from models.config import preset
from models.tokenbridge import TokenBridge
from tests.runs import CHANNELS, SIZE, STRIDE
from util.evaluation.extractor import INCEPTION
from util.evaluation.metrics import Measure
from util.evaluation.reference import prepare_measure

PIXELS = "tests.measures:pixels"
FEATURES, LOGITS = 9, 5


class Pixels(FeatureExtractorBase):
    """Nine features and five logits: products of means of patches, fixed weights."""

    def __init__(self, name: str, features_list: list[str], **_):
        super().__init__(name, features_list)
        generator = torch.Generator().manual_seed(0)
        for layer, width in (("mixed", FEATURES), ("logits", LOGITS)):
            weight = torch.randn(48, width, generator=generator)
            self.register_buffer(layer, weight)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        torch.rand(3)  # a careless extractor draws from the global generator
        patches = F.adaptive_avg_pool2d(images.float() / 255, 4).flatten(1)  # [N, 48]
        found = {"mixed": (patches @ self.mixed).tanh(), "logits": patches @ self.logits}
        return tuple(found[layer] for layer in self.features_list)

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return "mixed", "logits"

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        return {"isc": "logits", "fid": "mixed", "kid": "mixed", "prc": "mixed"}[metric]


register_feature_extractor("pixels", Pixels)


def prepare(size: int = SIZE, **changes) -> Measure | None:
    """What the flags of an evaluation measure with, of images of that size."""
    flags = dict(no_metrics=False, fid_stats=None, feature_extractor=INCEPTION)
    flags |= dict(inception_weights=None)
    return prepare_measure(Namespace(**flags | changes), size, torch.device("cpu"))


def random_model(**changes) -> TokenBridge:
    """Of random weights, for the inputs of tests/runs.py."""
    settings = preset("tokenbridge_tiny") | dict(img_size=SIZE, vae_stride=STRIDE, class_num=3)
    model = TokenBridge(**settings | dict(vae_embed_dim=CHANNELS, buffer_size=4) | changes)
    with torch.no_grad():
        for parameter in model.parameters():  # adaLN starts at zero, where classes are alike
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def save_model(folder: Path, seed: int = 0, **known) -> Path:
    """A checkpoint of a random model, and of what else is known."""
    torch.manual_seed(seed)
    model = random_model(channel_order=(2, 0, 3, 1), latent_scale=1.0)
    folder.mkdir(parents=True)
    saved = {"model": model.published_state_dict(), "config": model.config.to_dict()}
    saved["model_ema"] = dict(model.published_parameters())
    torch.save(saved | known, folder / "checkpoint-last.pth")
    return folder
