"""Train a small KL VAE of the project's own class on a folder of images.

loss = mean |decode(sample) - image| + kl_weight * mean KL per latent scalar
It writes what the scripts' --vae_path reads, in fp16. The defaults are those with which the demo's
VAE, demo/digits_vae.ckpt, was made.
Letters: N images, S side in pixels, B batch.
"""

from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from models.tokenizers.kl16 import AutoencoderKL
from models.tokenizers.tokenizer import from_uint8
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


def load_part(data_path: Path, part: str, size: int) -> Tensor:
    """All images of data_path/part/CLASS/, float32 [N, 3, S, S] in [-1, 1]."""
    dataset = ImageDataset(list_images(data_path, part).samples, size)
    return from_uint8(torch.stack([dataset[index][0] for index in range(len(dataset))]))


def train(vae: AutoencoderKL, images: Tensor, steps: int) -> None:
    """Train in place, in fp32; within an epoch no image comes twice."""
    optimizer = torch.optim.AdamW(vae.parameters(), betas=(0.9, 0.99), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, HIGHEST_RATE, total_steps=steps, pct_start=0.1
    )
    order = torch.empty(0, dtype=torch.int64)
    for _ in tqdm(range(steps)):
        order = order if len(order) >= BATCH else torch.randperm(len(images))
        batch, order = images[order[:BATCH]], order[BATCH:]
        posterior = vae.encode(batch)
        distance = (vae.decode(posterior.sample()) - batch).abs().mean()
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        optimizer.zero_grad()
        (distance + KL_WEIGHT * kl).backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()


@torch.no_grad()
def psnr(vae: AutoencoderKL, images: Tensor) -> float:
    """Of the posterior mean's reconstruction, in dB, over all pixels of [N, 3, S, S]."""
    decoded = torch.cat([vae.decode(vae.encode(part).mean) for part in images.split(64)])
    error = (decoded.clamp(-1, 1) - images).square().mean()
    return (10 * torch.log10(4 / error)).item()


def main() -> None:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--data_path", type=Path, default=Path("output/demo/data"), help="has train/ and val/")
    add("--output", type=Path, default=Path("output/demo/vae.ckpt"), help="file to write")
    add("--img_size", type=positive_int, default=32, help="pixels, a multiple of 8")
    add("--embed_dim", type=positive_int, default=8, help="latent channels")
    add("--steps", type=positive_int, default=600, help="of training")
    add("--seed", type=random_seed, default=0, help="of everything random")
    args = parser.parse()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    check_writable(args.output.parent, "--output")
    vae = AutoencoderKL(args.embed_dim, (1, 1, 2, 2), ch=32, num_res_blocks=1)
    if args.img_size % vae.stride:
        raise UserError(f"--img_size {args.img_size} must be a multiple of {vae.stride}")
    images, held_out = (load_part(args.data_path, part, args.img_size) for part in ("train", "val"))
    train(vae, images, args.steps)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    save_vae(args.output, vae.half())
    found = psnr(load_vae(args.output).eval(), held_out)
    print(f"{args.output}: stride {vae.stride}, {found:.1f} dB on held-out images")


if __name__ == "__main__":
    dist.run(main)
