"""Measure what quantization costs: reconstruct images through the VAE at several bit widths.

python reconstruction.py --bits 6 --range 5.0 --image_dir IMAGENET
torchrun --nproc_per_node=8 reconstruction.py --bits -1 4 6 8 --image_dir IMAGENET

images -> posterior sample x latent scale -> quantizer -> decoder -> PNG, PSNR, SSIM, FID, IS

A negative number of bits is the continuous VAE, without quantization. Stopped or killed, the same
command goes on where it was, on any number of processes, and more --bits may join later.
Letters: N images, C latent channels, K levels.
"""

import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from models.config import PUBLISHED_LATENT_SCALE
from models.generate import to_uint8
from models.quantizer import build_quantizer
from models.tokenizers import kl16
from models.tokenizers.kl16 import Posterior
from models.tokenizers.tokenizer import Tokenizer
from util import args as flags
from util import dist
from util.args import Flag, Parser, settings_saved, value
from util.data.cache_writer import list_digest
from util.data.images import ImageDataset, grid, psnr, save_png
from util.data.latent_cache import open_cache
from util.data.listing import ImageList, is_data, list_files, list_images
from util.doctor import dry_run
from util.errors import UserError, as_user_error
from util.evaluation.metrics import Measure, frechet, score
from util.evaluation.reconstruction import (
    CONTINUOUS,
    ORIGINAL,
    QUANTIZED,
    SSIM_LEAST,
    QuantizerVariant,
    ReconstructionFolder,
    ssim,
    summarise,
    write_results,
)
from util.evaluation.reference import prepare_measure, read_batches
from util.files import check_writable
from util.logging import MetricsFile, figures_on_stdout
from util.setup import build_vae, cache_histogram, calibrated_levels, channel_statistics
from util.vae import vae_digest

GRID_IMAGES = 8
# What decides the images, beside the list of them and the VAE.
SETTINGS = ("img_size", "posterior", "batch_size")
RECORDED = ("image_dir", "images_per_class", "vae_path")  # for the reader of results.json alone


def make_parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_flags(
        "reconstruction",
        Flag("image_dir", str, "./data/imagenet", "train/CLASS/ or CLASS/"),
        Flag("output_dir", str, "quantization_results", "of all results"),
        Flag("bits", flags.bit_width_or_continuous, [6], "of a scalar; negative: none", nargs="+"),
        Flag("range", flags.positive_float, 5.0, "latents in [-range, range]"),
        flags.SETTINGS["quantizer"],
        Flag("images_per_class", flags.positive_int, 50, "of each class, the first"),
        Flag("batch_size", flags.positive_int, 32, "images a batch"),
        Flag("posterior", str, "sample", "the latent taken", ("sample", "mode")),
        flags.LATENT_SCALE,
        *flags.LATENT_NORM,
        flags.CACHED_PATH,
        Flag("dry_run", bool, False, "check all, reconstruct a batch, say what all takes"),
        flags.METRICS_FILE,
        flags.JSON,
    )
    parser.add_flags("tokenizer", *flags.VAE)
    parser.add_loader_flags()
    parser.add_flags("metrics", *flags.METRICS)
    parser.add_device_flags()
    return parser


def main() -> None:
    parser = make_parser()
    args = parser.parse()
    with figures_on_stdout(args.json) as figures:
        device = dist.init(args.device, args.dist_url, args.dist_on_itp, args.dist_timeout)
        dist.print_main(flags.changed(args, parser))
        figures.update(measure_variants(args, device))
    dist.cleanup()


def measure_variants(args, device: torch.device) -> dict:
    """The figures of all variants, on the main process."""
    check_writable(args.output_dir, "--output_dir")
    metrics_file = MetricsFile(args.metrics_file)
    size, vae_path = value(args, "img_size"), value(args, "vae_path")
    if size < SSIM_LEAST:
        raise UserError(f"--img_size {size}: SSIM needs {SSIM_LEAST} px at least")
    images = choose_images(args.image_dir, args.images_per_class)
    vae, vae_sha256 = build_vae(args), vae_digest(vae_path)
    norm = find_norm(args, vae, vae_sha256)
    variants, level_settings = make_variants(args, vae.channels, norm, vae_sha256, device)
    names = [str(Path(path).relative_to(images.root)) for path, _ in images.samples]
    settings = {name: value(args, name) for name in SETTINGS} | level_settings
    settings |= {"count": len(names), "vae_sha256": vae_sha256, "latent_scale": norm[0]}
    settings |= {"latent_mean": norm[1], "latent_std": norm[2]} if norm[1] else {}
    settings["images_sha256"] = list_digest(names, [label for _, label in images.samples])
    if args.posterior == "sample":
        settings["seed"] = value(args, "seed")
    measure = prepare_measure(args, size, device)
    label = measure and measure.extractor.label
    folder = ReconstructionFolder(Path(args.output_dir), len(names), args.batch_size, label)
    on_bad = "drop" if args.skip_bad_images else "raise"
    dataset = ImageDataset(images.samples, size, on_bad, args.max_image_pixels)
    tokenizer = Tokenizer(vae, *norm).to(device)
    job = Reconstruction(folder, dataset, tokenizer, measure, variants, settings.get("seed"))
    if args.dry_run:
        folder.refuse_other(settings)
        return dry_run(args, device, ("device", "processes"), job.first_batch)
    figures = {}
    folder.begin(settings)
    with settings_saved(args, folder.path / flags.CONFIG):
        job.run(args.num_workers)
        dist.barrier()
        if dist.is_main():
            figures = job.finish(settings | {name: value(args, name) for name in RECORDED})
            every = [(r["name"], *item) for r in figures["results"] for item in r.items()]
            numbers = {f"reconstruction/{n}/{k}": v for n, k, v in every if isinstance(v, float)}
            metrics_file.write(numbers, None, replace=True)
    dist.barrier()
    return figures


def choose_images(image_dir: str, per_class: int) -> ImageList:
    """The first images of each class, in train/CLASS/ or CLASS/, or of a folder without classes."""
    root, flag = Path(image_dir), "--image_dir"
    if root.is_dir() and not any(e.is_dir() for e in root.iterdir() if is_data(e.name)):
        files = list_files(root, flag)
        note = f"--images_per_class {per_class} is how many of its {len(files)} images are taken"
        dist.print_main(f"{flag} {root} has no class folders: {note}")
        return ImageList(root, [""], [(path, 0) for path in files[:per_class]])
    images = list_images(root, "train" if (root / "train").is_dir() else "", flag)
    by_class = groupby(images.samples, key=lambda sample: sample[1])
    chosen = [sample for _, group in by_class for sample in list(group)[:per_class]]
    return ImageList(images.root, images.classes, chosen)


def find_norm(args, vae: kl16.VAE, vae_sha256: str) -> tuple:
    """`TokenBridgeConfig.latent_norm`: as given, as the cache says, or KL-16's."""
    manifest = args.cached_path and open_cache(args.cached_path, None, vae_sha256).manifest
    if known := channel_statistics(args, manifest or None, vae):
        return 1.0, known["latent_mean"], known["latent_std"]
    if args.latent_scale not in (None, "auto"):
        return args.latent_scale, None, None
    if manifest:
        return manifest["latent_scale"], None, None
    if not vae.is_kl16:
        remedy = "--latent_scale, 1 / std of its latents, or a --cached_path of main_cache.py"
        raise UserError(f"--vae_path is not KL-16: give its {remedy}, which knows it")
    return PUBLISHED_LATENT_SCALE, None, None


def make_variants(
    args, channels: int, norm: tuple, vae_sha256: str, device: torch.device
) -> tuple[list[QuantizerVariant], dict]:
    """One for each of --bits, and what decides their levels beside the bits."""
    kind = value(args, "quantizer")
    settings, variants = {"quantizer": kind, "range": args.range}, []
    if kind == "calibrated":
        histogram = cache_histogram(args.cached_path, vae_sha256)
        settings = {"quantizer": kind, "histogram_sha256": histogram.digest()}
    for bits in dict.fromkeys(args.bits):
        if bits < 0:
            variants.append(QuantizerVariant(CONTINUOUS))
            continue
        with as_user_error(f"--bits {bits} --range {args.range}"):
            quantizer = build_quantizer(kind, 2**bits, -args.range, args.range, channels)
        if kind == "calibrated":
            quantizer.set_levels(*calibrated_levels(histogram, 2**bits, norm))
        variants.append(QuantizerVariant(f"{QUANTIZED}{bits}", quantizer.to(device)))
    return variants, settings


@dataclass(frozen=True)
class Reconstruction:
    """noise_seed: None takes posterior means."""

    folder: ReconstructionFolder
    dataset: ImageDataset
    tokenizer: Tokenizer
    measure: Measure | None
    variants: list[QuantizerVariant]
    noise_seed: int | None

    @property
    def names(self) -> list[str]:
        return [ORIGINAL, *(variant.name for variant in self.variants)]

    def run(self, num_workers: int) -> None:
        """This process's share of the batches that some variant lacks."""
        folder, count = self.folder, len(self.folder.batches)
        # as the main process finds them, so that all agree
        missing = dist.gather_objects({name: folder.missing(name) for name in self.names})[0]
        mine = folder.share(set().union(*missing.values()))
        batches = read_batches(self.dataset, [folder.batches[k] for k in mine], num_workers)
        hidden = not (mine and dist.is_main())
        progress = tqdm(batches, desc="reconstructing", total=len(mine), disable=hidden)
        for number, (ids, images) in zip(mine, progress, strict=True):
            dist.beat(f"reconstructing batch {number + 1} of {count}")
            names = [name for name in self.names if number in missing[name]]
            for name, pixels, record in self.decode(images, ids, names):
                if self.measure is not None:
                    folder.features(name).write(number, ids, self.measure.extractor(pixels))
                folder.write(name, number, ids, pixels, record)

    def decode(
        self, images: Tensor, ids: list[int], names: Sequence[str]
    ) -> Iterator[tuple[str, Tensor, dict[str, Tensor]]]:
        """(name, pixels like images, record) of these names. images: uint8 [N, 3, H, W] of ids."""
        latents, original = None, images.to(next(self.tokenizer.parameters()).device)
        variants = {variant.name: variant for variant in self.variants}
        for name in names:
            if name == ORIGINAL or not ids:
                yield name, images, {}
                continue
            if latents is None:
                latents = draw_latents(self.tokenizer, original, ids, self.noise_seed)
            values, record = variants.get(name, QuantizerVariant(name)).apply(latents)
            pixels = to_uint8(self.tokenizer.decode(values))
            record |= {"psnr": psnr(pixels.cpu(), images), "ssim": ssim(pixels, original).cpu()}
            yield name, pixels.cpu(), record

    def first_batch(self) -> dict:
        """One batch through everything, for --dry_run: what the run would take."""
        folder, world = self.folder, dist.world_size()
        todo = len(set().union(*(folder.missing(name) for name in self.names)))
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
        """Write the figures of all variants in the folder and grid.png; returns results.json."""
        folder, measure = self.folder, self.measure
        readable = folder.readable()
        if not readable:
            raise UserError("none of the images can be read; see --image_dir")
        names = list(dict.fromkeys([*self.names[1:], *folder.finished()]))
        results = [summarise(name, folder.records(name)) for name in names]
        if measure is not None:
            self.add_scores(results, measure)
        settings |= {"images": len(readable), "measured": measure.identity() if measure else None}
        write_results(folder.path, settings, results)
        shown = readable[:: -(-len(readable) // GRID_IMAGES)]
        rows = {ORIGINAL: folder.read(ORIGINAL, shown)}
        if CONTINUOUS not in names:  # what the quantizer starts from is always there to compare
            rows[CONTINUOUS] = next(self.decode(rows[ORIGINAL], shown, [CONTINUOUS]))[1]
        for name in sorted(names, key=lambda name: name != CONTINUOUS):
            rows[name] = folder.read(name, shown)
        path = folder.path / "grid.png"
        save_png(grid(torch.cat(list(rows.values())), len(shown)), path)
        print(f"{len(readable)} images, rows of {path}: {', '.join(rows)}")
        for result in results:
            figures = [f"{k} {v:.5g}" for k, v in result.items() if isinstance(v, float)]
            print(f"{result['name']:>10}  " + "  ".join(figures))
        return settings | {"results": results}

    def add_scores(self, results: list[dict], measure: Measure) -> None:
        """Figures of the features, and their distance to those of the crops."""
        extractor, features = measure.extractor, self.folder.features
        warnings, crops = [], None
        distance = "rfid" if extractor.is_inception else "reconstruction_frechet_distance"
        if "fid" in extractor.layers and results[0]["images"] > 1:  # a covariance takes two
            crops = measure.sums(features(ORIGINAL)).moments.statistics()
        for result in results:
            dist.beat(f"measuring {result['name']}")
            sums = measure.sums(features(result["name"]))
            scores = score(sums, measure)
            result |= scores.figures
            if crops is not None:
                result[distance] = frechet(sums.moments.statistics(), crops)
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


cli = partial(dist.run, main)

if __name__ == "__main__":
    cli()
