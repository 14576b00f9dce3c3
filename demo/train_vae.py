"""Train a small KL VAE of the project's own class on a folder of images.

loss = mean |decode(sample) - image| + kl_weight * mean KL per latent scalar
The file it writes is the one that the scripts' --vae_path reads: a dict with the tensors
(`model`, in fp16) and the constructor's arguments (`config`). The defaults are those with which
demo/digits_vae.ckpt was made, the VAE of the demo.
Letters: N images, S side in pixels, B batch.
"""

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from models.tokenizers.kl16 import AutoencoderKL
from models.tokenizers.tokenizer import from_uint8
from util.args import non_negative_float, positive_float, positive_int, seed
from util.data.images import ImageDataset
from util.data.listing import list_images
from util.errors import UserError, as_user_error, run
from util.files import check_writable
from util.parser import Parser
from util.vae_files import load_vae, save_vae

REPORT_EVERY = 50


def load_part(data_path: Path, part: str, size: int) -> Tensor:
    """All images of data_path/part/CLASS/, float32 [N, 3, S, S] in [-1, 1]."""
    dataset = ImageDataset(list_images(data_path, part).samples, size)
    return from_uint8(torch.stack([dataset[index][0] for index in range(len(dataset))]))


def batches(images: Tensor, batch_size: int, steps: int) -> Iterator[Tensor]:
    """`steps` random batches [B, 3, S, S]; within an epoch no image comes twice."""
    order = torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        if len(order) < batch_size:
            order = torch.randperm(len(images))
        yield images[order[:batch_size]]
        order = order[batch_size:]


def train(
    vae: AutoencoderKL,
    images: Tensor,
    *,
    steps: int,
    batch_size: int,
    lr: float,
    kl_weight: float,
) -> None:
    """Train in place, in fp32; prints the losses every 50 steps."""
    optimizer = torch.optim.AdamW(vae.parameters(), betas=(0.9, 0.99), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    began = time.monotonic()
    for step, batch in enumerate(batches(images, batch_size, steps), 1):
        posterior = vae.encode(batch)
        distance = (vae.decode(posterior.sample()) - batch).abs().mean()
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        optimizer.zero_grad()
        (distance + kl_weight * kl).backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % REPORT_EVERY == 0 or step == steps:
            left = (time.monotonic() - began) / step * (steps - step)
            print(f"  step {step}/{steps}  L1 {distance:.4f}  KL {kl:.3f}  {left:.0f} s left")


@torch.no_grad()
def psnr(vae: AutoencoderKL, images: Tensor) -> float:
    """Of the posterior mean's reconstruction, in dB, over all pixels of [N, 3, S, S]."""
    decoded = torch.cat([vae.decode(vae.encode(part).mode()) for part in images.split(64)])
    error = (decoded.clamp(-1, 1) - images).square().mean()
    return (10 * torch.log10(4 / error)).item()


def parse_args() -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--data_path", type=Path, default=Path("output/demo/data"), help="has train/ and val/")
    add("--output", type=Path, default=Path("output/demo/vae.ckpt"), help="file to write")
    add("--img_size", type=positive_int, default=32, help="pixels along a side")
    add("--embed_dim", type=positive_int, default=8, help="latent channels")
    add("--ch", type=positive_int, default=32, help="width of the finest level, a multiple of 32")
    add(
        "--ch_mult",
        type=positive_int,
        nargs="+",
        default=[1, 1, 2, 2],
        help="width of each level / ch",
    )
    add("--num_res_blocks", type=positive_int, default=1, help="residual blocks a level")
    add("--steps", type=positive_int, default=600, help="training steps")
    add("--batch_size", type=positive_int, default=32, help="images a step")
    add(
        "--lr",
        type=positive_float,
        default=2e-3,
        help="highest of the one-cycle schedule",
    )
    add(
        "--kl_weight",
        type=non_negative_float,
        default=2e-2,
        help="of the KL per latent scalar",
    )
    add("--threads", type=positive_int, default=1, help="CPU threads")
    add("--seed", type=seed, default=0, help="of everything random")
    return parser.parse()


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    check_writable(args.output.parent, "--output")
    if args.output.is_dir():
        raise UserError(f"--output {args.output} is a folder; name a file")
    with as_user_error(f"--ch {args.ch}"):
        vae = AutoencoderKL(
            args.embed_dim, tuple(args.ch_mult), ch=args.ch, num_res_blocks=args.num_res_blocks
        )
    if args.img_size % vae.stride:
        raise UserError(
            f"--img_size {args.img_size} is no multiple of {vae.stride}, the stride of "
            f"{len(args.ch_mult)} values of --ch_mult"
        )
    images, held_out = (load_part(args.data_path, part, args.img_size) for part in ("train", "val"))
    train(
        vae,
        images,
        steps=args.steps,
        batch_size=args.batch_size,
        lr=args.lr,
        kl_weight=args.kl_weight,
    )
    args.output.parent.mkdir(parents=True, exist_ok=True)
    save_vae(args.output, vae.half())
    found = psnr(load_vae(args.output).eval(), held_out)
    print(f"{args.output}: stride {vae.stride}, {found:.1f} dB on held-out images")


if __name__ == "__main__":
    run(main)
