"""What JPEG's draft mode would save, and what it would change: pixels, latents, indices.

python -m benchmarks.images [--data_path FOLDER --vae_path VAE --img_size 256] [--page FILE]

A JPEG can be decoded at 1/2, 1/4 or 1/8 of its size, by leaving frequencies out, where
`center_crop` halves the whole image with a box filter. Compared are both, and the draft for all
halvings but the last. Without --data_path the images are made here: discs that hide each other, of
sizes and colours as in photographs (dead leaves), slightly blurred, with a sensor's noise.
Without --vae_path the VAE is of KL-16's shape, narrow and of random weights.
"""

import argparse
import io
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import mean

import numpy as np
import PIL
import torch
from PIL import Image, ImageDraw, ImageFilter
from torch import Tensor

from benchmarks.loaders import JPEG_QUALITY
from benchmarks.tables import row_of
from models.quantizer import GaussianQuantizer
from models.tokenizers.kl16 import KL16, AutoencoderKL
from models.tokenizers.tokenizer import Tokenizer
from util.args import positive_int
from util.data.images import center_crop, read_image
from util.data.statistics import LatentStats
from util.device import resolve_device
from util.dist import run
from util.errors import UserError
from util.page import check_place, write_between
from util.parser import Parser
from util.provenance import environment
from util.vae import load_vae

MARK = "benchmarks.images"  # of the place in a page
SIZES = ((500, 375), (1024, 768), (2048, 1536), (4032, 3024))  # ImageNet's usual one ... a phone's
DISCS, SMALLEST, LARGEST = 1500, 0.005, 0.3  # of an image; radii by its height
BLUR, NOISE = 0.7, 3.0  # pixels, grey levels
REPEATS = 3  # decodings of an image, the fastest of which counts
LEVELS = 64
WAYS = ("box", "draft, all halvings", "draft, all but the last")
FIRST, *OTHERS = WAYS
HEAD = (
    "image",
    "decoded by",
    "ms an image",
    "most levels off",
    "mean",
    "PSNR",
    "latents off, of their std",
    "indices changed",
)


def make_parser() -> Parser:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--data_path", type=Path, help="JPEG images to take instead, in any subfolders")
    add("--vae_path", help="a trained VAE [a narrow one of random weights]")
    add("--img_size", type=positive_int, default=256, help="pixels, after the crop")
    add("--images", type=positive_int, default=4, help="of each size, or at most of --data_path")
    add("--page", type=Path, help="Markdown file to write the table into")
    return parser


def dead_leaves(width: int, height: int, rng: np.random.Generator) -> bytes:
    """A JPEG. Radii r have the density r^-3, at which every scale shows as much."""
    image = Image.new("RGB", (width, height))
    draw = ImageDraw.Draw(image)
    share = rng.random(DISCS)
    radii = height * (SMALLEST**-2 + share * (LARGEST**-2 - SMALLEST**-2)) ** -0.5
    centres = rng.random((DISCS, 2)) * (width, height)
    colours = rng.integers(0, 256, (DISCS, 3))
    for (x, y), r, colour in zip(centres, radii, colours, strict=True):
        draw.ellipse((x - r, y - r, x + r, y + r), fill=tuple(colour.tolist()))
    pixels = np.asarray(image.filter(ImageFilter.GaussianBlur(BLUR)), np.float32)
    pixels = (pixels + rng.normal(0, NOISE, pixels.shape)).clip(0, 255)
    file = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(file, "JPEG", quality=JPEG_QUALITY)
    return file.getvalue()


def made(count: int) -> Iterator[tuple[str, list[bytes]]]:
    rng = np.random.default_rng(0)
    for width, height in SIZES:
        yield f"{width} x {height}", [dead_leaves(width, height, rng) for _ in range(count)]


def found(folder: Path, count: int) -> Iterator[tuple[str, list[bytes]]]:
    paths = [p for p in sorted(folder.rglob("*")) if p.suffix.lower() in (".jpg", ".jpeg")]
    if not paths:
        raise UserError(f"--data_path {folder} holds no .jpg or .jpeg")
    chosen = paths[:: -(-len(paths) // count)]
    for path in chosen:
        read_image(path)  # says what is wrong with it
    yield f"{len(chosen)} of {folder.name}", [path.read_bytes() for path in chosen]


def decoded(content: bytes, way: str, size: int) -> Image.Image:
    """The crop [size, size] of a JPEG."""
    with Image.open(io.BytesIO(content)) as image:
        if way != FIRST:
            halvings = (min(image.size) // size).bit_length() - 1
            halvings = max(0, halvings - (way == OTHERS[1]))
            image.draft("RGB", (image.width >> halvings, image.height >> halvings))
        return center_crop(image.convert("RGB"), size)


def seconds(content: bytes, way: str, size: int) -> float:
    taken = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        decoded(content, way, size)
        taken.append(time.perf_counter() - began)
    return min(taken)


class Judge:
    """Latents and indices of crops. The latents' scale is that of the first ones it is given."""

    def __init__(self, vae_path: str | None, device: torch.device):
        torch.manual_seed(0)
        narrow = {**KL16, "ch": 32, "num_res_blocks": 1}
        vae = load_vae(vae_path) if vae_path else AutoencoderKL(**narrow)
        self.tokenizer, self.device = Tokenizer(vae, 1.0).to(device), device
        self.quantizer = GaussianQuantizer(LEVELS)

    def latents(self, crops: np.ndarray) -> Tensor:
        """crops: uint8 [N, S, S, 3] -> posterior means [N, C, h, w] of unit standard deviation."""
        images = torch.from_numpy(crops).permute(0, 3, 1, 2).to(self.device)
        parts = [self.tokenizer.posterior(image[None]).parameters.cpu() for image in images]
        moments = torch.cat(parts)
        if self.tokenizer.latent_scale == 1.0:
            self.tokenizer.latent_scale = LatentStats.of(moments).latent_scale()
        return moments.chunk(2, dim=1)[0] * self.tokenizer.latent_scale

    def changed(self, latents: Tensor, expected: Tensor) -> float:
        """Share of indices."""
        found = self.quantizer.encode(latents) != self.quantizer.encode(expected)
        return found.double().mean().item()


def row(name: str, files: list[bytes], size: int, judge: Judge) -> Iterator[list[str]]:
    """A line of the table for each way; and for what rounding latents to float16 changes."""
    crops = {w: np.stack([np.asarray(decoded(f, w, size)) for f in files]) for w in WAYS}
    latents = {way: judge.latents(crops[way]) for way in WAYS}
    expected = latents[FIRST]
    half = judge.changed(expected.half().float(), expected)
    for way in WAYS:
        difference = np.abs(crops[way].astype(np.int16) - crops[FIRST])
        power = np.square(difference, dtype=np.float64).mean()
        psnr = f"{10 * np.log10(255**2 / power):.1f} dB" if power else "the same"
        off = (latents[way] - expected).square().mean().sqrt().item()
        changed = judge.changed(latents[way], expected)
        text = f"{changed:.1%}" if way != FIRST else f"{half:.2%} by float16"
        yield [
            name,
            way,
            f"{1000 * mean(seconds(file, way, size) for file in files):.1f}",
            f"{difference.max()}",
            f"{difference.mean():.2f}",
            psnr,
            f"{off:.3f}",
            text,
        ]


def conditions(args: argparse.Namespace, device: torch.device) -> str:
    where = environment(device, "fp32", 1)
    return (
        f"{args.images} images each, cropped to {args.img_size} px; the fastest of {REPEATS} "
        f"decodings of each in one thread; {LEVELS} levels, "
        f"{args.vae_path or 'a narrow VAE of random weights'}. {where['processor']}, "
        f"{where['system']}, Python {where['Python']}, Pillow {PIL.__version__}, torch "
        f"{where['torch']}, git {where['git revision'][:12]}."
    )


def main() -> None:
    args = make_parser().parse()
    if args.page:
        check_place(args.page, MARK)
    device = resolve_device("cuda", quiet=True)
    judge = Judge(args.vae_path, device)
    stride = judge.tokenizer.vae.stride
    if args.img_size % stride:
        raise UserError(
            f"--img_size {args.img_size} is not a multiple of the VAE's stride {stride}"
        )
    groups = found(args.data_path, args.images) if args.data_path else made(args.images)
    lines = [row_of(HEAD), "|" + "---|" * len(HEAD)]
    for name, files in groups:
        for cells in row(name, files, args.img_size, judge):
            lines.append(row_of(cells))
            print(lines[-1], flush=True)
    lines += ["", conditions(args, device), ""]
    if args.page:
        write_between(args.page, MARK, lines)


if __name__ == "__main__":
    run(main)
