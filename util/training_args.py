"""The command line of training and its evaluation, and what of it no other script has."""

import argparse

from util.args import (
    add_device_flags,
    add_distributed_flags,
    add_loader_flags,
    add_metric_flags,
    add_model_flags,
    add_output_flags,
    add_precision_flag,
    add_vae_flags,
    fraction,
    non_negative_float,
    non_negative_int,
    positive_float,
    positive_int,
)
from util.errors import UserError
from util.evaluation.settings import add_evaluation_flags
from util.look import add_look_flags
from util.optim import BLR_BATCH
from util.parser import Parser


def training_parser(description: str) -> Parser:
    """That of main_tokenbridge.py. description: of the script that reads it."""
    parser = Parser(description)
    add_data_flags(parser)
    add_model_flags(parser)
    add_vae_flags(parser)
    add_training_flags(parser)
    add_saving_flags(parser)
    add_look_flags(parser)
    add_evaluation_flags(parser)
    add_metric_flags(parser)
    add_loader_flags(parser)
    add_precision_flag(add_device_flags(parser))
    add_distributed_flags(parser)
    return parser


def add_data_flags(parser: Parser) -> None:
    data = parser.add_argument_group("data and output")
    add = data.add_argument
    add("--data_path", default="./data/imagenet", metavar="FOLDER", help="images in train/CLASS/")
    add("--use_cached", action="store_true", help="read latents, not images")
    add("--cached_path", default="", metavar="FOLDER", help="the cache that main_cache.py made")
    add("--no_flip", action="store_true", help="no mirror images (digits, text)")
    add(
        "--output_dir",
        default="./output_dir",
        metavar="FOLDER",
        help="checkpoints, logs and images",
    )
    add("--log_dir", default="", metavar="FOLDER", help="TensorBoard's; default: --output_dir")
    add_output_flags(data)
    add(
        "--dry_run",
        action="store_true",
        help="build and check everything, make one step on random latents, say what the training "
        "would take, and stop",
    )
    add(
        "--resume",
        default="",
        metavar="PATH",
        help="folder or file of a checkpoint, or a folder of util.export; auto: the newest whole "
        "one of --output_dir, if any",
    )
    add(
        "--finetune",
        default="",
        metavar="PATH",
        help="begin with the averaged weights of a checkpoint, also for other classes or another "
        "image size; as --resume names it",
    )
    add(
        "--debug_dump",
        metavar="FILE",
        help="replay a step that went wrong, from its file, and stop",
    )


def add_training_flags(parser: Parser) -> None:
    training = parser.add_argument_group(
        "training", "a step takes batch_size x accum_iter samples of each process"
    )
    add = training.add_argument
    add("--batch_size", type=positive_int, default=16, help="samples of a micro-batch")
    add("--accum_iter", type=positive_int, default=1, help="micro-batches a step, of each process")
    add(
        "--global_batch",
        type=positive_int,
        help="samples a step, whatever the number of processes; sets the accumulation",
    )
    add("--epochs", type=positive_int, default=400, help="in all, with those of --resume")
    add("--start_epoch", type=non_negative_int, default=0, help="the first one, without --resume")
    add(
        "--warmup_epochs",
        type=non_negative_float,
        default=100,
        help="in which the rate rises from 0",
    )
    add("--lr", type=non_negative_float, help="peak learning rate; default: by --blr")
    add(
        "--blr",
        type=non_negative_float,
        default=1e-4,
        help=f"lr = blr * samples a step / {BLR_BATCH}",
    )
    add("--min_lr", type=non_negative_float, default=0.0, help="learning rate at the end")
    add("--lr_schedule", choices=("cosine", "constant"), default="cosine", help="after warm-up")
    add("--weight_decay", type=non_negative_float, default=0.02, help="AdamW's")
    add("--grad_clip", type=positive_float, default=3.0, help="largest norm of the gradient")
    add("--ema_rate", type=fraction, default=0.9999, help="of the averaged weights, a step")
    add("--grad_checkpointing", action="store_true", help="less memory: recompute all blocks")
    add(
        "--head_chunk",
        type=non_negative_int,
        metavar="POSITIONS",
        help="masked positions that the head works on at once: less is less memory; 0 is all of "
        "them; default: what keeps the device busy",
    )
    add("--log_freq", type=positive_int, default=20, help="steps between two log lines")
    add(
        "--max_skipped",
        type=positive_int,
        default=20,
        help="steps in a row whose numbers are not finite, after which the run stops",
    )


def add_saving_flags(parser: Parser) -> None:
    saving = parser.add_argument_group("checkpoints", "written in the background")
    add = saving.add_argument
    add("--save_last_freq", type=positive_int, default=5, help="epochs between two")
    add("--save_steps", type=non_negative_int, default=0, help="steps, besides; 0: never")
    add("--save_minutes", type=non_negative_float, default=30.0, help="minutes, besides; 0: never")
    add("--keep_checkpoints", type=positive_int, default=2, help="how many of the last stay")
    add(
        "--save_every",
        type=non_negative_int,
        default=0,
        help="epochs between those that all stay; 0: none",
    )


def check_mode(args: argparse.Namespace) -> None:
    """Raise UserError if flags of training, evaluation and dry run contradict each other."""
    if args.dry_run and args.evaluate:
        raise UserError("--dry_run is of a training; leave --evaluate out (--no_evaluate)")
    if args.finetune and args.evaluate and not args.resume:
        raise UserError("--finetune begins a training; --evaluate takes a checkpoint by --resume")
    if args.json and not (args.dry_run or args.evaluate):
        raise UserError(
            "--json is for --evaluate and --dry_run; the figures of a training go to --metrics_file"
        )
