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
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from models.quantizer import CalibratedQuantizer, GaussianQuantizer, entropy, level_counts
from models.tokenizers.kl16 import Posterior
from models.tokenizers.tokenizer import Tokenizer, to_uint8
from util import dist
from util.data.images import ImageDataset, grid, psnr, save_png
from util.errors import UserError
from util.evaluation.folder import FeatureFiles, ImageFolder, write_csv, write_json, write_plot
from util.evaluation.metrics import Measure, frechet, score
from util.evaluation.reference import image_batches, read_batches

ORIGINAL, CONTINUOUS, QUANTIZED = "original", "continuous", "bits"
GRID_IMAGES = 8
PLOTTED = ("psnr", "ssim", "rfid", "reconstruction_frechet_distance", "fid")
PLOTTED += ("inception_score_mean", "entropy_bits")


def variant_name(bits: int) -> str:
    return f"{QUANTIZED}{bits}" if bits > 0 else CONTINUOUS


def quantized(
    latents: Tensor, quantizer: GaussianQuantizer | CalibratedQuantizer
) -> tuple[Tensor, dict[str, Tensor]]:
    """latents: [N, C, h, w] scaled -> what the decoder gets, and facts of the batch.

    counts: [1, C, K] int64, use of the levels. outside: [1, C] int64, scalars beyond the range of
    the quantizer. squared_error: [1, C] float64, summed over images and positions.
    """
    scalars = latents.movedim(1, -1)  # [N, h, w, C]
    indices = quantizer.encode(scalars)
    values = quantizer.decode(indices)
    error = (values - scalars).square().sum(dim=(1, 2))  # [N, C]; on MPS there are no doubles
    facts = {
        "counts": level_counts(indices, quantizer.levels),
        "outside": quantizer.outside(scalars).sum(dim=(0, 1, 2)),
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


@dataclass(frozen=True)
class Reconstruction:
    """folder: has images of the crops and of each variant. variants: quantizers by name, None
    without one. noise_seed: None takes posterior means.
    """

    folder: ImageFolder
    dataset: ImageDataset
    tokenizer: Tokenizer
    measure: Measure | None
    variants: dict[str, GaussianQuantizer | CalibratedQuantizer | None]
    noise_seed: int | None

    @property
    def names(self) -> list[str]:
        return [ORIGINAL, *self.variants]

    def records(self, name: str) -> FeatureFiles:
        return FeatureFiles(self.folder.path / "records" / name, self.folder.batches)

    def missing(self, name: str) -> set[int]:
        """Numbers of the batches that are not done: their record, features or images lack."""
        records, features = self.records(name), self.folder.features(name)
        missing = records.missing() | (features.missing() if features else set())
        done = set(range(len(self.folder.batches))) - missing
        return missing | self.folder.unsaved({k: records.read(k)[0] for k in done}, name)

    def run(self, num_workers: int) -> None:
        """This process's share of the batches that some variant lacks."""
        folder, dataset = self.folder, self.dataset
        # as the main process finds them, so that all agree
        missing = dist.gather_objects({name: self.missing(name) for name in self.names})[0]
        todo = set().union(*missing.values())
        batches = image_batches(dataset, folder.batches, todo, num_workers, "reconstructing")
        for number, ids, images in batches:
            names = [name for name in self.names if number in missing[name]]
            for name, pixels, record in self.decode(images, ids, names):
                if self.measure is not None:
                    folder.features(name).write(number, ids, self.measure.extractor(pixels))
                folder.save(ids, pixels, name)
                self.records(name).write(number, ids, record)  # the last: it is done

    def decode(
        self, images: Tensor, ids: list[int], names: Sequence[str]
    ) -> Iterator[tuple[str, Tensor, dict[str, Tensor]]]:
        """(name, pixels like images, record) of these names. images: uint8 [N, 3, H, W] of ids."""
        latents, original = None, images.to(next(self.tokenizer.parameters()).device)
        for name in names:
            if name == ORIGINAL or not ids:
                yield name, images, {}
                continue
            if latents is None:
                latents = draw_latents(self.tokenizer, original, ids, self.noise_seed)
            quantizer = self.variants.get(name)
            values, record = quantized(latents, quantizer) if quantizer else (latents, {})
            pixels = to_uint8(self.tokenizer.decode(values))
            record |= {"psnr": psnr(pixels.cpu(), images), "ssim": ssim(pixels, original).cpu()}
            yield name, pixels.cpu(), record

    def first_batch(self) -> dict:
        """One batch through everything, for --dry_run: what the run would take."""
        folder, world = self.folder, dist.world_size()
        todo = len(set().union(*(self.missing(name) for name in self.names)))
        ids, images = next(read_batches(self.dataset, folder.batches[:1], num_workers=0))
        if not ids:
            raise UserError("none of the first batch of images can be read; see --image_dir")
        dist.print_main(f"{folder.count} images as {', '.join(self.names)}")
        began = time.perf_counter()
        for _, pixels, _ in self.decode(images, ids, self.names):
            if self.measure is not None:
                self.measure.extractor(pixels)
        seconds = time.perf_counter() - began
        return {
            "images": folder.count,
            "batches": len(folder.batches),
            "batches_to_do": todo,
            "variants": self.names,
            "images_per_second": len(ids) * world / seconds,
            "hours": todo * seconds / 3600 / world,
        }

    def finish(self, settings: dict) -> dict:
        """Write the figures of all variants in the folder, and grid.png; returns results.json."""
        folder, measure = self.folder, self.measure
        originals, batches = self.records(ORIGINAL), range(len(folder.batches))
        readable = [image_id for number in batches for image_id in originals.read(number)[0]]
        if not readable:
            raise UserError("none of the images can be read; see --image_dir")
        records = [path.name for path in sorted((folder.path / "records").iterdir())]
        earlier = [name for name in records if name not in self.names]
        names = [*self.variants, *(name for name in earlier if not self.missing(name))]
        results = [summarise(name, self.records(name)) for name in names]
        if measure is not None:
            self.add_scores(results, measure)
        settings |= {"images": len(readable), "measured": measure.identity() if measure else None}
        settings["results"] = results
        write_json(folder.path / "results.json", settings)
        by_bits = sorted(results, key=lambda r: r["bits"] % math.inf)
        columns = dict.fromkeys(n for r in results for n in r if not n.endswith("_by_channel"))
        write_csv(folder.path / "results.csv", by_bits, columns)
        lines = {"": [r for r in by_bits if r["bits"] > 0]}
        flat = [("not quantized", r) for r in results if r["bits"] < 0]
        write_plot(folder.path / "quality.png", PLOTTED, "bits", lines, flat)
        shown = readable[:: -(-len(readable) // GRID_IMAGES)]
        rows = {ORIGINAL: folder.read(shown, ORIGINAL)}
        if CONTINUOUS not in names:  # what the quantizer starts from is always there to compare
            rows[CONTINUOUS] = next(self.decode(rows[ORIGINAL], shown, [CONTINUOUS]))[1]
        for name in sorted(names, key=lambda name: name != CONTINUOUS):
            rows[name] = folder.read(shown, name)
        path = folder.path / "grid.png"
        save_png(grid(torch.cat(list(rows.values())), len(shown)), path)
        print(f"{len(readable)} images, rows of {path}: {', '.join(rows)}")
        for result in results:
            figures = [f"{k} {v:.5g}" for k, v in result.items() if isinstance(v, float)]
            print(f"{result['name']:>10}  " + "  ".join(figures))
        return settings

    def add_scores(self, results: list[dict], measure: Measure) -> None:
        """Figures of the features, and their distance to those of the crops."""
        extractor, features = measure.extractor, self.folder.features
        warnings, crops = [], None
        distance = "rfid" if extractor.is_inception else "reconstruction_frechet_distance"
        if "fid" in extractor.layers and results[0]["images"] > 1:  # a covariance takes two
            crops = measure.sums(features(ORIGINAL)).moments["fid"].statistics()
        for result in results:
            dist.beat(f"measuring {result['name']}")
            sums = measure.sums(features(result["name"]))
            scores = score(sums, measure)
            result |= scores.figures
            if crops is not None:
                result[distance] = frechet(sums.moments["fid"].statistics(), crops)
            warnings += scores.warnings
        for warning in dict.fromkeys(warnings):
            print(f"warning: {warning}", file=sys.stderr, flush=True)


def draw_latents(tokenizer: Tokenizer, images: Tensor, ids: list[int], seed: int | None) -> Tensor:
    """Scaled latents [N, C, h, w]: posterior means without a seed, else samples.

    The noise of image i is a function of (seed, i) alone.
    """
    posterior = tokenizer.posterior(images)
    if seed is None:
        return tokenizer.mode(posterior)
    drawn = []
    for image_id, parameters in zip(ids, posterior.parameters, strict=True):
        # 32 bits that depend on both numbers: a CPU's generator reads no more of its seed.
        mixed = np.random.SeedSequence([seed, image_id]).generate_state(1)[0]
        generator = torch.Generator(images.device).manual_seed(int(mixed))
        drawn.append(tokenizer.sample(Posterior(parameters[None]), generator))
    return torch.cat(drawn)
