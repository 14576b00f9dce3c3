"""What training and sampling cost on GPUs: operations and hours, printed as JSON.

Operations are counted (models/flops.py) and divided by the share of the data sheet's peak that a
run reaches, unless told otherwise on one H100 without --compile. Training's log says its own as a
percentage beside TFLOP/s.

python -m benchmarks.cost --model tokenbridge_large
python -m benchmarks.cost --model tokenbridge_huge --hardware H200 --devices 32 --img_size 512
"""

import argparse
import json

from models import flops
from models.config import HEADS, PRESETS, TokenBridgeConfig, preset
from models.flops import HARDWARE
from models.sampler import SamplingOptions
from util import dist
from util.args import Parser, fraction, non_negative_float, positive_int
from util.errors import as_user_error

SIZES = [name for name in PRESETS if name.startswith("tokenbridge_")]
TRAINING_SHARE, SAMPLING_SHARE = 0.23, 0.20  # measured on one H100: docs/performance.md
PUBLISHED_EPOCHS = {"tokenbridge_huge": 800}  # all others 400


def make_parser() -> Parser:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--model", choices=SIZES, default="tokenbridge_large", help="size")
    add("--img_size", type=positive_int, default=256, help="pixels a side")
    add("--vae_stride", type=positive_int, default=16, help="pixels a latent position")
    add("--vae_embed_dim", type=positive_int, default=16, help="latent channels")
    add("--head", choices=HEADS, default="channel", help="of models/heads")
    add("--head_share", type=fraction, default=1.0, help="of the masked positions, in the loss")
    add("--epochs", type=positive_int, help="of training [as published: huge 800, others 400]")
    add("--images", type=positive_int, default=1_281_167, help="of the training set")
    add("--num_images", type=positive_int, default=50_000, help="to sample")
    add("--num_iter", type=positive_int, default=256, help="iterations of the sampling")
    add("--cfg", type=non_negative_float, default=3.1, help="guidance; 1 is none")
    add("--cfg_interval", type=fraction, nargs=2, default=(0, 1), help="where it guides")
    add("--hardware", choices=HARDWARE, default="H100", help="of models/flops.py")
    add("--devices", type=positive_int, default=8, help="of that hardware, in all")
    add("--precision", choices=("bf16", "fp16", "fp32"), default="bf16", help="arithmetic")
    add("--share", type=fraction, help="of the peak that is reached [as on one H100]")
    return parser


def cost(args: argparse.Namespace) -> dict[str, float]:
    """All figures. Raises UserError on sizes that do not fit together."""
    hardware = HARDWARE[args.hardware]
    peak = hardware.fp32 if args.precision == "fp32" else hardware.half
    names = ("img_size", "vae_stride", "vae_embed_dim", "head", "head_share")
    sizes = {name: getattr(args, name) for name in names}
    with as_user_error():
        config = TokenBridgeConfig(**preset(args.model) | sizes)
        interval = tuple(args.cfg_interval)
        options = SamplingOptions(num_iter=args.num_iter, cfg=args.cfg, cfg_interval=interval)
    step, sample = flops.training_step(config), flops.sampling(config, options)
    epochs = args.epochs or PUBLISHED_EPOCHS.get(args.model, 400)
    hour = peak * 1e12 * 3600
    training = epochs * args.images * step / (hour * (args.share or TRAINING_SHARE))
    sampling = args.num_images * sample / (hour * (args.share or SAMPLING_SHARE))
    return {
        "operations_of_a_step": step,
        "operations_of_a_sample": sample,
        "epochs": epochs,
        "training_device_hours": training,
        "training_hours": training / args.devices,
        "sampling_device_hours": sampling,
        "sampling_hours": sampling / args.devices,
    }


def main() -> None:
    print(json.dumps(cost(make_parser().parse()), indent=2))


if __name__ == "__main__":
    dist.run(main)
