"""Judge generated images: a small classifier of real images, its accuracy, a Frechet distance.

python -m demo.classifier train --root output/demo
python -m demo.classifier judge --root output/demo

Trained on real training images alone, the classifier gives the share of generated images that it
takes for the class they were asked to show, and a feature space for a Frechet distance. That
distance is not FID: FID is the one in the features of the Inception network. It is computed by
`main_tokenbridge.py --evaluate --feature_extractor demo.classifier:digits`: importing this module
registers the extractor `digits` with torch-fidelity.
Letters: N images, S side in pixels, F = 64 penultimate features.
"""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.registry import register_feature_extractor

from util.args import positive_int
from util.errors import run
from util.evaluation.extractor import Extractor
from util.evaluation.metrics import frechet, statistics
from util.evaluation.reference import load_fid_statistics
from util.files import atomic_write, load_tensors
from util.parser import Parser

EXTRACTOR = "digits"
FEATURES = 64
BATCH = 64


class Classifier(nn.Module):
    """Three strided convolutions, one hidden layer. `features` are the hidden layer's outputs."""

    def __init__(self, side: int, classes: int):
        super().__init__()
        self.convolutions = nn.Sequential(
            *(nn.Conv2d(1, 32, 5, stride=2, padding=2), nn.BatchNorm2d(32), nn.ReLU()),
            *(nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.BatchNorm2d(64), nn.ReLU()),
            *(nn.Conv2d(64, 64, 3, stride=2, padding=1), nn.BatchNorm2d(64), nn.ReLU()),
        )
        self.hidden = nn.Linear(64 * (side // 8) ** 2, FEATURES)
        self.output = nn.Linear(FEATURES, classes)

    def features(self, images: Tensor) -> Tensor:
        """images: [N, 1, S, S] in [0, 1] -> [N, F], not negative."""
        return F.relu(self.hidden(self.convolutions(images).flatten(1)))

    def forward(self, images: Tensor) -> Tensor:
        """images: [N, 1, S, S] in [0, 1] -> logits [N, classes]."""
        return self.output(F.dropout(self.features(images), 0.3, self.training))


class DigitFeatures(FeatureExtractorBase):
    """The classifier as torch-fidelity knows networks: `features` for distances, `logits` for IS.

    feature_extractor_weights_path: classifier.pth, that `train` writes.
    """

    def __init__(self, name: str, features_list: list[str], feature_extractor_weights_path, **_):
        super().__init__(name, features_list)
        if feature_extractor_weights_path is None:
            raise ValueError("it is trained, not downloaded: demo/classifier.py train")
        saved = load_tensors(feature_extractor_weights_path, "--inception_weights")
        self.model = Classifier(saved["side"], saved["classes"])
        self.model.load_state_dict(saved["model"])
        self.model.eval()

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """images: uint8 [N, 3, S, S] -> features [N, F] and logits [N, classes], as requested."""
        features = self.model.features(grey(images))
        found = {"features": features, "logits": self.model.output(features)}
        return tuple(found[layer] for layer in self.features_list)

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return "features", "logits"

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        return "logits" if metric == "isc" else "features"


register_feature_extractor(EXTRACTOR, DigitFeatures)


def load_images(paths: list[Path]) -> Tensor:
    """Image files of one size -> uint8 [N, 3, S, S]."""
    pixels = [np.asarray(Image.open(path).convert("RGB")) for path in paths]
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)


def grey(images: Tensor) -> Tensor:
    """uint8 [N, 3, S, S] -> float32 [N, 1, S, S] in [0, 1], in Pillow's whole numbers."""
    weights = torch.tensor([19595, 38470, 7471], dtype=torch.int32, device=images.device)
    summed = (images.int() * weights[:, None, None]).sum(dim=1, keepdim=True, dtype=torch.int32)
    return (summed + 2**15 >> 16).float() / 255


def jitter(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image turned by up to 0.15 rad, scaled by up to 10 % and shifted by up to 6 % of S."""
    turn, scale, right, down = torch.rand(4, len(images), generator=generator) * 2 - 1
    cos, sin = torch.cos(0.15 * turn), torch.sin(0.15 * turn)
    scale = 1 + 0.1 * scale
    rows = [scale * cos, -scale * sin, 0.12 * right, scale * sin, scale * cos, 0.12 * down]
    grid = F.affine_grid(torch.stack(rows, 1).view(-1, 2, 3), images.shape, align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


def train_classifier(images: Tensor, labels: Tensor, epochs: int = 30, seed: int = 0) -> Classifier:
    """images: [N, 1, S, S] in [0, 1], labels: [N] int64. A function of its arguments."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        generator = torch.Generator().manual_seed(seed)
        model = Classifier(images.shape[-1], int(labels.max()) + 1)
        steps = epochs * (len(images) // BATCH)
        optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=steps)
        for _ in range(epochs):
            order = torch.randperm(len(images), generator=generator)
            for chosen in order[: len(images) // BATCH * BATCH].split(BATCH):
                logits = model(jitter(images[chosen], generator))
                loss = F.cross_entropy(logits, labels[chosen], label_smoothing=0.05)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
    return model.eval()


def nearest_distance(images: Tensor, references: Tensor) -> float:
    """Mean over images of the root mean square pixel difference to the nearest reference.

    Of generated images to training images it is near 0 where training images are repeated.
    """
    distances = torch.cdist(images.flatten(1), references.flatten(1))
    return distances.min(1).values.mean().item() / images[0].numel() ** 0.5


def labelled_images(folder: Path) -> tuple[Tensor, Tensor]:
    """Images and labels of folder/CLASS/, classes numbered in sorted order."""
    classes = sorted(path.name for path in folder.iterdir())
    paths = sorted(folder.glob("*/*.png"))
    return load_images(paths), torch.tensor([classes.index(path.parent.name) for path in paths])


def generated_images(folder: Path) -> tuple[Tensor, Tensor]:
    """Images and labels of an evaluation's folder: images/*.png in order, class by class."""
    paths = sorted((folder / "images").glob("*.png"))
    record = json.loads((folder / "metrics.json").read_text())
    labels, counts = (torch.tensor(record[name]) for name in ("labels", "counts"))
    return load_images(paths), labels.repeat_interleave(counts)


def judge(
    extractor: Extractor,
    stats: dict[str, np.ndarray],
    train: Tensor,
    held_out: tuple[Tensor, Tensor],
    generated: tuple[Tensor, Tensor],
) -> dict:
    """All figures about generated images, each beside the same figure of held-out ones.

    stats: mu and sigma of the training images' features. train: their pixels.
    """
    figures = {}
    for name, (images, labels) in (("held_out", held_out), ("generated", generated)):
        found = extractor(images)
        predictions = found["logits"].argmax(dim=1)
        figures[name] = {
            "images": len(images),
            "accuracy": (predictions == labels).double().mean().item(),
            "frechet_to_train": frechet(statistics(found["features"]), stats),
            "nearest_training_image": nearest_distance(grey(images), grey(train)),
            "labels": labels.tolist(),
            "predictions": predictions.tolist(),
        }
    return figures


def main() -> None:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("command", choices=("train", "judge"), help="on real images; generated images")
    add("--root", type=Path, default=Path("output/demo"), help="of all stages of demo/run.sh")
    add("--epochs", type=positive_int, default=30, help="of training")
    args = parser.parse()
    weights = args.root / "classifier.pth"
    train = labelled_images(args.root / "data" / "train")
    if args.command == "train":
        model = train_classifier(grey(train[0]), train[1], epochs=args.epochs)
        saved = {"side": train[0].shape[-1], "classes": int(train[1].max()) + 1}
        with atomic_write(weights) as file:
            torch.save(saved | {"model": model.state_dict()}, file)
        print(f"{weights}: trained on {len(train[0])} images")
        return
    extractor = Extractor(EXTRACTOR, weights, torch.device("cpu"))
    stats = load_fid_statistics(args.root / "digits.npz", FEATURES)
    held_out = labelled_images(args.root / "data" / "val")
    (generated,) = (path.parent for path in args.root.glob("generated/*/metrics.json"))
    figures = judge(extractor, stats, train[0], held_out, generated_images(generated))
    (args.root / "scores.json").write_text(json.dumps(figures) + "\n")
    for name, found in figures.items():
        print(
            f"{name:>9}: {found['images']} images, accuracy {found['accuracy']:.4f}, Frechet "
            f"distance to the training images {found['frechet_to_train']:.2f} (not FID)"
        )


if __name__ == "__main__":
    run(main)
