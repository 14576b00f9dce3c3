"""Images through the VAE, with and without a quantizer: what is measured, and their folder.

    original/00000.png ...          the crops
    continuous/, bits6/, ...        the same images through the VAE, without and with a quantizer
    records/VARIANT/batch-K.npz     PSNR, SSIM and use of the levels of batch K: it is done
    features/EXTRACTOR/VARIANT/     features of every batch, where they are measured
    results.json, results.csv, quality.png, grid.png    all figures, once all batches are done

Letters: N images of a batch, C latent channels, h, w positions, K levels.
Source: Wang et al. 2004 (SSIM), by torchmetrics with its defaults.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from models.quantizer import CalibratedQuantizer, GaussianQuantizer, entropy, level_counts
from util.evaluation.folder import (
    FeatureFiles,
    ImageFolder,
    image_name,
    read_images,
    whole_files,
    write_csv,
    write_images,
    write_json,
    write_plot,
)

ORIGINAL, CONTINUOUS, QUANTIZED = "original", "continuous", "bits"
SSIM_LEAST = 6  # pixels a side: 5 of them are mirrored
PLOTTED = ("psnr", "ssim", "rfid", "reconstruction_frechet_distance", "fid")
PLOTTED += ("inception_score_mean", "entropy_bits")


@dataclass(frozen=True)
class QuantizerVariant:
    """name: "continuous" or "bits6". quantizer: None without one."""

    name: str
    quantizer: GaussianQuantizer | CalibratedQuantizer | None = None

    def apply(self, latents: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """latents: [N, C, h, w] scaled -> what the decoder gets, and facts of the batch.

        counts: [1, C, K] int64, use of the levels. outside: [1, C] int64, scalars beyond the range
        of the quantizer. squared_error: [1, C] float64, summed over images and positions.
        """
        if self.quantizer is None:
            return latents, {}
        scalars = latents.movedim(1, -1)  # [N, h, w, C]
        indices = self.quantizer.encode(scalars)
        values = self.quantizer.decode(indices)
        error = (values - scalars).square().sum(dim=(1, 2))  # [N, C]; on MPS there are no doubles
        facts = {
            "counts": level_counts(indices, self.quantizer.levels),
            "outside": self.quantizer.outside(scalars).sum(dim=(0, 1, 2)),
            "squared_error": error.cpu().double().sum(dim=0),
        }
        return values.movedim(-1, 1), {name: fact.cpu()[None] for name, fact in facts.items()}


def ssim(pixels: Tensor, original: Tensor) -> Tensor:
    """Structural similarity of uint8 images [N, 3, H, W] on the scale of 0 to 255: [N]."""
    from torchmetrics.functional.image import structural_similarity_index_measure  # slow to import

    kind = pixels.device.type
    precise = torch.float32 if kind == "mps" else torch.float64  # MPS has no doubles
    # A CPU convolves doubles through a copy of the batch for each tap, too large to stay mapped.
    size = 1 if kind == "cpu" else len(pixels)
    parts = zip(pixels.to(precise).split(size), original.to(precise).split(size), strict=True)
    measure = partial(structural_similarity_index_measure, data_range=255.0, reduction="none")
    return torch.cat([measure(*part).reshape(-1) for part in parts])


@dataclass(frozen=True)
class ReconstructionFolder(ImageFolder):
    """A folder of images for the crops and for each variant."""

    def images(self, variant: str, ids: Sequence[int]) -> list[Path]:
        return [self.path / variant / image_name(i, self.count) for i in ids]

    def records(self, variant: str) -> FeatureFiles:
        return FeatureFiles(self.path / "records" / variant, self.batches)

    def missing(self, variant: str) -> set[int]:
        """Numbers of the batches that are not done: their record, features or images lack."""
        records, features = self.records(variant), self.features(variant)
        missing = records.missing() | (features.missing() if features else set())
        present = whole_files(self.path / variant)
        for number in set(range(len(self.batches))) - missing:
            paths = self.images(variant, records.read(number)[0])
            if any(path.name not in present for path in paths):
                missing.add(number)
        return missing

    def readable(self) -> list[int]:
        """Numbers of the images that could be read, once all batches are done."""
        records = self.records(ORIGINAL)
        return [i for number in range(len(self.batches)) for i in records.read(number)[0]]

    def write(
        self, variant: str, number: int, ids: list[int], pixels: Tensor, record: dict[str, Tensor]
    ) -> None:
        """One batch; its record comes last. pixels: uint8 [n, 3, H, W], numbered by ids."""
        write_images(self.images(variant, ids), pixels)
        self.records(variant).write(number, ids, record)

    def read(self, variant: str, ids: Sequence[int]) -> Tensor:
        """uint8 [N, 3, H, W]."""
        return read_images(self.images(variant, ids))

    def finished(self) -> list[str]:
        """All variants that are finished, by an earlier run too, the crops apart."""
        names = [path.name for path in sorted((self.path / "records").iterdir()) if path.is_dir()]
        return [name for name in names if name != ORIGINAL and not self.missing(name)]


def summarise(name: str, files: FeatureFiles) -> dict:
    """The figures of a variant from the records of its batches."""
    chunks = list(files.chunks())
    records = {key: torch.cat([chunk[key] for chunk in chunks]) for key in chunks[0]}
    bits = -1 if name == CONTINUOUS else int(name.removeprefix(QUANTIZED))
    result = {"name": name, "bits": bits, "images": len(records["psnr"])}
    result |= {key: records[key].double().mean().item() for key in ("psnr", "ssim")}
    if "counts" not in records:
        return result
    counts, outside = records["counts"].sum(dim=0), records["outside"].sum(dim=0)
    scalars = counts.sum(dim=1)  # of each channel
    by_channel = {
        "latent_mse": records["squared_error"].sum(dim=0) / scalars,
        "entropy_bits": entropy(counts),
        "levels_used": (counts > 0).sum(dim=1),
        "out_of_range_share": outside / scalars,
    }
    means = {key: values.double().mean().item() for key, values in by_channel.items()}
    lists = {f"{key}_by_channel": values.tolist() for key, values in by_channel.items()}
    return result | means | lists


def write_results(folder: Path, settings: dict, results: list[dict]) -> None:
    """results.json, results.csv and quality.png. results: of each variant."""
    write_json(folder / "results.json", settings | {"results": results})
    by_bits = sorted(results, key=lambda r: r["bits"] % math.inf)
    names = dict.fromkeys(name for r in results for name in r if not name.endswith("_by_channel"))
    write_csv(folder / "results.csv", by_bits, names)
    flat = [("not quantized", r) for r in results if r["bits"] < 0]
    lines = {"": [r for r in by_bits if r["bits"] > 0]}
    write_plot(folder / "quality.png", PLOTTED, "bits", lines, flat)
