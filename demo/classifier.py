"""Judge generated images: a small classifier of real images, its accuracy, a Frechet distance.

Trained on real training images alone, the classifier gives the share of generated images that it
takes for the class they were asked to show, and a feature space for a Frechet distance. That
distance is not FID: FID is the one in the features of the Inception network.
Letters: N images, S side in pixels, F = 64 penultimate features.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

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


def load_images(paths: list[Path]) -> Tensor:
    """Image files of one size -> grey, float32 [N, 1, S, S] in [0, 1]."""
    grey = [np.asarray(Image.open(path).convert("L")) for path in paths]
    return torch.from_numpy(np.stack(grey))[:, None].float() / 255


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


@torch.no_grad()
def predict(model: Classifier, images: Tensor) -> Tensor:
    """The class that the model takes each of [N, 1, S, S] for: [N] int64."""
    return model(images).argmax(1)


@torch.no_grad()
def frechet_distance(model: Classifier, first: Tensor, second: Tensor) -> float:
    """Squared Frechet distance of Gaussians fitted to two sets' penultimate features. Not FID.

    |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)); first, second: [N, 1, S, S] in [0, 1].
    """
    a, b = (model.features(images).double() for images in (first, second))
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    # C1 C2 is similar to a positive semidefinite matrix: the trace of its root needs only the
    # eigenvalues, and their small negative parts are rounding
    eigenvalues = torch.linalg.eigvals(cov_a @ cov_b).real.clamp(min=0)
    trace = cov_a.trace() + cov_b.trace() - 2 * eigenvalues.sqrt().sum()
    return ((a.mean(0) - b.mean(0)).square().sum() + trace).item()


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
    per_class = json.loads((folder / "metrics.json").read_text())["images_per_class"]
    return load_images(paths), torch.arange(len(paths)) // per_class


def judge(
    model: Classifier,
    train: tuple[Tensor, Tensor],
    held_out: tuple[Tensor, Tensor],
    generated: tuple[Tensor, Tensor],
) -> dict:
    """All figures about generated images, each beside the same figure of held-out ones."""
    figures = {}
    for name, (images, labels) in (("held_out", held_out), ("generated", generated)):
        predictions = predict(model, images)
        figures[name] = {
            "images": len(images),
            "accuracy": (predictions == labels).double().mean().item(),
            "frechet_to_train": frechet_distance(model, train[0], images),
            "nearest_training_image": nearest_distance(images, train[0]),
            "labels": labels.tolist(),
            "predictions": predictions.tolist(),
        }
    return figures


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--data_path", type=Path, default=Path("output/demo/data"), help="has train/ and val/")
    add("--generated", type=Path, required=True, help="folder that --evaluate wrote")
    add("--output", type=Path, default=Path("output/demo/scores.json"), help="file to write")
    add("--epochs", type=int, default=30, help="of the classifier's training")
    add("--seed", type=int, default=0, help="of the classifier's training")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    train, held_out = (labelled_images(args.data_path / part) for part in ("train", "val"))
    began = time.monotonic()
    model = train_classifier(*train, epochs=args.epochs, seed=args.seed)
    print(f"classifier trained on {len(train[0])} images in {time.monotonic() - began:.0f} s")
    figures = judge(model, train, held_out, generated_images(args.generated))
    args.output.write_text(json.dumps(figures) + "\n")
    for name, found in figures.items():
        print(
            f"{name:>9}: {found['images']} images, accuracy {found['accuracy']:.4f}, Frechet "
            f"distance to the training images {found['frechet_to_train']:.2f} (not FID)"
        )


if __name__ == "__main__":
    main()
