"""Train a small KL VAE, or one with a codebook, of the project's own classes on a folder of images.

KL: loss = mean |decode(sample) - image| + kl_weight * mean KL per latent scalar
VQ: loss = mean |decode(code) - image| + vq_weight * (|sg(z) - code|^2 + beta |z - sg(code)|^2)
    z: the encoder's output, of length one. sg: no gradient. The decoder's passes the code to z.
With --perceptual, a distance in features of EfficientNet-Lite0 is added (LPIPS, arXiv 1801.03924,
without its learnt weights). It writes what the scripts' --vae_path reads, in fp16. The defaults are
those with which the demo's two tokenizers were made: demo/digits_vae.ckpt, and, with --vq,
demo/digits_vq.ckpt. docs/tokenizers.md has the commands of demo/emoji_vae.ckpt.
Letters: N images, S side in pixels, B batch, K codes.
"""

from argparse import Namespace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from models.tokenizers.kl16 import VAE, AutoencoderKL
from models.tokenizers.tokenizer import from_uint8
from models.tokenizers.vq import VQModel
from util import dist
from util.args import Parser, non_negative_float, positive_float, positive_int, random_seed
from util.data.images import ImageDataset, center_crop
from util.data.listing import list_images
from util.errors import UserError, as_user_error
from util.files import check_writable
from util.vae import load_vae, save_vae

VQ_WEIGHT, BETA = 1.0, 0.25
CODES = 512
PATIENCE, RESTARTING = 30, 0.8  # see VQLoss


def load_part(data_path: Path, part: str, size: int) -> Tensor:
    """All images of data_path/part/CLASS/, float32 [N, 3, S, S] in [-1, 1]."""
    dataset = ImageDataset(list_images(data_path, part).samples, size)
    return from_uint8(torch.stack([dataset[index][0] for index in range(len(dataset))]))


class KLLoss:
    """perceptual: weight of the distance in features. kl_weight: as in the formula above."""

    def __init__(self, kl_weight: float, perceptual: float):
        self.kl_weight, self.perceptual = kl_weight, perceptual
        self.network = perceptual_network() if perceptual else None

    def __call__(self, vae: AutoencoderKL, batch: Tensor) -> Tensor:
        posterior = vae.encode(batch)
        decoded = vae.decode(posterior.sample())
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        loss = (decoded - batch).abs().mean() + self.kl_weight * kl
        return loss + self.perceptual * self.distance(decoded, batch) if self.network else loss

    def distance(self, decoded: Tensor, images: Tensor) -> Tensor:
        """Mean squared distance of unit feature vectors, summed over the network's first stages."""
        apart, features = 0.0, torch.cat((decoded, images))
        for stage in self.network:
            features = stage(features)
            first, second = F.normalize(features, dim=1, eps=1e-6).chunk(2)
            apart = apart + (first - second.detach()).square().sum(dim=1).mean()
        return apart


def perceptual_network() -> torch.nn.ModuleList:
    """Stages with strides 2, 4 and 8 of the network in util.evaluation.networks, frozen."""
    from util.evaluation.networks import EfficientNet

    network = EfficientNet("efficientnet", ["features"], None).requires_grad_(False).model
    first = torch.nn.Sequential(network.conv_stem, network.bn1)
    return torch.nn.ModuleList([first, network.blocks[:2], network.blocks[2:3]])


class VQLoss:
    """A code that no position chose for PATIENCE steps is set to an output of the
    encoder, during the first RESTARTING of the training.
    """

    def __init__(self, codes: int, steps: int):
        self.idle = torch.zeros(codes)  # steps since each was chosen
        self.restarts = int(RESTARTING * steps)

    def __call__(self, vae: VQModel, batch: Tensor) -> Tensor:
        z = vae.before_quantizer(batch)
        self.restart(vae.quantize.embedding.weight, z)
        codes, indices = vae.quantize(z)
        distance = (vae.decode(codes) - batch).abs().mean()
        self.idle += 1
        self.idle[indices.flatten()] = 0
        z, codes = F.normalize(z, dim=1), vae.codebook[indices].movedim(-1, 1)
        codebook, commitment = (
            pair.square().sum(dim=1).mean() for pair in (z.detach() - codes, z - codes.detach())
        )
        return distance + VQ_WEIGHT * (codebook + BETA * commitment)

    @torch.no_grad()
    def restart(self, codebook: Tensor, z: Tensor) -> None:
        self.restarts -= 1
        if self.restarts >= 0:
            outputs = F.normalize(z, dim=1).movedim(1, -1).flatten(0, 2)
            outputs = outputs[torch.randperm(len(outputs))]
            lost = (self.idle >= PATIENCE).nonzero()[: len(outputs), 0]
            codebook[lost] = outputs[: len(lost)]
            self.idle[lost] = 0


def train(vae: VAE, loss_of: KLLoss | VQLoss, images: Tensor, args: Namespace) -> None:
    """Train in place, in fp32; within an epoch no image comes twice."""
    optimizer = torch.optim.AdamW(vae.parameters(), betas=(0.9, 0.99), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, args.lr, total_steps=args.steps, pct_start=0.1
    )
    order = torch.empty(0, dtype=torch.int64)
    for _ in tqdm(range(args.steps)):
        order = order if len(order) >= args.batch_size else torch.randperm(len(images))
        batch, order = images[order[: args.batch_size]], order[args.batch_size :]
        if args.flip:
            flipped = torch.rand(len(batch), 1, 1, 1) < 0.5
            batch = torch.where(flipped, batch.flip(3), batch)
        loss = loss_of(vae, batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()


@torch.no_grad()
def psnr(vae: VAE, images: Tensor, counted: Tensor | None = None) -> float:
    """Of the posterior mean's reconstruction of [N, 3, S, S], in dB.

    counted: bool [N, 1, S, S], the pixels that count; None is all.
    """
    decoded = torch.cat([vae.decode(vae.encode(part).mean) for part in images.split(64)])
    error = (decoded.clamp(-1, 1) - images).square().mean(dim=1, keepdim=True)
    error = error if counted is None else error[counted]
    return (10 * torch.log10(4 / error.mean())).item()


def foreground(data_path: Path, size: int) -> Tensor:
    """Where the held-out images are not transparent, bool [N, 1, S, S]."""
    alphas = []
    for path, _ in list_images(data_path, "val").samples:
        with Image.open(path) as image:
            alpha = image.convert("RGBA").getchannel("A")
        alphas.append(torch.from_numpy(np.asarray(center_crop(alpha, size)) > 0))
    return torch.stack(alphas)[:, None]


def main() -> None:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--data_path", type=Path, default=Path("output/demo/data"), help="has train/ and val/")
    add("--output", type=Path, default=Path("output/demo/vae.ckpt"), help="file to write")
    add("--img_size", type=positive_int, default=32, help="pixels, a multiple of 8")
    add("--init", type=Path, default=None, help="weights to begin with, a file of this script")
    add("--embed_dim", type=positive_int, default=8, help="latent channels")
    add("--ch_mult", type=positive_int, nargs="+", default=[1, 1, 2, 2], help="widths, in 32")
    add("--vq", action="store_true", help=f"with a codebook, of {CODES} codes")
    add("--kl_weight", type=positive_float, default=2e-2, help="of the KL term")
    add("--perceptual", type=non_negative_float, default=0.0, help="weight of it; 0: none")
    add("--flip", action="store_true", help="half of the images, left to right")
    add("--steps", type=positive_int, default=600, help="of training")
    add("--batch_size", type=positive_int, default=32, help="images in a step")
    add("--lr", type=positive_float, default=2e-3, help="highest of the one-cycle schedule")
    add("--seed", type=random_seed, default=0, help="of everything random")
    args = parser.parse()
    torch.manual_seed(args.seed)
    check_writable(args.output.parent, "--output")
    sizes = {"ch_mult": tuple(args.ch_mult), "ch": 32, "num_res_blocks": 1}
    if args.vq:
        vae = VQModel(codebook_size=CODES, embed_dim=args.embed_dim, z_channels=64, **sizes)
        loss_of = VQLoss(len(vae.codebook), args.steps)
    else:
        vae = AutoencoderKL(args.embed_dim, **sizes)
        loss_of = KLLoss(args.kl_weight, args.perceptual)
    if args.init:
        with as_user_error(f"--init {args.init}, --embed_dim, --ch_mult", (RuntimeError,)):
            vae.load_state_dict(load_vae(args.init).state_dict())
    if args.img_size % vae.stride:
        raise UserError(f"--img_size {args.img_size} must be a multiple of {vae.stride}")
    images, held_out = (load_part(args.data_path, part, args.img_size) for part in ("train", "val"))
    train(vae, loss_of, images, args)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    save_vae(args.output, vae.half())
    vae = load_vae(args.output).eval()
    counted = foreground(args.data_path, args.img_size)
    text = f"stride {vae.stride}, {psnr(vae, held_out, counted):.1f} dB on held-out images"
    text += "" if counted.all() else "' foreground"
    if args.vq:
        with torch.no_grad():
            used = torch.cat([vae.indices(part).flatten() for part in held_out.split(64)]).unique()
        text += f", {len(used)} of {CODES} codes used there"
    print(f"{args.output}: {text}")


if __name__ == "__main__":
    dist.run(main)
