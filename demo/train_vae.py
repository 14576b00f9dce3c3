"""Train a small KL VAE, or one with a codebook, of the project's own classes on a folder of images.

KL: loss = mean |decode(sample) - image| + kl_weight * mean KL per latent scalar
VQ: loss = mean |decode(code) - image| + vq_weight * (|sg(z) - code|^2 + beta |z - sg(code)|^2)
    z: the encoder's output, of length one. sg: no gradient. The decoder's passes the code to z.
It writes what the scripts' --vae_path reads, in fp16. The defaults are those with which the demo's
two tokenizers were made: demo/digits_vae.ckpt, and, with --vq, demo/digits_vq.ckpt.
Letters: N images, S side in pixels, B batch, K codes.
"""

from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from models.tokenizers.kl16 import VAE, AutoencoderKL
from models.tokenizers.tokenizer import from_uint8
from models.tokenizers.vq import VQModel
from util import dist
from util.args import Parser, positive_int, random_seed
from util.data.images import ImageDataset
from util.data.listing import list_images
from util.errors import UserError
from util.files import check_writable
from util.vae import load_vae, save_vae

BATCH = 32
HIGHEST_RATE = 2e-3  # of the one-cycle schedule
KL_WEIGHT = 2e-2
VQ_WEIGHT, BETA = 1.0, 0.25
CODES = 512
PATIENCE, RESTARTING = 30, 0.8  # see VQLoss
SIZES = {"ch_mult": (1, 1, 2, 2), "ch": 32, "num_res_blocks": 1}


def load_part(data_path: Path, part: str, size: int) -> Tensor:
    """All images of data_path/part/CLASS/, float32 [N, 3, S, S] in [-1, 1]."""
    dataset = ImageDataset(list_images(data_path, part).samples, size)
    return from_uint8(torch.stack([dataset[index][0] for index in range(len(dataset))]))


def kl_loss(vae: AutoencoderKL, batch: Tensor) -> Tensor:
    posterior = vae.encode(batch)
    distance = (vae.decode(posterior.sample()) - batch).abs().mean()
    kl = posterior.kl().mean() / posterior.mean[0].numel()
    return distance + KL_WEIGHT * kl


class VQLoss:
    """As `kl_loss`. A code that no position chose for PATIENCE steps is set to an output of the
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


def train(vae: VAE, images: Tensor, steps: int) -> None:
    """Train in place, in fp32; within an epoch no image comes twice."""
    optimizer = torch.optim.AdamW(vae.parameters(), betas=(0.9, 0.99), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, HIGHEST_RATE, total_steps=steps, pct_start=0.1
    )
    loss_of = VQLoss(len(vae.codebook), steps) if isinstance(vae, VQModel) else kl_loss
    order = torch.empty(0, dtype=torch.int64)
    for _ in tqdm(range(steps)):
        order = order if len(order) >= BATCH else torch.randperm(len(images))
        batch, order = images[order[:BATCH]], order[BATCH:]
        loss = loss_of(vae, batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()


@torch.no_grad()
def psnr(vae: VAE, images: Tensor) -> float:
    """Of the posterior mean's reconstruction, in dB, over all pixels of [N, 3, S, S]."""
    decoded = torch.cat([vae.decode(vae.encode(part).mean) for part in images.split(64)])
    error = (decoded.clamp(-1, 1) - images).square().mean()
    return (10 * torch.log10(4 / error)).item()


@torch.no_grad()
def codes_used(vae: VQModel, images: Tensor) -> int:
    return len(torch.cat([vae.indices(part).flatten() for part in images.split(64)]).unique())


def main() -> None:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--data_path", type=Path, default=Path("output/demo/data"), help="has train/ and val/")
    add("--output", type=Path, default=Path("output/demo/vae.ckpt"), help="file to write")
    add("--img_size", type=positive_int, default=32, help="pixels, a multiple of 8")
    add("--embed_dim", type=positive_int, default=8, help="latent channels")
    add("--vq", action="store_true", help=f"with a codebook, of {CODES} codes")
    add("--steps", type=positive_int, default=600, help="of training")
    add("--seed", type=random_seed, default=0, help="of everything random")
    args = parser.parse()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    check_writable(args.output.parent, "--output")
    if args.vq:
        vae = VQModel(codebook_size=CODES, embed_dim=args.embed_dim, z_channels=64, **SIZES)
    else:
        vae = AutoencoderKL(args.embed_dim, **SIZES)
    if args.img_size % vae.stride:
        raise UserError(f"--img_size {args.img_size} must be a multiple of {vae.stride}")
    images, held_out = (load_part(args.data_path, part, args.img_size) for part in ("train", "val"))
    train(vae, images, args.steps)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    save_vae(args.output, vae.half())
    vae = load_vae(args.output).eval()
    text = f"stride {vae.stride}, {psnr(vae, held_out):.1f} dB on held-out images"
    if args.vq:
        text += f", {codes_used(vae, held_out)} of {CODES} codes used there"
    print(f"{args.output}: {text}")


if __name__ == "__main__":
    dist.run(main)
