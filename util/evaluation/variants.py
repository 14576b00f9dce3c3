"""Ways through the quantizer, and what is measured of one batch that went through.

    latents -> quantizer (or none) -> decoder -> pixels
    PSNR and SSIM of each image against its crop, use of the levels, error of the latents
Letters: N images of a batch, C latent channels, h, w positions, K levels.
Source: Wang et al. 2004 (SSIM), by torchmetrics with its defaults: Gaussian window of 11 px, edges
mirrored.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from models.quantizer import CalibratedQuantizer, GaussianQuantizer, entropy, level_counts
from util.data.images import psnr

ORIGINAL, CONTINUOUS, QUANTIZED = "original", "continuous", "bits"
SSIM_LEAST = 6  # pixels a side: 5 of them are mirrored


@dataclass(frozen=True)
class Variant:
    """name: of its folder, "continuous" or "bits6". quantizer: None without one."""

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


def fidelity(pixels: Tensor, original: Tensor) -> dict[str, Tensor]:
    """Of each image against its crop, uint8 [N, 3, H, W]: psnr in dB and ssim, [N] float64."""
    return {"psnr": psnr(pixels.cpu(), original.cpu()), "ssim": ssim(pixels, original).cpu()}


def ssim(pixels: Tensor, original: Tensor) -> Tensor:
    """Structural similarity of uint8 images [N, 3, H, W] on the scale of 0 to 255: [N]."""
    from torchmetrics.functional.image import structural_similarity_index_measure  # slow to import

    kind = pixels.device.type
    precise = torch.float32 if kind == "mps" else torch.float64  # MPS has no doubles
    # A CPU convolves doubles through a copy of the batch for each tap, too large to stay mapped.
    size = 1 if kind == "cpu" else len(pixels)
    parts = zip(pixels.to(precise).split(size), original.to(precise).split(size), strict=True)
    found = [
        structural_similarity_index_measure(*part, data_range=255.0, reduction="none").reshape(-1)
        for part in parts
    ]
    return torch.cat(found)


def summarise(name: str, records: dict[str, Tensor]) -> dict:
    """The figures of a variant. records: what was measured of its batches, one after the other."""
    result = {
        "name": name,
        "bits": -1 if name == CONTINUOUS else int(name.removeprefix(QUANTIZED)),
        "images": len(records["psnr"]),
        "psnr": records["psnr"].double().mean().item(),
        "ssim": records["ssim"].double().mean().item(),
    }
    if "counts" not in records:
        return result
    counts, outside = records["counts"].sum(dim=0), records["outside"].sum(dim=0)
    scalars = counts.sum(dim=1)  # of each channel
    error = records["squared_error"].sum(dim=0) / scalars
    per_channel, shares = entropy(counts), outside / scalars
    used = (counts > 0).sum(dim=1)
    return result | {
        "latent_mse": error.mean().item(),
        "entropy_bits": per_channel.mean().item(),
        "levels_used": used.double().mean().item(),
        "out_of_range_share": shares.double().mean().item(),
        "latent_mse_by_channel": error.tolist(),
        "entropy_bits_by_channel": per_channel.tolist(),
        "levels_used_by_channel": used.tolist(),
        "out_of_range_share_by_channel": shares.tolist(),
    }
