"""Command lines: a parser that answers in one line, and the flag groups that scripts share.

Names and defaults are those of the published scripts.
"""

import argparse
import math
import sys

from models.config import HEAD_INPUTS, PRESETS
from util.device import PRECISIONS
from util.errors import EXIT_USER_ERROR


class Parser(argparse.ArgumentParser):
    """--help shows defaults; a wrong flag gets one line and exit code 2."""

    def __init__(self, description: str):
        super().__init__(
            description=description,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
            allow_abbrev=False,  # a prefix that works today is ambiguous tomorrow
        )

    def error(self, message: str):
        print(f"{self.prog}: error: {message} (see --help)", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)

    def parse(self, argv: list[str] | None = None) -> argparse.Namespace:
        """Like parse_args, with `explicit`: the names of the flags that were given."""
        args = self.parse_args(argv)
        given = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        for action in self._actions:
            if action.option_strings and action.dest != "help":
                kept = {"nargs": action.nargs} if action.nargs != 0 else {"action": "store_true"}
                given.add_argument(
                    *action.option_strings, dest=action.dest, default=argparse.SUPPRESS, **kept
                )
        args.explicit = set(vars(given.parse_known_args(argv)[0]))
        return args


def positive_int(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return value


def non_negative_int(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative")
    return value


def seed(text: str) -> int:
    value = non_negative_int(text)
    if value >= 2**63:
        raise argparse.ArgumentTypeError(f"{text} has more than 63 bits")
    return value


def non_negative_float(text: str) -> float:
    value = float(text)
    if not (math.isfinite(value) and value >= 0):
        raise argparse.ArgumentTypeError(f"{text} is not a number of at least 0")
    return value


def positive_float(text: str) -> float:
    value = non_negative_float(text)
    if value == 0:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return value


def finite_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text} is not finite")
    return value


def fraction(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value


MAX_BITS = 9  # see GaussianQuantizer


def bit_width(text: str) -> int:
    """Bits a latent scalar."""
    value = int(text)
    if not 1 <= value <= MAX_BITS:
        raise argparse.ArgumentTypeError(f"{text} is not between 1 and {MAX_BITS} bits")
    return value


def bit_width_or_continuous(text: str) -> int:
    """Bits a latent scalar; any negative number, which becomes -1, is no quantization."""
    return -1 if int(text) < 0 else bit_width(text)


def channel_order(text: str) -> str | tuple[int, ...]:
    return text if text == "auto" else tuple(int(part) for part in text.replace(",", " ").split())


def latent_scale(text: str) -> str | float:
    return text if text == "auto" else positive_float(text)


def add_device_flags(parser: Parser) -> None:
    group = parser.add_argument_group("device")
    group.add_argument("--device", default="cuda", help="cuda, mps or cpu; what is there if absent")
    group.add_argument("--seed", type=seed, default=1, help="of everything random")


def add_precision_flag(parser: Parser) -> None:
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        default="auto",
        help="arithmetic; auto: bf16 where CUDA has it, else fp16 with loss scaling; fp32 on a CPU",
    )


def add_distributed_flags(parser: Parser) -> None:
    group = parser.add_argument_group(
        "processes", "torchrun and Slurm are recognised by their environment"
    )
    group.add_argument("--world_size", type=int, default=1, help="set by the launcher; not read")
    group.add_argument(
        "--local_rank", "--local-rank", type=int, default=-1, help="set by the launcher; not read"
    )
    group.add_argument("--dist_on_itp", action="store_true", help="started by Open MPI")
    group.add_argument("--dist_url", default="env://", help="where the processes meet")


def add_vae_flags(parser: Parser) -> None:
    group = parser.add_argument_group("tokenizer")
    group.add_argument("--img_size", type=positive_int, default=256, help="pixels")
    group.add_argument(
        "--vae_path", default="pretrained_models/vae/kl16.ckpt", help="weights of the VAE"
    )
    group.add_argument("--vae_embed_dim", type=positive_int, default=16, help="latent channels")


def add_loader_flags(parser: Parser) -> None:
    group = parser.add_argument_group("loader")
    group.add_argument("--num_workers", type=non_negative_int, default=10, help="a process")
    group.add_argument("--pin_mem", action="store_true", default=True, help="page-locked batches")
    group.add_argument("--no_pin_mem", action="store_false", dest="pin_mem", help="pageable ones")
    group.add_argument(
        "--skip_bad_images", action="store_true", help="count and skip unreadable images"
    )


def add_metric_flags(parser: Parser) -> None:
    group = parser.add_argument_group("metrics")
    group.add_argument(
        "--fid_stats", help="npz with mu and sigma; default: fid_stats/adm_in256_stats.npz if there"
    )
    group.add_argument("--inception_weights", help="torch-fidelity's Inception weights, a file")
    group.add_argument("--no_metrics", action="store_true", help="images only, no FID and IS")


def add_model_flags(parser: Parser) -> None:
    group = parser.add_argument_group(
        "model", "a checkpoint made here knows its own settings; a flag given must agree with it"
    )
    group.add_argument("--model", choices=PRESETS, default="tokenbridge_large", help="size")
    group.add_argument("--vae_stride", type=positive_int, default=16, help="pixels a position")
    group.add_argument("--patch_size", type=positive_int, default=1, help="positions a token side")
    group.add_argument("--class_num", type=positive_int, default=1000, help="classes")
    group.add_argument("--quant_bits", type=bit_width, default=6, help="bits a latent scalar")
    group.add_argument("--quant_min", type=finite_float, default=-5.0, help="lowest scaled latent")
    group.add_argument("--quant_max", type=finite_float, default=5.0, help="highest scaled latent")
    group.add_argument(
        "--use_quantized_value",
        action="store_true",
        help="the encoder reads dequantized values; it always does, as published",
    )
    group.add_argument("--buffer_size", type=positive_int, default=64, help="class slots")
    group.add_argument("--attn_dropout", type=fraction, default=0.1, help="on attention weights")
    group.add_argument("--proj_dropout", type=fraction, default=0.1, help="after projections")
    group.add_argument("--label_drop_prob", type=fraction, default=0.1, help="class dropout")
    group.add_argument("--mask_ratio_min", type=fraction, default=0.7, help="least share masked")
    group.add_argument(
        "--latent_scale",
        type=latent_scale,
        default="auto",
        help="1 / std of the latents; auto: the cache's, or the published one for KL-16",
    )
    group.add_argument(
        "--channel_order",
        type=channel_order,
        default="auto",
        help="order of the head's channels, as 8,1,10...; auto: the cache's, or the published one",
    )
    group.add_argument(
        "--head_input",
        choices=HEAD_INPUTS,
        default="trained",
        help="the sampler's first input to the head; checkpoints know theirs",
    )
