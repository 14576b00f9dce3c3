"""Measure what quantization costs: reconstruct images through the VAE at several bit widths.

python reconstruction.py --bits 6 --range 5.0 --image_dir IMAGENET
torchrun --nproc_per_node=8 reconstruction.py --bits -1 4 6 8 --image_dir IMAGENET

images -> posterior sample x latent scale -> quantizer -> decoder -> PNG, PSNR, FID, IS
A negative number of bits is the continuous VAE, without quantization.
Letters: N images, C latent channels, K levels.
"""

import json
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from models.config import PUBLISHED_LATENT_SCALE
from models.quantizer import GaussianQuantizer
from models.tokenizer import Tokenizer
from models.vae import AutoencoderKL, Posterior
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
    positive_float,
    positive_int,
)
from util.build import build_vae
from util.data import ImageDataset, collate_skipping, list_images
from util.errors import UserError, as_user_error, run
from util.files import atomic_write, check_writable
from util.images import Gallery, grid, psnr, save_png, to_uint8
from util.metrics import ImageFeatures, Inception

ORIGINAL = "original"
GRID_IMAGES = 8
RECORDED = ("image_dir", "images_per_class", "img_size", "vae_path", "range", "posterior", "seed")


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
    group.add_argument(
        "--range", type=positive_float, default=5.0, help="latents in [-range, range]"
    )
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


class Variant:
    """One way through the quantizer, and what is measured of it over this process's images.

    counts: [C, K] use of the levels. outside: [C] latent scalars beyond the range.
    """

    def __init__(
        self,
        name: str,
        inception: Inception | None,
        shown: list[int],
        bits: int = -1,
        quantizer: GaussianQuantizer | None = None,
        channels: int = 0,
    ):
        self.name, self.bits, self.quantizer = name, bits, quantizer
        self.features = ImageFeatures(inception) if inception is not None else None
        self.gallery = Gallery(shown)
        self.images, self.psnr_sum = 0, 0.0
        if quantizer is not None:
            self.counts = torch.zeros(channels, quantizer.levels, dtype=torch.int64)
            self.outside = torch.zeros(channels, dtype=torch.int64)

    def to(self, device: torch.device) -> "Variant":
        if self.quantizer is not None:
            self.quantizer.to(device)
            self.counts, self.outside = self.counts.to(device), self.outside.to(device)
        return self

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
    check_writable(args.output_dir, "--output_dir")
    samples = choose_images(args.image_dir, args.images_per_class)
    vae = build_vae(args)
    scale = known_scale(vae) if args.latent_scale == "auto" else args.latent_scale
    tokenizer = Tokenizer(vae, scale).to(device)
    inception = metrics.prepare(
        args.fid_stats, args.inception_weights, device, wanted=not args.no_metrics
    )
    shown = list(range(0, len(samples), -(-len(samples) // GRID_IMAGES)))
    original = Variant(ORIGINAL, inception, shown)
    variants = [
        quantized(bits, args.range, vae.config["embed_dim"], inception, shown).to(device)
        for bits in dict.fromkeys(args.bits)
    ]
    folder = Path(args.output_dir)
    prepare_folders(folder, [v.name for v in (original, *variants)], len(samples))

    dataset = ImageDataset(samples, args.img_size, "drop" if args.skip_bad_images else "raise")
    noise_seed = args.seed if args.posterior == "sample" else None
    for ids, images in batches(dataset, args.batch_size, args.num_workers):
        latents = draw_latents(tokenizer, images.to(device), ids, noise_seed)
        pixels = to_uint8(images)
        keep(original, folder, ids, pixels, pixels)
        for variant in variants:
            decoded = tokenizer.decode(variant.apply(latents))
            keep(variant, folder, ids, to_uint8(decoded).cpu(), pixels)
    results = [summarise(variant, original.features) for variant in variants]
    images = sum(dist.gather_objects(original.images))
    rows = [variant.gallery.gather() for variant in (original, *variants)]
    if dist.is_main():
        save_png(grid(torch.cat(rows), columns=len(rows[0])), folder / "grid.png")
        settings = {name: getattr(args, name) for name in RECORDED} | {"latent_scale": scale}
        settings |= {"images": images}
        write_results(folder, settings, results)
    dist.barrier()
    dist.cleanup()


def choose_images(image_dir: str, per_class: int) -> list[tuple[str, int]]:
    """(path, label) of the first images of each class, in train/CLASS/ if that is there."""
    inside = (Path(image_dir) / "train").is_dir()
    images = list_images(image_dir, "train" if inside else "", flag="--image_dir")
    by_class = groupby(images.samples, key=lambda sample: sample[1])
    return [s for _, group in by_class for s in list(group)[:per_class]]


def known_scale(vae: AutoencoderKL) -> float:
    if not vae.is_kl16:
        raise UserError(
            "--vae_path is not KL-16: give its --latent_scale, 1 / std of its latents "
            "(main_cache.py measures it and writes it to the cache's manifest.json)"
        )
    return PUBLISHED_LATENT_SCALE


def quantized(
    bits: int, limit: float, channels: int, inception: Inception | None, shown: list[int]
) -> Variant:
    """bits: -1 for none. limit: latents lie in [-limit, limit]."""
    if bits < 0:
        return Variant("continuous", inception, shown)
    with as_user_error(f"--bits {bits} --range {limit}"):
        quantizer = GaussianQuantizer(2**bits, -limit, limit)
    return Variant(f"bits{bits}", inception, shown, bits, quantizer, channels)


def prepare_folders(folder: Path, names: list[str], count: int) -> None:
    """Raise UserError if an earlier, larger run's images would be mixed with this one's."""
    found = (path for name in names for path in (folder / name).glob("*.png"))
    stale = [path for path in found if not path.stem.isdigit() or int(path.stem) >= count]
    if stale:
        raise UserError(
            f"--output_dir {folder} holds images of another run ({stale[0].name}); "
            "remove them or name a new folder"
        )
    dist.barrier()  # nobody writes before everybody has looked
    for name in names:
        (folder / name).mkdir(parents=True, exist_ok=True)


def batches(
    dataset: ImageDataset, batch_size: int, num_workers: int
) -> Iterator[tuple[list[int], Tensor]]:
    """(ids, images [N, 3, H, W]) of this process: whole batches, the same for any process count."""
    starts = range(0, len(dataset), batch_size)[dist.rank() :: dist.world_size()]
    wanted = [list(range(s, min(s + batch_size, len(dataset)))) for s in starts]
    loader = DataLoader(
        dataset, batch_sampler=wanted, num_workers=num_workers, collate_fn=collate_skipping
    )
    progress = tqdm(loader, desc="reconstructing", disable=not dist.is_main())
    for ids, batch in zip(wanted, progress, strict=True):
        if batch is not None:
            yield [i for i in ids if not dataset.bad[i]], batch[0]


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


def keep(variant: Variant, folder: Path, ids: list[int], pixels: Tensor, original: Tensor) -> None:
    """Save and measure one batch. pixels, original: uint8 [N, 3, H, W]."""
    for image_id, image in zip(ids, pixels, strict=True):
        save_png(image, folder / variant.name / f"{image_id:05d}.png")
    variant.images += len(ids)
    variant.psnr_sum += psnr(pixels, original).sum().item()
    variant.gallery.add(ids, pixels)
    if variant.features is not None:
        variant.features.add(ids, pixels)


def summarise(variant: Variant, original: ImageFeatures | None) -> dict:
    """The figures of one variant over all processes' images."""
    parts = dist.gather_objects((variant.psnr_sum, variant.images))
    psnr_sum, images = map(sum, zip(*parts, strict=True))
    if not images:
        raise UserError("none of the images can be read; see --image_dir")
    result = {"name": variant.name, "bits": variant.bits, "psnr": psnr_sum / images}
    if variant.quantizer is not None:
        counts = dist.all_reduce_sum(variant.counts).cpu()
        outside = dist.all_reduce_sum(variant.outside).cpu()
        per_channel = entropy(counts)
        result |= {
            "entropy_bits": per_channel.mean().item(),
            "entropy_bits_by_channel": per_channel.tolist(),
            "levels_used_by_channel": (counts > 0).sum(dim=1).tolist(),
            "out_of_range_share": (outside.sum() / counts.sum()).item(),
        }
    if variant.features is not None:
        result |= variant.features.compute(reference=original)
    return result


def write_results(folder: Path, settings: dict, results: list[dict]) -> None:
    with atomic_write(folder / "results.json") as file:
        file.write(json.dumps(settings | {"results": results}, indent=1).encode())
    names = ", ".join([ORIGINAL, *(result["name"] for result in results)])
    print(f"{settings['images']} images, rows of {folder / 'grid.png'}: {names}")
    for result in results:
        figures = {k: v for k, v in result.items() if isinstance(v, float)}
        print(f"{result['name']:>10}  " + "  ".join(f"{k} {v:.4f}" for k, v in figures.items()))


if __name__ == "__main__":
    run(main)
