"""A photo through the VAE, with and without the quantizer, and how its levels are used.

    read_image -> center_crop -> posterior -> quantizer or none -> decoder -> PSNR, shares
What is computed is what reconstruction.py computes for the first image of a folder.
Letters: S side in pixels, C latent channels, K levels.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from demo.app_models import Loaded
from models.quantizer import SPAN, CalibratedQuantizer, GaussianQuantizer, entropy
from models.tokenizers.tokenizer import Tokenizer
from reconstruction import draw_latents
from util.args import MAX_BITS
from util.data.images import center_crop, read_image
from util.errors import UserError, as_user_error
from util.evaluation.reconstruction import CONTINUOUS, QUANTIZED, QuantizerVariant
from util.images import psnr, to_uint8

MOST_PIXELS = 1024  # a side: a VAE's memory grows with the area
SEED = 1  # of the posterior sample, --seed's default in reconstruction.py


@dataclass(frozen=True)
class Reconstruction:
    """Pixels uint8 [S, S, 3]; PSNR in dB against the original; shares and level values, [K]."""

    original: np.ndarray
    continuous: np.ndarray
    quantized: np.ndarray
    psnr_continuous: float
    psnr_quantized: float
    shares: np.ndarray
    expected: np.ndarray
    values: np.ndarray
    entropy_bits: float
    outside: float
    scalars: int


def read_photo(path: str | None, name: str = "") -> Image.Image:
    """Raises UserError, by the name that the user knows, on anything but a photo."""
    if not path:
        raise UserError("no photo yet: drop one into the field, or click it to choose a file")
    try:
        return read_image(path)
    except UserError as error:
        reason = " ".join(str(error.__cause__ or error).split())[:160].replace(path, "the file")
        raise UserError(
            f"{name or Path(path).name} cannot be read as a photo ({reason}); "
            "drop a JPEG, PNG, WebP, TIFF, GIF or BMP"
        ) from error


def quantizer_for(loaded: Loaded | None, bits: int) -> GaussianQuantizer | CalibratedQuantizer:
    """The model's own at its number of bits; at another one the published levels in its range."""
    if not 1 <= bits <= MAX_BITS:
        raise UserError(f"{bits} bits are not between 1 and {MAX_BITS}")
    if loaded is None:
        return GaussianQuantizer(2**bits)
    config = loaded.model.config
    if config.quant_levels == 2**bits:
        return loaded.model.quantizer
    return GaussianQuantizer(2**bits, config.quant_min, config.quant_max)


def level_edges(quantizer: GaussianQuantizer | CalibratedQuantizer) -> tuple[Tensor, Tensor]:
    """Inner borders [C or 1, K - 1] between levels and the levels [C or 1, K], scaled latents."""
    if isinstance(quantizer, CalibratedQuantizer):
        return quantizer.boundaries[:, 1:-1], quantizer.reconstruction_values
    inner = (quantizer.midpoints + SPAN) / (2 * SPAN)
    edges = inner * (quantizer.high - quantizer.low) + quantizer.low
    values = quantizer.decode(torch.arange(quantizer.levels, device=edges.device))
    return edges[None], values[None]


def gaussian_shares(edges: Tensor) -> Tensor:
    """edges: [C, K - 1] -> share of N(0, 1) between them, beyond the ends too: [C, K] float64."""
    below = torch.special.ndtr(edges.cpu().double())
    ends = torch.zeros(len(edges), 1, dtype=torch.float64)
    return torch.cat([ends, below, ends + 1], dim=1).diff(dim=1)


@torch.no_grad()
def reconstruct(
    photo: Image.Image, tokenizer: Tokenizer, quantizer, size: int, posterior: str = "sample"
) -> Reconstruction:
    """Raises UserError on a size that the VAE cannot take."""
    stride = tokenizer.vae.stride
    if not stride <= size <= MOST_PIXELS or size % stride:
        raise UserError(f"{size} px: choose a multiple of {stride} up to {MOST_PIXELS}")
    with as_user_error("this photo"):
        pixels = np.array(center_crop(photo, size))
    original = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    device = next(tokenizer.parameters()).device
    seed = SEED if posterior == "sample" else None
    latents = draw_latents(tokenizer, original.to(device), [0], seed)
    decoded, quality, record = {}, {}, {}
    variants = (
        (CONTINUOUS, QuantizerVariant(CONTINUOUS)),
        ("", QuantizerVariant(QUANTIZED, quantizer)),
    )
    for name, variant in variants:
        values, record = variant.apply(latents)
        found = to_uint8(tokenizer.decode(values))
        quality[name] = psnr(found.cpu(), original).item()
        decoded[name] = found[0].permute(1, 2, 0).cpu().numpy()
    edges, values = level_edges(quantizer)
    counts = record["counts"][0]
    return Reconstruction(
        original=pixels,
        continuous=decoded[CONTINUOUS],
        quantized=decoded[""],
        psnr_continuous=quality[CONTINUOUS],
        psnr_quantized=quality[""],
        shares=(counts.sum(dim=0) / counts.sum()).double().numpy(),
        expected=gaussian_shares(edges).mean(dim=0).numpy(),
        values=values.cpu().double().mean(dim=0).numpy(),
        entropy_bits=entropy(counts).mean().item(),
        outside=(record["outside"].sum() / counts.sum()).item(),
        scalars=int(counts.sum()),
    )
