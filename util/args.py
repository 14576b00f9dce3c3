"""Command lines: types of values, and the flag groups that scripts share.

Names and defaults are those of the published scripts.
"""

import argparse
import math

from models.config import HEAD_INPUTS, PRESETS, QUANTIZERS, TokenBridgeConfig
from util.data.images import MAX_PIXELS
from util.device import PRECISIONS
from util.dist import NO_PROGRESS
from util.evaluation.extractor import INCEPTION
from util.metrics_file import metrics_path
from util.parser import Parser

PUBLISHED = TokenBridgeConfig()  # whose values are the published defaults


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


def add_device_flags(parser: Parser):
    """The group, for further flags."""
    group = parser.add_argument_group("device")
    group.add_argument(
        "--device",
        default="cuda",
        metavar="NAME",
        help="cuda, mps or cpu; what the machine has instead is used, and said",
    )
    group.add_argument("--seed", type=seed, default=1, help="of everything random")
    return group


def add_precision_flag(group) -> None:
    group.add_argument(
        "--precision",
        choices=PRECISIONS,
        default="auto",
        help="arithmetic; auto: bf16 where CUDA has it, else fp16 with loss scaling; fp32 on a CPU",
    )
    group.add_argument(
        "--compile",
        action="store_true",
        help="compile the blocks with torch.compile: minutes at the start, faster steps",
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
    group.add_argument("--dist_url", default="env://", metavar="URL", help="where they meet")
    group.add_argument(
        "--dist_timeout",
        type=positive_float,
        default=NO_PROGRESS,
        help="seconds without any progress after which all processes stop and say who holds them",
    )


def add_vae_flags(parser: Parser) -> None:
    group = parser.add_argument_group("tokenizer")
    group.add_argument(
        "--img_size", type=positive_int, default=PUBLISHED.img_size, help="pixels, of a side"
    )
    group.add_argument(
        "--vae_path",
        default="pretrained_models/vae/kl16.ckpt",
        metavar="PATH",
        help="weights of the VAE, or a folder of diffusers",
    )
    group.add_argument(
        "--vae_embed_dim",
        type=positive_int,
        default=PUBLISHED.vae_embed_dim,
        help="latent channels",
    )


def add_loader_flags(parser: Parser) -> None:
    group = parser.add_argument_group("loader")
    group.add_argument("--num_workers", type=non_negative_int, default=10, help="of each process")
    group.add_argument(
        "--pin_mem", action="store_true", default=True, help="page-locked batches (default)"
    )
    group.add_argument("--no_pin_mem", action="store_false", dest="pin_mem", help="pageable ones")
    group.add_argument(
        "--skip_bad_images", action="store_true", help="count and skip unreadable images"
    )
    group.add_argument(
        "--max_image_pixels",
        type=positive_int,
        default=MAX_PIXELS,
        help="of one image; larger ones count as unreadable",
    )


def add_metric_flags(parser: Parser) -> None:
    group = parser.add_argument_group("metrics")
    group.add_argument(
        "--fid_stats",
        metavar="FILE",
        help="npz with mu and sigma; default: fid_stats/adm_in256_stats.npz if there",
    )
    group.add_argument("--no_metrics", action="store_true", help="images only, no FID and IS")
    add_extractor_flags(group)


def add_output_flags(group) -> None:
    group.add_argument(
        "--metrics_file",
        type=metrics_path,
        metavar="FILE",
        help="figures for other programs, as FILE.tsv or FILE.jsonl, appended as they come",
    )
    group.add_argument(
        "--json",
        action="store_true",
        help="the final figures as JSON on stdout, all else on stderr",
    )


def add_extractor_flags(group) -> None:
    group.add_argument(
        "--feature_extractor",
        default=INCEPTION,
        metavar="NAME",
        help="registered with torch-fidelity, or MODULE:NAME, where MODULE registers NAME",
    )
    group.add_argument(
        "--inception_weights",
        metavar="FILE",
        help="of the extractor, torch-fidelity's Inception or other",
    )


def add_quantizer_flag(group) -> None:
    group.add_argument(
        "--quantizer",
        choices=QUANTIZERS,
        default=PUBLISHED.quantizer,
        help="the levels: published, or calibrated to each channel of --cached_path's latents",
    )


def add_model_flags(parser: Parser) -> None:
    group = parser.add_argument_group(
        "model", "a checkpoint made here knows its own settings; a flag given must agree with it"
    )
    group.add_argument("--model", choices=PRESETS, default="tokenbridge_large", help="size")
    group.add_argument("--quant_bits", type=bit_width, default=6, help="bits a latent scalar")
    add_quantizer_flag(group)
    for name, kind, text in (
        ("vae_stride", positive_int, "pixels a latent position"),
        ("patch_size", positive_int, "latent positions a token, along one side"),
        (
            "class_num",
            positive_int,
            "classes; if not given, as many as the data or the checkpoint have",
        ),
        ("quant_min", finite_float, "lowest scaled latent"),
        ("quant_max", finite_float, "highest scaled latent"),
        ("buffer_size", positive_int, "slots filled with the class"),
        ("attn_dropout", fraction, "on attention weights"),
        ("proj_dropout", fraction, "after projections"),
        ("label_drop_prob", fraction, "share of labels dropped in training"),
        ("mask_ratio_min", fraction, "least share of masked positions in training"),
    ):
        group.add_argument(f"--{name}", type=kind, default=getattr(PUBLISHED, name), help=text)
    group.add_argument(
        "--use_quantized_value",
        action="store_true",
        help="the encoder reads dequantized values; it always does, as published",
    )
    group.add_argument(
        "--latent_scale",
        type=latent_scale,
        default="auto",
        metavar="X",
        help="1 / std of the latents; auto: the cache's, or the published one for KL-16",
    )
    group.add_argument(
        "--channel_order",
        type=channel_order,
        default="auto",
        metavar="ORDER",
        help="order of the head's channels, as 8,1,10...; auto: the cache's, or the published one",
    )
    group.add_argument(
        "--head_input",
        choices=HEAD_INPUTS,
        default=PUBLISHED.head_input,
        help="the sampler's first input to the head; checkpoints know theirs",
    )
