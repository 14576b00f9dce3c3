"""What training and sampling cost on GPUs: operations, hours and memory, printed as JSON.

Operations are counted (util/flops.py) and divided by the share of the data sheet's peak that a run
reaches. That share is assumed: training's log says its own as a percentage beside TFLOP/s.

python -m benchmarks.cost --model tokenbridge_large
python -m benchmarks.cost --model tokenbridge_huge --hardware H200 --devices 32 --img_size 512
"""

import argparse
import json
import math

import torch
from torch import nn

from models.config import PRESETS, TokenBridgeConfig, preset
from models.heads import CHUNK_ROWS_ELSEWHERE
from models.tokenbridge import TokenBridge
from util import dist, flops
from util.args import Parser, bit_width, fraction, non_negative_float, positive_int
from util.errors import UserError, as_user_error
from util.flops import HARDWARE

SIZES = [name for name in PRESETS if name.startswith("tokenbridge_")]
PUBLISHED_EPOCHS = {"tokenbridge_huge": 800}  # all others 400
USABLE = 0.9  # of a device's memory: the rest is the context's and the allocator's
FULL = 4  # bytes of fp32: weights, optimizer, EMA, and the sums that run through the blocks
ACTIVATION = {"bf16": 2, "fp16": 2, "fp32": 4}


def make_parser() -> Parser:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--model", choices=SIZES, default="tokenbridge_large", help="size")
    add("--img_size", type=positive_int, default=256, help="pixels a side")
    add("--vae_stride", type=positive_int, default=16, help="pixels a latent position")
    add("--vae_embed_dim", type=positive_int, default=16, help="latent channels")
    add("--quant_bits", type=bit_width, default=6, help="bits a latent scalar")
    add("--epochs", type=positive_int, help="of training [as published: huge 800, others 400]")
    add("--images", type=positive_int, default=1_281_167, help="of the training set")
    add("--grad_checkpointing", action="store_true", help="as in training: a third more to compute")
    add("--num_images", type=positive_int, default=50_000, help="to sample")
    add("--num_iter", type=positive_int, default=256, help="iterations of the sampling")
    add("--cfg", type=non_negative_float, default=3.1, help="guidance; 1 is none")
    add("--hardware", choices=HARDWARE, default="H100", help="of util/flops.py")
    add("--devices", type=positive_int, default=8, help="of that hardware, in all")
    add("--precision", choices=ACTIVATION, default="bf16", help="arithmetic")
    add("--share", type=fraction, default=0.3, help="of the peak that is reached")
    return parser


def count_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def training_memory(model: TokenBridge, batch_size: int, precision: str = "bf16") -> dict[str, int]:
    """Bytes on a GPU, by part; without VAE, loader, CUDA context and the allocator's losses.

    model: on any device, meta too. batch_size: of a micro-batch.
    states: weights, gradients, AdamW's moments, EMA. casts: weights in half precision. backbone,
    head: an estimate of what is kept for backward, in the head of a chunk, and the gradients of its
    weights again. A block keeps the sums before both norms, their outputs, q, k, v, what attention
    gives, twice the MLP's width around GELU, and dropout's masks of one byte.
    """
    config, head, a = model.config, model.head, ACTIVATION[precision]
    ratio, drop, again = config.mlp_ratio, config.proj_dropout > 0, head.grad_checkpointing
    masked, length = math.ceil(config.seq_len * config.mask_ratio_min), config.seq_len
    encoder, decoder = config.encoder_embed_dim, config.decoder_embed_dim
    image = 2 * FULL * ((config.buffer_size + length) * encoder + masked * decoder)
    kept = 2 * FULL + 6 * a + 2 * drop + ratio * (2 * a + drop)  # by a block, a row and a feature
    for width, positions, depth in (
        (encoder, length - masked, config.encoder_depth),
        (decoder, length, config.decoder_depth),
    ):
        features = (config.buffer_size + positions) * width
        image += depth * features * (FULL if again else kept)
    image += features * kept if again else 0  # of the one that is computed again
    width, depth, levels = config.channel_embed_dim, config.channel_depth, config.quant_levels
    in_block = 4 * FULL + 12 * a + 2 * a * ratio
    channel = depth * FULL + in_block if again else depth * in_block
    channel += (6 * depth + 2) * a + 6 * FULL + 4 * a  # modulations; the ends
    channel = width * channel + levels * (2 * FULL + a)  # logits
    chunk = CHUNK_ROWS_ELSEWHERE // config.token_dim if head.chunk is None else head.chunk
    positions = min(chunk or batch_size * length, batch_size * length)
    multiplied = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    return {
        "states": 5 * FULL * count_parameters(model),
        "casts": a * multiplied if a < FULL else 0,
        "backbone": round(batch_size * image),
        "head": round(positions * config.token_dim * channel + FULL * count_parameters(head)),
    }


def largest_batch(model: TokenBridge, precision: str, usable: float) -> tuple[int, int]:
    """As many of 64 images at once as fit into the bytes, and the bytes that they take."""
    for batch in (64, 32, 16, 8, 4, 2, 1):
        taken = sum(training_memory(model, batch, precision).values())
        if taken <= usable:
            return batch, taken
    raise UserError(
        f"one image takes about {taken / 1e9:.0f} GB, of which a device has {usable / 1e9:.0f}; "
        "see --hardware and --grad_checkpointing"
    )


def cost(args: argparse.Namespace) -> dict[str, float]:
    """All figures. Raises UserError, in one line, on what cannot be."""
    hardware = HARDWARE[args.hardware]
    peak = hardware.fp32 if args.precision == "fp32" else hardware.half
    sizes = {name: getattr(args, name) for name in ("img_size", "vae_stride", "vae_embed_dim")}
    levels = {"quant_levels": 2**args.quant_bits}
    with as_user_error(), torch.device("meta"):
        config = TokenBridgeConfig(**preset(args.model), **sizes, **levels)
        model = TokenBridge(**config.to_dict(), grad_checkpointing=args.grad_checkpointing)
    batch, taken = largest_batch(model, args.precision, USABLE * hardware.memory * 1e9)
    step, sample = flops.training_step(config), flops.sampling(config, args.num_iter, args.cfg != 1)
    epochs = args.epochs or PUBLISHED_EPOCHS.get(args.model, 400)
    again = 4 / 3 if args.grad_checkpointing else 1
    per_hour = peak * 1e12 * args.share * 3600
    training, sampling = epochs * args.images * step * again, args.num_images * sample
    return {
        "parameters": count_parameters(model),
        "operations_of_a_step": step,
        "operations_of_a_sample": sample,
        "epochs": epochs,
        "batch_size": batch,
        "bytes_per_device": taken,
        "training_device_hours": training / per_hour,
        "training_hours": training / per_hour / args.devices,
        "sampling_device_hours": sampling / per_hour,
        "sampling_hours": sampling / per_hour / args.devices,
    }


def main() -> None:
    print(json.dumps(cost(make_parser().parse()), indent=2))


if __name__ == "__main__":
    dist.run(main)
