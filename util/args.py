"""Command lines: the flags of all scripts, a parser that answers in one line, and --config.

Names and defaults are those of the published scripts. A flag that something else may know better
(a checkpoint, the data, a cache) is None unless it is given; `value` then says the published one.
The settings of a model are the fields of `TokenBridgeConfig`, which say what their flags do.
"""

import argparse
import math
import os
import re
import sys
from collections.abc import Callable
from dataclasses import Field, dataclass, fields
from pathlib import Path

import yaml

from models.config import PRESETS, TokenBridgeConfig
from models.masking import MASK_SCHEDULES
from models.precision import PRECISIONS
from models.sampler import CFG_SCHEDULES, ORDERS
from util import dist
from util.data.images import MAX_PIXELS
from util.errors import EXIT_USER_ERROR, did_you_mean, program
from util.optim import BLR_BATCH

MAX_BITS = 9  # see GaussianQuantizer
INCEPTION = "inception-v3-compat"  # as torch-fidelity calls it
CONFIG, EVALUATION_CONFIG = "config.yaml", "config-evaluation.yaml"
# Of one call, or of one process, and not of what it does.
NOT_SAVED = ("config", "dry_run", "world_size", "local_rank")
# Where a run writes besides its folder: a run in another folder leaves them alone.
OF_ONE_FOLDER = ("metrics_file", "log_dir")
SAVED_BY = "saved_by"  # in files that a run has left


# --- types of values


def number(kind: type, holds: Callable[[float], bool], name: str) -> Callable:
    """A type of finite numbers for which something holds. name: of such a number."""

    def parse(text: str):
        parsed = kind(text)
        if not (math.isfinite(parsed) and holds(parsed)):
            raise argparse.ArgumentTypeError(f"{text} is not {name}")
        return parsed

    parse.__name__ = kind.__name__
    return parse


positive_int = number(int, lambda n: n > 0, "a positive number")
non_negative_int = number(int, lambda n: n >= 0, "0 or a positive number")
random_seed = number(int, lambda n: 0 <= n < 2**63, "in [0, 2^63)")
finite_float = number(float, lambda x: True, "a finite number")
non_negative_float = number(float, lambda x: x >= 0, "0 or a positive number")
positive_float = number(float, lambda x: x > 0, "a positive number")
fraction = number(float, lambda x: 0 <= x <= 1, "in [0, 1]")
width = number(float, lambda x: 0.01 <= x <= 0.28, "in [0.01, 0.28]")
bit_width = number(int, lambda n: 1 <= n <= MAX_BITS, f"in [1, {MAX_BITS}]")


def bit_width_or_continuous(text: str) -> int:
    """Bits a latent scalar; any negative number, which becomes -1, is no quantization."""
    return -1 if int(text) < 0 else bit_width(text)


def channel_order(text: str) -> str | tuple[int, ...]:
    return text if text == "auto" else tuple(int(part) for part in text.replace(",", " ").split())


def latent_scale(text: str) -> str | float:
    return text if text == "auto" else positive_float(text)


def head_steps(text: str) -> int | tuple[int, ...]:
    """A number of steps, or the channels that each of them fills."""
    return tuple(map(positive_int, text.split(","))) if "," in text else positive_int(text)


# --- flags


@dataclass(frozen=True)
class Flag:
    """kind: makes the value of the word; bool is a switch, which --no_NAME switches off."""

    name: str
    kind: Callable
    default: object
    help: str
    choices: tuple[str, ...] | None = None
    nargs: str | None = None

    def add_to(self, group) -> None:
        if self.kind is bool:
            add, name = group.add_argument, self.name
            add(f"--{name}", action="store_true", default=self.default, help=self.help)
            add(f"--no_{name}", action="store_false", dest=name, help=argparse.SUPPRESS)
            return
        shown = PUBLISHED.get(self.name) if self.default is None else self.default
        listed = " ".join(map(str, shown)) if isinstance(shown, list) else shown
        metavar = {"int": "N", "float": "X"}.get(self.kind.__name__, "VALUE")
        group.add_argument(
            f"--{self.name}",
            type=self.kind,
            default=self.default,
            choices=self.choices,
            nargs=self.nargs,
            metavar=None if self.choices else metavar,
            help=self.help.replace("%", "%%") + ("" if shown in (None, "") else f" [{listed}]"),
        )


PUBLISHED: dict[str, object] = {}  # of the flags that are None unless given
KINDS = {int: positive_int, float: finite_float, str: str}


def auto(name: str, kind: Callable, published, help: str, choices=None) -> Flag:
    """A flag that is None unless given, where something else may know better."""
    PUBLISHED[name] = published
    return Flag(name, kind, None, help, choices)


def model_flag(setting: Field) -> Flag:
    """Of a field of `TokenBridgeConfig`, which checks it further; a checkpoint knows it."""
    known, published = setting.metadata, getattr(TokenBridgeConfig(), setting.name)
    published = known["default"] if published is None else published
    kind = head_steps if setting.name == "head_steps" else KINDS[type(published)]
    text = f"of the {known['head']} head; {known['help']}" if known["head"] else known["help"]
    return auto(setting.name, kind, published, text, known["choices"] or None)


def value(args: argparse.Namespace, name: str):
    """What a flag says, or the published value where it was not given."""
    given = getattr(args, name)
    return PUBLISHED.get(name) if given is None else given


def to_save(args: argparse.Namespace) -> dict:
    """The settings of a call."""
    return {name: value for name, value in vars(args).items() if name not in NOT_SAVED}


def sampling_flags(args: argparse.Namespace) -> dict:
    """For `SamplingOptions`, without those of which a sweep has several values."""
    names = ("cfg_schedule", "cfg_power", "mask_schedule", "order", "seed", "token_cache")
    given = {name: value(args, name) for name in names}
    return given | {"cfg_interval": args.cfg_interval and tuple(args.cfg_interval)}


DATA_PATH = auto("data_path", str, "./data/imagenet", "images in train/CLASS/")
CACHED_PATH = Flag("cached_path", str, "", "the cache that main_cache.py made")
SETTINGS = {f.name: model_flag(f) for f in fields(TokenBridgeConfig) if f.metadata.get("help")}
METRICS_FILE = Flag("metrics_file", str, None, "figures for programs, a line of JSON each")
JSON = Flag("json", bool, False, "the final figures as JSON on stdout, all else on stderr")
SEED = auto("seed", random_seed, 1, "of everything random")
DEVICE = Flag("device", str, "cuda", "cuda, mps or cpu; what the machine has instead is used")
EVAL_WEIGHTS = Flag("eval_weights", str, "ema", "ema, model (raw), or another --ema_rate")
EXTRACTOR = [
    Flag("feature_extractor", str, INCEPTION, "also dinov2, efficientnet, or MODULE:NAME"),
    Flag("inception_weights", str, None, "of the extractor, torch-fidelity's Inception or other"),
]
LATENT_SCALE = auto("latent_scale", latent_scale, "auto", "1 / std; auto: the cache's, KL-16's")
NORMS = ("scale", "channel")
LATENT_NORM = [
    auto("latent_norm", str, "scale", "channel: (z - mean) / std of each; l-DeTok's way", NORMS),
    Flag("latent_stats", str, None, "manifest.json that has them; default: --cached_path's"),
]
MODEL = [
    auto("model", str, "tokenbridge_large", "size", PRESETS),
    auto("quant_bits", bit_width, 6, "bits a latent scalar"),
    *(SETTINGS[name] for name in SETTINGS if name not in ("img_size", "vae_embed_dim")),
    Flag("use_quantized_value", bool, False, "the encoder's input; it always is, as published"),
    LATENT_SCALE,
    *LATENT_NORM,
    auto("channel_order", channel_order, "auto", "the head's, as 8,1,10...; auto: likewise"),
]
VAE = [
    SETTINGS["img_size"],
    auto("vae_path", str, "pretrained_models/vae/kl16.ckpt", "its weights, or a folder"),
    SETTINGS["vae_embed_dim"],
]
METRICS = [
    Flag("fid_stats", str, None, "npz with mu and sigma; default: ADM's in fid_stats/, if there"),
    Flag("no_metrics", bool, False, "images only, no FID and IS"),
    *EXTRACTOR,
]
LOADER = [
    Flag("num_workers", non_negative_int, 10, "of each process"),
    Flag("skip_bad_images", bool, False, "count and skip unreadable images"),
    Flag("max_image_pixels", positive_int, MAX_PIXELS, "larger images count as unreadable"),
    Flag("pin_mem", bool, True, "page-locked batches, as by default; or --no_pin_mem"),
]
PROCESSES = [
    Flag("world_size", int, 1, "set by the launcher; not read"),
    Flag("dist_on_itp", bool, False, "started by Open MPI; torchrun and Slurm are recognised"),
    Flag("dist_url", str, "env://", "where they meet"),
    Flag("dist_timeout", positive_float, dist.NO_PROGRESS, "seconds without progress: all stop"),
]
PRECISION = [
    Flag("precision", str, "auto", "auto: bf16 on CUDA, else fp16; fp32 elsewhere", PRECISIONS),
    Flag("tf32", bool, False, "fp32 products of CUDA with 10 bits of mantissa"),
    Flag("compile", bool, False, "compile the blocks: minutes at the start, faster steps"),
    Flag("cuda_graphs", bool, False, "of the channel head's sampling: one launch for hundreds"),
    Flag("vae_precision", str, "fp32", "of decoding, when evaluating", ("fp32", "bf16")),
]
# Of main_tokenbridge.py and the doctor, by group.
GROUPS = {
    "data and output": [
        DATA_PATH,
        Flag("use_cached", bool, False, "read latents, not images"),
        CACHED_PATH,
        Flag("no_flip", bool, False, "no mirror images (digits, text)"),
        Flag("output_dir", str, "./output_dir", "checkpoints, logs and images"),
        Flag("log_dir", str, "", "TensorBoard's; default: --output_dir"),
        Flag("track", str, None, "log a training there, too", ("wandb", "trackio")),
        METRICS_FILE,
        JSON,
        Flag("dry_run", bool, False, "check everything, make one step, say what a training takes"),
        Flag("resume", str, "", "folder or file of a checkpoint; auto: the newest of --output_dir"),
        Flag("finetune", str, "", "begin with a checkpoint's averages, for other classes too"),
    ],
    "model (a checkpoint made here knows its own settings)": MODEL,
    "tokenizer": VAE,
    "training (batch_size x accum_iter samples a step and process)": [
        auto("batch_size", positive_int, 16, "samples of a micro-batch"),
        auto("accum_iter", positive_int, 1, "micro-batches a step, of each process"),
        Flag("global_batch", positive_int, None, "samples a step, on any number of processes"),
        Flag("epochs", positive_int, 400, "in all, with those of --resume"),
        Flag("start_epoch", non_negative_int, 0, "the first one, without --resume"),
        Flag("warmup_epochs", non_negative_float, 100, "in which the rate rises from 0"),
        Flag("lr", non_negative_float, None, "peak learning rate; default: by --blr"),
        Flag("blr", non_negative_float, 1e-4, f"lr = blr * samples a step / {BLR_BATCH}"),
        Flag("min_lr", non_negative_float, 0.0, "learning rate at the end"),
        auto("lr_schedule", str, "cosine", "mar_*: constant", ("cosine", "constant")),
        Flag("weight_decay", non_negative_float, 0.02, "AdamW's"),
        Flag("grad_clip", positive_float, 3.0, "largest norm of the gradient"),
        Flag("ema_rate", fraction, [0.9999], "of the averages; the first is model_ema", nargs="+"),
        Flag("posthoc_ema", non_negative_int, 0, "epochs between its snapshots; 0: none"),
        Flag("grad_checkpointing", bool, False, "less memory: recompute all blocks"),
        Flag("head_chunk", non_negative_int, None, "positions the head works on at once; 0 is all"),
        Flag("log_freq", positive_int, 20, "steps between two log lines"),
        Flag("max_skipped", positive_int, 20, "steps in a row, not finite, after which to stop"),
    ],
    "checkpoints (written in the background)": [
        Flag("save_last_freq", positive_int, 5, "epochs between two"),
        Flag("save_steps", non_negative_int, 0, "steps, besides; 0: never"),
        Flag("save_minutes", non_negative_float, 30.0, "minutes, besides; 0: never"),
        Flag("keep_checkpoints", positive_int, 2, "how many of the last stay"),
        Flag("save_every", non_negative_int, 0, "epochs between those that all stay; 0: none"),
    ],
    "validation while training (parts of epochs are possible)": [
        Flag("preview_freq", non_negative_float, 1.0, "epochs between image grids; 0: never"),
        Flag("preview_images", positive_int, 8, "of each, raw and averaged weights"),
        Flag("preview_iter", positive_int, 32, "iterations; guided as by --cfg"),
        Flag("val_freq", non_negative_float, 1.0, "epochs between validation losses; 0: never"),
        Flag("val_images", positive_int, 256, "validation images used, at most"),
        Flag("val_path", str, "", "images in CLASS/; default: val/ beside train/, if there"),
        Flag("val_cached_path", str, "", "or a cache of them (main_cache.py --split val)"),
        Flag("holdout", non_negative_int, 0, "or so many of the training images"),
    ],
    "evaluation (several num_iter, cfg, temperature: all together)": [
        Flag("evaluate", bool, False, "generate images, measure them and stop"),
        Flag("online_eval", bool, False, "evaluate while training"),
        Flag("eval_freq", positive_int, 40, "epochs between two, while training"),
        Flag("eval_bsz", positive_int, 64, "images a batch"),
        Flag("num_images", positive_int, 50000, "in all, spread over the classes"),
        Flag("classes", str, None, "draw these, by name or by number; default: all", nargs="+"),
        Flag("num_iter", positive_int, [256], "iterations an image", nargs="+"),
        Flag("cfg", non_negative_float, [1.0], "guidance; 1 is none", nargs="+"),
        Flag("cfg_schedule", str, "linear", "of the guidance", CFG_SCHEDULES),
        Flag("cfg_power", positive_float, None, "of the cosine schedule; default: 1"),
        Flag("cfg_interval", fraction, None, "in shares of the iterations", nargs=2),
        Flag("mask_schedule", str, "cosine", "how many stay masked", tuple(MASK_SCHEDULES)),
        Flag("temperature", non_negative_float, [1.0], "of the levels; 0: argmax", nargs="+"),
        Flag("order", str, "random", "in which positions are filled", ORDERS),
        Flag("token_cache", non_negative_int, 0, "approximate: iterations between exact ones"),
        EVAL_WEIGHTS,
        Flag("ema_sigma", width, None, "or these widths, of --posthoc_ema's snapshots", nargs="+"),
        Flag("keep_images", bool, False, "keep the PNG files once they are measured"),
        Flag("save_npz", bool, False, "all images as samples.npz, for ADM's evaluator"),
        Flag("fid_reference", str, None, "real images (folder, npz): FID, KID, precision, recall"),
    ],
    "metrics": METRICS,
    "loader": LOADER,
}


# --- the parser


class Parser(argparse.ArgumentParser):
    """What is wrong gets one line and exit code 2.

    description: the script's docstring; what it says of letters is for readers of the code.
    """

    def __init__(self, description: str):
        super().__init__(
            prog=program(),
            usage="%(prog)s [flags]",
            description=description.partition("\nLetters:")[0],
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,  # a prefix that works today is ambiguous tomorrow
        )
        for kind in (None, str):  # ~ as the shell does, but for --flag=~/folder and in files
            self.register("type", kind, os.path.expanduser)
        text = "settings, as `name: value` in YAML; flags go before them, --no_NAME switches off"
        self.add_argument("--config", metavar="FILE", help=text)

    def add_flags(self, title: str, *flags: Flag):
        """A group, which is returned for further flags."""
        group = self.add_argument_group(title)
        for flag in flags:
            flag.add_to(group)
        return group

    def add_loader_flags(self) -> None:
        self.add_flags("loader", *LOADER)

    def add_device_flags(self, *more: Flag, seed: Flag = SEED) -> None:
        self.add_flags("device", DEVICE, seed, *more)
        add = self.add_flags("processes", *PROCESSES).add_argument
        add("--local_rank", "--local-rank", type=int, default=-1, help="not read [-1]")

    def error(self, message: str):
        print(f"{self.prog}: error: {message} (see --help)", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)

    def parse(self, argv: list[str] | None = None) -> argparse.Namespace:
        """Like parse_args, but begins with the settings of --config."""
        argv = sys.argv[1:] if argv is None else argv
        for before, word in zip(["", *argv], argv, strict=False):
            if not word or re.fullmatch(r"--\w+=", word):  # --resume "$RUN" where RUN is not set
                name = word[:-1] or before
                self.error(f"the value of {name} is empty: set the shell variable, or leave it out")
        args, unknown = self.parse_known_args(argv)
        if args.config:
            args, unknown = self.parse_known_args(argv, self._read(args))
        if unknown:
            hint = did_you_mean(unknown[0].partition("=")[0], self._option_string_actions)
            self.error(f"unknown: {' '.join(unknown)}{hint}")
        return args

    def _read(self, args: argparse.Namespace) -> argparse.Namespace:
        """What the `name: value` lines of --config say.

        args: of the command line. Of the file that a run in another folder has left, the names of
        that run's own files are not taken.
        """
        try:
            said = yaml.safe_load(Path(args.config).read_text(encoding="utf-8")) or {}
            if not isinstance(said, dict):
                raise ValueError("has no lines of the form 'name: value'")
            places = (self.get_default("output_dir"), said.get("output_dir"))
            if said.pop(SAVED_BY, None) and getattr(args, "output_dir", None) not in places:
                said |= dict.fromkeys(OF_ONE_FOLDER)
            said = {name: setting for name, setting in said.items() if setting not in (None, "")}
            return argparse.Namespace(**{str(n): self._setting(str(n), s) for n, s in said.items()})
        except (OSError, ValueError, yaml.YAMLError, RecursionError, argparse.ArgumentError) as e:
            self.error(f"--config {args.config}: {' '.join(str(e).split())}")

    def _setting(self, name: str, setting):
        """The value of a flag, checked as its words are."""
        actions = {a.dest: a for a in self._actions if a.dest not in ("help", "config")}
        if name not in actions:
            raise ValueError(f"{name} is no setting of {self.prog}{did_you_mean(name, actions)}")
        action, is_switch = actions[name], isinstance(setting, bool)
        if setting == [] or is_switch != (action.nargs == 0):
            raise ValueError(f"{name}: {setting!r} is not what --{name} takes")
        words = [str(part) for part in (setting if isinstance(setting, list) else [setting])]
        words = words if action.nargs else [",".join(words)]
        return setting if is_switch else self._get_values(action, words)


def train_parser(description: str) -> Parser:
    """That of main_tokenbridge.py and of the doctor."""
    parser = Parser(description)
    for title, flags in GROUPS.items():
        parser.add_flags(title, *flags)
    parser.add_device_flags(*PRECISION)
    return parser
