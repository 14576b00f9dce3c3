"""Measure what quantization costs: reconstruct images through the VAE at several bit widths.

python reconstruction.py --bits 6 --range 5.0 --image_dir IMAGENET
torchrun --nproc_per_node=8 reconstruction.py --bits -1 4 6 8 --image_dir IMAGENET

images -> posterior sample x latent scale -> quantizer -> decoder -> PNG, PSNR, SSIM, FID, IS

A negative number of bits is the continuous VAE, without quantization. Stopped or killed, the same
command goes on where it was, on any number of processes, and more --bits may join later.
Letters: N images, C latent channels, K levels.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from models.config import PUBLISHED_LATENT_SCALE
from models.generate import to_uint8
from models.quantizer import build_quantizer
from models.tokenizers.kl16 import VAE, Posterior
from models.tokenizers.tokenizer import Tokenizer
from util import config_file, dist, stop
from util.args import (
    add_device_flags,
    add_distributed_flags,
    add_loader_flags,
    add_metric_flags,
    add_output_flags,
    add_quantizer_flag,
    add_vae_flags,
    bit_width_or_continuous,
    latent_scale,
    positive_float,
    positive_int,
)
from util.build import build_vae, cache_histogram, calibrated_levels
from util.config_file import CONFIG
from util.data.cache_writer import list_digest
from util.data.images import ImageDataset, collate_skipping
from util.data.latent_cache import open_cache
from util.data.listing import ImageList, list_files, list_images, visible
from util.dry_reconstruction import rehearse
from util.errors import UserError, as_user_error, run
from util.evaluation import metrics
from util.evaluation.metrics import Measure, frechet, score, statistics
from util.evaluation.reconstruction_folder import ReconstructionFolder
from util.evaluation.reconstruction_report import as_scalars, tell, write_grid, write_results
from util.evaluation.variants import (
    CONTINUOUS,
    ORIGINAL,
    QUANTIZED,
    SSIM_LEAST,
    Variant,
    fidelity,
    summarise,
)
from util.files import check_writable
from util.json_output import figures_on_stdout
from util.metrics_file import MetricsFile
from util.parser import Parser
from util.vae_files import vae_digest

GRID_IMAGES = 8
RECORDED = ("image_dir", "images_per_class", "vae_path")  # for the reader of results.json alone
# What decides the images, beside the list of them and the VAE.
SETTINGS = ("img_size", "posterior", "batch_size")


def make_parser() -> Parser:
    parser = Parser(__doc__)
    group = parser.add_argument_group("reconstruction")
    group.add_argument(
        "--image_dir", default="./data/imagenet", metavar="FOLDER", help="train/CLASS/ or CLASS/"
    )
    group.add_argument(
        "--output_dir", default="quantization_results", metavar="FOLDER", help="images and results"
    )
    group.add_argument(
        "--bits",
        type=bit_width_or_continuous,
        nargs="+",
        default=[6],
        metavar="N",
        help="a latent scalar; negative: not quantized",
    )
    group.add_argument(
        "--range", type=positive_float, default=5.0, help="latents in [-range, range]"
    )
    add_quantizer_flag(group)
    group.add_argument(
        "--images_per_class", type=positive_int, default=50, help="of each class, the first"
    )
    group.add_argument("--batch_size", type=positive_int, default=32, help="images a batch")
    group.add_argument(
        "--posterior", choices=("sample", "mode"), default="sample", help="the latent taken"
    )
    group.add_argument(
        "--latent_scale",
        type=latent_scale,
        default="auto",
        metavar="X",
        help="1 / std of the latents; auto: the one of --cached_path, or KL-16's",
    )
    group.add_argument(
        "--cached_path",
        default="",
        metavar="FOLDER",
        help="a cache of main_cache.py's, for scale and levels",
    )
    group.add_argument(
        "--dry_run",
        action="store_true",
        help="check everything, reconstruct one batch, say what the run would take, and stop",
    )
    add_output_flags(group)
    add_vae_flags(parser)
    add_loader_flags(parser)
    add_metric_flags(parser)
    add_device_flags(parser)
    add_distributed_flags(parser)
    return parser


def main() -> None:
    parser = make_parser()
    args = parser.parse()
    with figures_on_stdout(args.json) as figures:
        device = dist.init(args.device, args.dist_url, args.dist_on_itp, args.dist_timeout)
        dist.print_main(config_file.changed(args, parser))
        figures.update(measure_variants(args, device))
    dist.cleanup()


def measure_variants(args, device: torch.device) -> dict:
    """Reconstruct and measure as the flags say; the figures, on the main process."""
    check_writable(args.output_dir, "--output_dir")
    metrics_file = MetricsFile(args.metrics_file)
    if args.img_size < SSIM_LEAST:
        raise UserError(f"--img_size {args.img_size}: SSIM needs {SSIM_LEAST} px at least")
    images = choose_images(args.image_dir, args.images_per_class)
    vae = build_vae(args)
    vae_sha256 = vae_digest(args.vae_path)
    scale = find_scale(args, vae, vae_sha256)
    tokenizer = Tokenizer(vae, scale).to(device)
    variants, level_settings = make_variants(args, vae.channels, scale, vae_sha256)
    measure = metrics.prepare_by_flags(args, args.img_size, device)
    folder = ReconstructionFolder(
        Path(args.output_dir),
        len(images.samples),
        args.batch_size,
        measure.extractor.label if measure is not None else None,
    )
    settings = image_settings(args, images, vae_sha256, scale) | level_settings
    for variant in variants:
        if variant.quantizer is not None:
            variant.quantizer.to(device)
    on_bad = "drop" if args.skip_bad_images else "raise"
    dataset = ImageDataset(images.samples, args.img_size, on_bad, args.max_image_pixels)
    noise_seed = args.seed if args.posterior == "sample" else None
    work = Work(folder, dataset, tokenizer, variants, measure, noise_seed)
    names = [ORIGINAL, *(variant.name for variant in variants)]
    if args.dry_run:
        folder.refuse_other(settings)
        return rehearse(folder, dataset, names, partial(decode_and_measure, work, names), device)
    folder.claim(settings, names)
    figures = {}
    with config_file.saved(args, folder.path / CONFIG):
        reconstruct(work, args.num_workers)
        dist.barrier()
        if dist.is_main():
            figures = finish(work, settings | {name: getattr(args, name) for name in RECORDED})
            metrics_file.write(as_scalars(figures["results"]), None, replace=True)
    dist.barrier()
    return figures


def choose_images(image_dir: str, per_class: int) -> ImageList:
    """The first images of each class, in train/CLASS/ if that is there, or of a folder without."""
    root, flag = Path(image_dir), "--image_dir"
    if root.is_dir() and not any(entry.is_dir() for entry in visible(root)):
        files = list_files(root, flag)
        dist.print_main(
            f"{flag} {root} has no class folders: --images_per_class {per_class} is how many of "
            f"its {len(files)} images are taken"
        )
        return ImageList(root, [""], [(path, 0) for path in files[:per_class]])
    images = list_images(root, "train" if (root / "train").is_dir() else "", flag)
    by_class = groupby(images.samples, key=lambda sample: sample[1])
    chosen = [sample for _, group in by_class for sample in list(group)[:per_class]]
    return ImageList(images.root, images.classes, chosen)


def find_scale(args, vae: VAE, vae_sha256: str) -> float:
    """Of the latents: as given, as the cache says, or KL-16's."""
    if args.latent_scale != "auto":
        return args.latent_scale
    manifest = open_cache(args.cached_path, None, vae_sha256).manifest if args.cached_path else None
    if manifest is not None:
        return manifest["latent_scale"]
    if not vae.is_kl16:
        raise UserError(
            "--vae_path is not KL-16: give its --latent_scale, 1 / std of its latents, or the "
            "--cached_path of a cache whose manifest.json has it (main_cache.py measures it)"
        )
    return PUBLISHED_LATENT_SCALE


def make_variants(args, channels: int, scale: float, vae_sha256: str) -> tuple[list[Variant], dict]:
    """One for each of --bits, and what decides their levels beside the bits, as plain values."""
    levels_of, settings = None, {"quantizer": args.quantizer, "range": args.range}
    if args.quantizer == "calibrated":
        histogram = cache_histogram(args.cached_path, channels, vae_sha256)
        levels_of = partial(calibrated_levels, histogram, scale=scale)
        settings = {"quantizer": args.quantizer, "histogram_sha256": histogram.digest()}
    variants = []
    for bits in dict.fromkeys(args.bits):
        if bits < 0:
            variants.append(Variant(CONTINUOUS))
            continue
        with as_user_error(f"--bits {bits} --range {args.range}"):
            quantizer = build_quantizer(args.quantizer, 2**bits, -args.range, args.range, channels)
        if levels_of is not None:
            quantizer.set_levels(*levels_of(2**bits))
        variants.append(Variant(f"{QUANTIZED}{bits}", quantizer))
    return variants, settings


def image_settings(args, images: ImageList, vae_sha256: str, scale: float) -> dict:
    """All that decides the images beside their levels, as plain values."""
    names = [str(Path(path).relative_to(images.root)) for path, _ in images.samples]
    settings = {name: getattr(args, name) for name in SETTINGS}
    settings |= {
        "count": len(names),
        "images_sha256": list_digest(names, [label for _, label in images.samples]),
        "vae_sha256": vae_sha256,
        "latent_scale": scale,
    }
    return settings | ({"seed": args.seed} if args.posterior == "sample" else {})


@dataclass(frozen=True)
class Work:
    """What is reconstructed, how, and where it goes. noise_seed: None takes posterior means."""

    folder: ReconstructionFolder
    dataset: ImageDataset
    tokenizer: Tokenizer
    variants: list[Variant]
    measure: Measure | None
    noise_seed: int | None


def reconstruct(work: Work, num_workers: int) -> None:
    """This process's share of the batches that some variant lacks."""
    folder, dataset, measure = work.folder, work.dataset, work.measure
    names = [ORIGINAL, *(variant.name for variant in work.variants)]
    # As the main process sees them, so that all agree.
    missing = dist.gather_objects({name: folder.missing(name) for name in names})[0]
    wanted = sorted(set().union(*missing.values()))
    if len(wanted) < len(folder.batches):
        done = len(folder.batches) - len(wanted)
        dist.print_main(f"{folder.path}: {done} of {len(folder.batches)} batches are there already")
    mine = wanted[dist.rank() :: dist.world_size()]
    loader = DataLoader(
        dataset,
        batch_sampler=[list(folder.batches[number]) for number in mine],
        num_workers=num_workers,
        collate_fn=collate_skipping,
        worker_init_fn=stop.ignore_in_worker,
    )
    progress = tqdm(loader, desc="reconstructing", disable=not (mine and dist.is_main()))
    for number, batch in zip(mine, progress, strict=True):
        dist.beat(f"reconstructing batch {number + 1} of {len(folder.batches)}")
        lacking = [name for name in names if number in missing[name]]
        ids = [i for i in folder.batches[number] if not dataset.bad[i]]
        if batch is None:  # none of its images can be read
            for name in lacking:
                folder.write(name, number, [], torch.empty(0), {}, {})
            continue
        decoded = decode_batch(work, work.variants, lacking, batch[0], ids)
        for name, pixels, record in decoded:
            features = measure.extractor(pixels) if measure is not None else {}
            folder.write(name, number, ids, pixels, record, features)


def decode_batch(
    work: Work, variants: list[Variant], lacking: list[str], images: Tensor, ids: list[int]
) -> Iterator[tuple[str, Tensor, dict[str, Tensor]]]:
    """(name, pixels uint8 [N, 3, H, W], record) of the crops and variants that are lacking.

    images: uint8 [N, 3, H, W], numbered by ids.
    """
    if ORIGINAL in lacking:
        yield ORIGINAL, images, {}
    wanted = [variant for variant in variants if variant.name in lacking]
    if not wanted:
        return
    device = next(work.tokenizer.parameters()).device
    original = images.to(device)
    latents = draw_latents(work.tokenizer, original, ids, work.noise_seed)
    for variant in wanted:
        values, record = variant.apply(latents)
        pixels = to_uint8(work.tokenizer.decode(values))
        record |= fidelity(pixels, original)
        yield variant.name, pixels.cpu(), record


def decode_and_measure(
    work: Work, names: list[str], images: Tensor, ids: list[int]
) -> list[Tensor]:
    """The pixels of all of names, whose features are computed too."""
    pixels = [found for _, found, _ in decode_batch(work, work.variants, names, images, ids)]
    for found in pixels if work.measure is not None else []:
        work.measure.extractor(found)
    return pixels


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


def finish(work: Work, settings: dict) -> dict:
    """Figures of all variants in the folder and a look at a few images; on the main process.

    Returns what results.json holds.
    """
    folder, measure = work.folder, work.measure
    kept = folder.kept(ORIGINAL)
    if not kept:
        raise UserError("none of the images can be read; see --image_dir")
    asked = [variant.name for variant in work.variants]
    names = asked + [name for name in folder.variants() if name not in asked]
    results = measured(folder, names, measure)
    settings |= {"images": len(kept), "measured": measure.identity() if measure else None}
    write_results(folder.path, settings, results)
    shown = kept[:: -(-len(kept) // GRID_IMAGES)]
    rows = {name: folder.read_images(name, shown) for name in (ORIGINAL, *names)}
    if CONTINUOUS not in rows:  # what the quantizer starts from is always there to compare
        images, plain = torch.stack([work.dataset[i][0] for i in shown]), Variant(CONTINUOUS)
        decoded = decode_batch(work, [plain], [CONTINUOUS], images, shown)
        rows[CONTINUOUS] = next(decoded)[1]
    order = [ORIGINAL, CONTINUOUS, *(name for name in names if name != CONTINUOUS)]
    write_grid(folder.path, [rows[name] for name in order])
    tell(folder.path, len(kept), order, results)
    return settings | {"results": results}


def measured(folder: ReconstructionFolder, names: list[str], measure: Measure | None) -> list[dict]:
    """The figures of each variant, those of the features included where there are any."""
    results = [summarise(name, folder.records(name).load(folder.batches)) for name in names]
    if measure is None:
        return results
    layer, crops, warnings = measure.extractor.layers.get("fid"), None, []
    if layer is not None and results[0]["images"] > 1:  # a covariance takes two
        crops = statistics(folder.features(ORIGINAL).load(folder.batches)[layer])
    for result in results:
        dist.beat(f"measuring {result['name']}")
        features = folder.features(result["name"]).load(folder.batches)
        scores = score(features, measure)
        result |= scores.figures
        if crops is not None:
            name = "rfid" if measure.extractor.is_inception else "reconstruction_frechet_distance"
            result[name] = frechet(statistics(features[layer]), crops)
        warnings += scores.warnings
    for warning in dict.fromkeys(warnings):
        print(f"warning: {warning}", file=sys.stderr, flush=True)
    return results


cli = partial(run, main)

if __name__ == "__main__":
    cli()
