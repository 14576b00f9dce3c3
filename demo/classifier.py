"""Judge generated images: a classifier of real images, its accuracy, a Frechet distance.

python -m demo.classifier {train,judge} --root output/demo [--network {digits,emoji}]

Trained on real images, it gives the share of generated images that it takes for the class
they were asked to show, and features for a Frechet distance, which is not FID. Importing this
module registers the extractor with torch-fidelity: --feature_extractor demo.classifier:judge.
Letters: N images, S side in pixels, F features, 64 or 1,280.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.registry import register_feature_extractor

from util import dist
from util.args import Parser, positive_int
from util.data.images import read_image
from util.data.listing import list_images
from util.evaluation.extractor import Extractor
from util.evaluation.metrics import Measure, score
from util.evaluation.networks import EfficientNet
from util.evaluation.reference import compare_with_statistics
from util.files import load_tensors

BATCH = 64


def grey(images: Tensor) -> Tensor:
    """uint8 [N, 3, S, S] -> float32 [N, 1, S, S] in [0, 1], in Pillow's whole numbers."""
    weights = torch.tensor([19595, 38470, 7471], dtype=torch.int32, device=images.device)
    summed = (images.int() * weights[:, None, None]).sum(dim=1, keepdim=True, dtype=torch.int32)
    return (summed + 2**15 >> 16).float() / 255


class Digits(nn.Module):
    """Three strided convolutions, one hidden layer, whose outputs are the features."""

    def __init__(self, side: int, classes: int):
        super().__init__()
        self.features = nn.Sequential(  # [N, 1, S, S] -> [N, F], not negative
            *(nn.Conv2d(1, 32, 5, stride=2, padding=2), nn.BatchNorm2d(32), nn.ReLU()),
            *(nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.BatchNorm2d(64), nn.ReLU()),
            *(nn.Conv2d(64, 64, 3, stride=2, padding=1), nn.BatchNorm2d(64), nn.ReLU()),
            *(nn.Flatten(), nn.Linear(64 * (side // 8) ** 2, 64), nn.ReLU()),
        )
        self.output = nn.Linear(64, classes)

    prepared = staticmethod(grey)


class Emoji(nn.Module):
    """A linear layer on the features of EfficientNet-Lite0, which ImageNet has trained."""

    def __init__(self, side: int, classes: int):
        super().__init__()
        self.network = EfficientNet("efficientnet", ["features"], None).requires_grad_(False)
        self.features = nn.Identity()
        self.output = nn.Linear(1280, classes)

    @torch.no_grad()
    def prepared(self, images: Tensor) -> Tensor:
        """uint8 [N, 3, S, S] -> the features themselves, [N, F]."""
        return torch.cat([self.network(part)[0] for part in images.split(BATCH)])


NETWORKS = {"digits": Digits, "emoji": Emoji}


class Judge(FeatureExtractorBase):
    """As torch-fidelity knows networks; feature_extractor_weights_path: what `train` writes."""

    def __init__(self, name: str, features_list: list[str], feature_extractor_weights_path, **_):
        super().__init__(name, features_list)
        if feature_extractor_weights_path is None:
            raise ValueError("it is trained, not downloaded: demo/classifier.py train")
        saved = load_tensors(feature_extractor_weights_path, "--inception_weights")
        self.model = NETWORKS[saved["network"]](saved["side"], saved["classes"])
        self.model.load_state_dict(saved["model"])
        self.model.eval()

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """images: uint8 [N, 3, S, S] -> features [N, F], logits [N, classes], as requested."""
        features = self.model.features(self.model.prepared(images))
        found = {"features": features, "logits": self.model.output(features)}
        return tuple(found[layer] for layer in self.features_list)

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return "features", "logits"

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        return "logits" if metric == "isc" else "features"


register_feature_extractor("judge", Judge)


def load_images(paths: Sequence[str | Path]) -> Tensor:
    """Image files of one size -> uint8 [N, 3, S, S]."""
    pixels = np.stack([np.asarray(read_image(path)) for path in paths])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2)


def jitter(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image turned by up to 0.15 rad, scaled by up to 10 % and shifted by up to 6 % of S."""
    turn, scale, right, down = torch.rand(4, len(images), generator=generator) * 2 - 1
    cos, sin = torch.cos(0.15 * turn), torch.sin(0.15 * turn)
    scale = 1 + 0.1 * scale
    rows = [scale * cos, -scale * sin, 0.12 * right, scale * sin, scale * cos, 0.12 * down]
    grid = F.affine_grid(torch.stack(rows, 1).view(-1, 2, 3), images.shape, align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


def train_classifier(network: str, images: Tensor, labels: Tensor, epochs: int) -> nn.Module:
    """images: uint8 [N, 3, S, S], labels: [N] int64. A function of its arguments."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model = NETWORKS[network](images.shape[-1], int(labels.max()) + 1)
    prepared = model.prepared(images)
    steps = epochs * (len(images) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=steps)
    for _ in range(epochs):
        order = torch.randperm(len(images), generator=generator)
        for chosen in order[: len(images) // BATCH * BATCH].split(BATCH):
            batch = prepared[chosen]
            if network == "digits":
                batch = jitter(batch, generator)
            logits = model.output(F.dropout(model.features(batch), 0.3))
            loss = F.cross_entropy(logits, labels[chosen], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def labelled_images(folder: Path) -> tuple[Tensor, Tensor]:
    """Images and labels of folder/CLASS/."""
    paths, labels = zip(*list_images(folder.parent, folder.name).samples, strict=True)
    return load_images(paths), torch.tensor(labels)


def generated_images(folder: Path) -> tuple[Tensor, Tensor]:
    """Images and labels of an evaluation's folder: images/*.png in order, class by class."""
    paths = sorted((folder / "images").glob("*.png"))
    record = json.loads((folder / "metrics.json").read_text())
    labels, counts = (torch.tensor(record[name]) for name in ("labels", "counts"))
    return load_images(paths), labels.repeat_interleave(counts)


def load_measure(root: Path, size: int) -> Measure:
    """The judge of a folder of stages, and the statistics of the training images' features."""
    extractor = Extractor("judge", root / "classifier.pth", torch.device("cpu"))
    return compare_with_statistics(Measure(extractor), str(root / "statistics.npz"), size)


def figures(measure: Measure, images: Tensor, labels: Tensor) -> tuple[dict, Tensor]:
    """Fréchet distance to the training images with its error, accuracy; the predictions, [N]."""
    features, sums = measure.extractor(images), measure.sums()
    sums.update(features)
    found, predictions = score(sums, measure).figures, features["logits"].argmax(dim=1)
    error = found.get("frechet_distance_standard_error")
    known = {"frechet": found["frechet_distance"], "frechet_error": error}
    return known | {"accuracy": (predictions == labels).double().mean().item()}, predictions


def judge(measure: Measure, train: Tensor, images: Tensor, labels: Tensor) -> dict:
    """What the report shows of images. train: pixels of the training images."""
    found, predictions = figures(measure, images, labels)
    pixels = images[0].numel()
    apart = torch.cdist(images.flatten(1) / 255, train.flatten(1) / 255).div(pixels**0.5).min(1)
    return found | {
        "images": len(images),
        # Root mean square of the pixels' differences, the mean over images; and to which.
        "nearest_training_image": apart.values.mean().item(),
        "nearest": apart.indices.tolist(),
        "labels": labels.tolist(),
        "predictions": predictions.tolist(),
    }


def main() -> None:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("command", choices=("train", "judge"), help="on real images; generated ones")
    add("--root", type=Path, default=Path("output/demo"), help="of all stages of demo/run.sh")
    add("--network", choices=tuple(NETWORKS), default="digits", help="to train")
    add("--epochs", type=positive_int, default=30, help="of training")
    args = parser.parse()
    weights = args.root / "classifier.pth"
    images, labels = labelled_images(args.root / "data" / "train")
    if args.command == "train":
        model = train_classifier(args.network, images, labels, args.epochs)
        saved = {"side": images.shape[-1], "classes": len(model.output.weight)}
        saved["network"] = args.network
        torch.save(saved | {"model": model.state_dict()}, weights)
        print(f"{weights}: trained on {len(images)} images")
        return
    measure = load_measure(args.root, images.shape[-1])
    (generated,) = (path.parent for path in args.root.glob("generated/*/metrics.json"))
    sets = {"held_out": labelled_images(args.root / "data" / "val")}
    sets["generated"] = generated_images(generated)
    scores = {name: judge(measure, images, *own) for name, own in sets.items()}
    (args.root / "scores.json").write_text(json.dumps(scores) + "\n")
    for name, own in scores.items():
        distance = f"Frechet distance to training {own['frechet']:.2f} (not FID)"
        print(f"{name:>9}: {own['images']} images, accuracy {own['accuracy']:.4f}, {distance}")


if __name__ == "__main__":
    dist.run(main)
