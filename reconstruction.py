"""Measure what quantization costs: reconstruct images through the VAE at several bit widths.

python reconstruction.py --bits 6 --range 5.0 --image_dir IMAGENET
torchrun --nproc_per_node=8 reconstruction.py --bits -1 4 6 8 --image_dir IMAGENET

images -> posterior sample x latent scale -> quantizer -> decoder -> PNG, PSNR, SSIM, FID, IS

A negative number of bits is the continuous VAE, without quantization. Stopped or killed, the same
command goes on where it was, on any number of processes, and more --bits may join later.
Letters: N images, C latent channels, K levels.
"""

from functools import partial
from itertools import groupby
from pathlib import Path

import torch
from torch import nn

from models.config import PUBLISHED_LATENT_SCALE
from models.quantizer import build_quantizer
from models.tokenizers import kl16
from models.tokenizers.tokenizer import Tokenizer
from util import args as flags
from util import dist
from util.args import Flag, Parser, value
from util.data.cache_writer import list_digest
from util.data.images import ImageDataset, reading_flags
from util.data.latent_cache import open_cache
from util.data.listing import ImageList, find_split, is_data, list_files, list_images
from util.doctor import dry_run
from util.errors import UserError, as_user_error
from util.evaluation.folder import ImageFolder
from util.evaluation.reconstruction import Reconstruction, variant_name
from util.evaluation.reference import prepare_measure
from util.files import check_writable
from util.logging import MetricsFile, changed, figures_on_stdout, settings_saved
from util.setup import build_vae, cache_histogram, calibrated_levels, channel_statistics
from util.vae import vae_digest

SSIM_LEAST = 6  # pixels a side: 5 of them are mirrored
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
        dist.print_main(changed(args, parser))
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
    folder = ImageFolder(Path(args.output_dir), len(names), args.batch_size, label)
    dataset = ImageDataset(images.samples, size, **reading_flags(args))
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
    images = list_images(root, "train" if any(find_split(root, "train")) else "", flag)
    samples = sorted(images.samples, key=lambda sample: sample[1])
    by_class = groupby(samples, key=lambda sample: sample[1])
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
) -> tuple[dict[str, nn.Module | None], dict]:
    """One for each of --bits, and what decides their levels beside the bits."""
    kind = value(args, "quantizer")
    settings, variants = {"quantizer": kind, "range": args.range}, {}
    if kind == "calibrated":
        histogram = cache_histogram(args.cached_path, vae_sha256)
        settings = {"quantizer": kind, "histogram_sha256": histogram.digest()}
    for bits in dict.fromkeys(args.bits):
        if bits < 0:
            variants[variant_name(bits)] = None
            continue
        with as_user_error(f"--bits {bits} --range {args.range}"):
            quantizer = build_quantizer(kind, 2**bits, -args.range, args.range, channels)
        if kind == "calibrated":
            quantizer.set_levels(*calibrated_levels(histogram, 2**bits, norm))
        variants[variant_name(bits)] = quantizer.to(device)
    return variants, settings


cli = partial(dist.run, main)

if __name__ == "__main__":
    cli()
