"""Measure what quantization costs: reconstruct images through the VAE at several bit widths.

python reconstruction.py --bits 6 --range 5.0 --image_dir IMAGENET
torchrun --nproc_per_node=8 reconstruction.py --bits -1 4 6 8 --image_dir IMAGENET

images -> posterior sample x latent scale -> quantizer -> decoder -> PNG, PSNR, FID, IS
A negative number of bits is the continuous VAE, without quantization.
Letters: N images, C latent channels, K levels.
"""

import json
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from models.config import PUBLISHED_LATENT_SCALE
from models.quantizer import GaussianQuantizer
from models.tokenizer import Tokenizer
from models.vae import Posterior
from util import dist, metrics
from util.args import (
    Parser,
    add_device_flags,
    add_distributed_flags,
    add_loader_flags,
    add_metric_flags,
    add_vae_flags,
    bit_width_or_continuous,
    latent_scale,
    positive_int,
)
from util.build import build_vae
from util.data import ImageDataset, list_images
from util.errors import UserError, as_user_error, run
from util.files import atomic_write
from util.images import Gallery, grid, psnr, save_png, to_uint8
from util.metrics import ImageFeatures, Inception

ORIGINAL = "original"
GRID_IMAGES = 8


def make_parser() -> Parser:
    parser = Parser(__doc__.splitlines()[0])
    group = parser.add_argument_group("reconstruction")
    group.add_argument("--image_dir", default="./data/imagenet", help="train/CLASS/ or CLASS/")
    group.add_argument("--output_dir", default="quantization_results", help="images and results")
    group.add_argument(
        "--bits",
        type=bit_width_or_continuous,
        nargs="+",
        default=[6],
        help="a latent scalar; negative: not quantized",
    )
    group.add_argument("--range", type=float, default=5.0, help="latents in [-range, range]")
    group.add_argument("--images_per_class", type=positive_int, default=50, help="the first ones")
    group.add_argument("--batch_size", type=positive_int, default=32, help="a process")
    group.add_argument(
        "--posterior", choices=("sample", "mode"), default="sample", help="the latent taken"
    )
    group.add_argument(
        "--latent_scale", type=latent_scale, default="auto", help="1 / std; auto: KL-16's"
    )
    add_vae_flags(parser)
    add_loader_flags(parser)
    add_metric_flags(parser)
    add_device_flags(parser)
    add_distributed_flags(parser)
    return parser


@dataclass
class Variant:
    """One way through the quantizer, and what is measured of it over this process's images.

    counts: [C, K] use of the levels. outside: [C] latent scalars beyond the range.
    """

    bits: int
    quantizer: GaussianQuantizer | None
    features: ImageFeatures | None
    gallery: Gallery
    counts: Tensor | None = None
    outside: Tensor | None = None
    psnr_sum: float = 0.0

    @property
    def name(self) -> str:
        return "continuous" if self.quantizer is None else f"bits{self.bits}"

    def apply(self, latents: Tensor) -> Tensor:
        """latents: [N, C, h, w] scaled -> what the decoder gets, its levels counted."""
        if self.quantizer is None:
            return latents
        indices = self.quantizer.encode(latents)
        self.counts += level_counts(indices, self.quantizer.levels)
        self.outside += (latents.abs() > self.quantizer.high).sum(dim=(0, 2, 3))
        return self.quantizer.decode(indices)


def level_counts(indices: Tensor, levels: int) -> Tensor:
    """indices: [N, C, h, w] -> how often each channel takes each level: [C, K] int64."""
    channels = indices.shape[1]
    offsets = torch.arange(channels, device=indices.device)[:, None, None] * levels
    counts = torch.bincount((indices + offsets).flatten(), minlength=channels * levels)
    return counts.reshape(channels, levels)


def entropy(counts: Tensor) -> Tensor:
    """counts: [C, K] -> entropy of each channel's levels in bits: [C]."""
    p = counts.double() / counts.sum(dim=1, keepdim=True)
    return -torch.special.xlogy(p, p).sum(dim=1) / torch.log(torch.tensor(2.0).double())


def main() -> None:
    args = make_parser().parse()
    device = dist.init(args.device, args.dist_url, args.dist_on_itp)
    samples = choose_images(args)
    vae = build_vae(args)
    tokenizer = Tokenizer(vae, choose_scale(args, vae)).to(device)
    inception = metrics.prepare(args.fid_stats, args.inception_weights, device)
    shown = list(range(0, len(samples), -(-len(samples) // GRID_IMAGES)))
    variants = make_variants(args, vae.config["embed_dim"], inception, shown, device)
    original = Variant(0, None, new_features(inception), Gallery(shown))
    folder = Path(args.output_dir)
    prepare_folders(folder, [ORIGINAL, *(v.name for v in variants)], len(samples))

    dataset = ImageDataset(samples, args.img_size, "next" if args.skip_bad_images else "raise")
    for ids, images in batches(dataset, args):
        latents = draw_latents(tokenizer, images.to(device), ids, args)
        pixels = to_uint8(images)
        keep(original, folder / ORIGINAL, ids, pixels)
        for variant in variants:
            decoded = to_uint8(tokenizer.decode(variant.apply(latents))).cpu()
            variant.psnr_sum += psnr(decoded, pixels).sum().item()
            keep(variant, folder / variant.name, ids, decoded)
    results = [summarise(variant, len(samples), original.features) for variant in variants]
    rows = torch.cat([variant.gallery.gather() for variant in (original, *variants)])
    if dist.is_main():
        save_png(grid(rows, columns=len(shown)), folder / "grid.png")
        write_results(folder, args, tokenizer.latent_scale, samples, results)
    dist.barrier()
    dist.cleanup()


def choose_images(args) -> list[tuple[str, int]]:
    """(path, label) of the first `images_per_class` images of each class."""
    inside = (Path(args.image_dir) / "train").is_dir()
    images = list_images(args.image_dir, "train" if inside else "", flag="--image_dir")
    by_class = groupby(images.samples, key=lambda sample: sample[1])
    return [s for _, group in by_class for s in list(group)[: args.images_per_class]]


def choose_scale(args, vae) -> float:
    if args.latent_scale != "auto":
        return args.latent_scale
    if not vae.is_kl16:
        raise UserError(
            f"--vae_path {args.vae_path} is not KL-16: give its --latent_scale, 1 / std of its "
            "latents (main_cache.py measures it and writes it to the cache's manifest.json)"
        )
    return PUBLISHED_LATENT_SCALE


def new_features(inception: Inception | None) -> ImageFeatures | None:
    return ImageFeatures(inception) if inception is not None else None


def make_variants(args, channels: int, inception, shown: list[int], device) -> list[Variant]:
    variants = []
    for bits in dict.fromkeys(args.bits):
        variant = Variant(bits, None, new_features(inception), Gallery(shown))
        if bits > 0:
            with as_user_error(f"--bits {bits} --range {args.range}"):
                variant.quantizer = GaussianQuantizer(2**bits, -args.range, args.range).to(device)
            variant.counts = torch.zeros(channels, 2**bits, dtype=torch.int64, device=device)
            variant.outside = torch.zeros(channels, dtype=torch.int64, device=device)
        variants.append(variant)
    return variants


def prepare_folders(folder: Path, names: list[str], count: int) -> None:
    """Raise UserError if an earlier, larger run's images would be mixed with this one's."""
    stale = [
        path
        for name in names
        for path in (folder / name).glob("*.png")
        if path.stem >= f"{count:05d}"
    ]
    if stale:
        raise UserError(
            f"--output_dir {folder} holds images of another run ({stale[0].name}); "
            "remove them or name a new folder"
        )
    for name in names:
        (folder / name).mkdir(parents=True, exist_ok=True)
    dist.barrier()


def batches(dataset: ImageDataset, args):
    """(ids, images [N, 3, H, W]) of this process: whole batches, the same for any process count."""
    starts = range(0, len(dataset), args.batch_size)[dist.rank() :: dist.world_size()]
    ids = [list(range(s, min(s + args.batch_size, len(dataset)))) for s in starts]
    loader = DataLoader(dataset, batch_sampler=ids, num_workers=args.num_workers)
    progress = tqdm(loader, desc="reconstructing", disable=not dist.is_main())
    return zip(ids, (images for images, _ in progress), strict=True)


def draw_latents(tokenizer: Tokenizer, images: Tensor, ids: list[int], args) -> Tensor:
    """Scaled latents [N, C, h, w]; the noise of image i is a function of (seed, i) alone."""
    posterior = tokenizer.posterior(images)
    if args.posterior == "mode":
        return tokenizer.mode(posterior)
    drawn = []
    for image_id, parameters in zip(ids, posterior.parameters, strict=True):
        generator = torch.Generator(images.device).manual_seed(args.seed * 2**32 + image_id)
        drawn.append(tokenizer.sample(Posterior(parameters[None]), generator))
    return torch.cat(drawn)


def keep(variant: Variant, folder: Path, ids: list[int], pixels: Tensor) -> None:
    """Save and measure one batch. pixels: uint8 [N, 3, H, W]."""
    for image_id, image in zip(ids, pixels, strict=True):
        save_png(image, folder / f"{image_id:05d}.png")
    variant.gallery.add(ids, pixels)
    if variant.features is not None:
        variant.features.add(ids, pixels)


def summarise(variant: Variant, count: int, original: ImageFeatures | None) -> dict:
    """The figures of one variant over all processes' images."""
    psnr_sum = dist.all_reduce_sum(torch.tensor(variant.psnr_sum, dtype=torch.float64))
    result = {"name": variant.name, "bits": variant.bits, "psnr": psnr_sum.item() / count}
    if variant.quantizer is not None:
        counts = dist.all_reduce_sum(variant.counts)
        per_channel = entropy(counts)
        result["entropy_bits"] = per_channel.mean().item()
        result["entropy_bits_by_channel"] = per_channel.tolist()
        result["levels_used_by_channel"] = (counts > 0).sum(dim=1).tolist()
        outside = dist.all_reduce_sum(variant.outside)
        result["out_of_range_share"] = (outside.sum() / counts.sum()).item()
    if variant.features is not None:
        result |= variant.features.compute(reference=original)
    return result


def write_results(folder: Path, args, scale: float, samples, results: list[dict]) -> None:
    record = {
        "images": len(samples),
        "image_dir": args.image_dir,
        "range": args.range,
        "posterior": args.posterior,
        "seed": args.seed,
        "latent_scale": scale,
        "results": results,
    }
    with atomic_write(folder / "results.json") as file:
        file.write(json.dumps(record, indent=1).encode())
    names = ", ".join([ORIGINAL, *(result["name"] for result in results)])
    print(f"{len(samples)} images, rows of {folder / 'grid.png'}: {names}")
    for result in results:
        figures = {k: v for k, v in result.items() if isinstance(v, float)}
        print(f"{result['name']:>10}  " + "  ".join(f"{k} {v:.4f}" for k, v in figures.items()))


if __name__ == "__main__":
    run(main)
