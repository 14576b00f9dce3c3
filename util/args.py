"""Command lines: a parser that answers in one line, --config, and the flags of all scripts.

Names and defaults are those of the published scripts. A flag that something else may know better
(a checkpoint, the data, a cache) is None unless it is given; `value` then says the published one.
"""

import argparse
import math
import os
import re
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import yaml

from models.config import HEAD_INPUTS, HEADS, PRESETS, QUANTIZERS, TokenBridgeConfig
from models.generate import PRECISIONS
from models.sampler import CFG_SCHEDULES, ORDERS
from util import dist
from util.data.images import MAX_PIXELS
from util.errors import EXIT_USER_ERROR, UserError, as_user_error, did_you_mean, program
from util.files import LOCK, atomic_write
from util.optim import BLR_BATCH

MAX_BITS = 9  # see GaussianQuantizer
INCEPTION = "inception-v3-compat"  # as torch-fidelity calls it
CONFIG, EVALUATION_CONFIG = "config.yaml", "config-evaluation.yaml"
# Of one call, or of one process, and not of what it does.
NOT_SAVED = ("config", "dry_run", "world_size", "local_rank")
# Where a run writes besides its folder: a run in another folder leaves them alone.
OF_ONE_FOLDER = ("metrics_file", "log_dir")
SAVED_BY, GIVEN = "saved_by", "given"  # in files that a run has left; the second until version 0.1
COMMANDS = ("python ", "torchrun ")  # how a paragraph of examples begins


# --- types of values


def bounded(kind: type, low: float = -math.inf, high: float = math.inf, least: float | None = None):
    """A finite number in [low, high], and above `least` if that is given."""

    def parse(text: str):
        number = kind(text)
        if not math.isfinite(number):
            raise argparse.ArgumentTypeError(f"{text} is not finite")
        if not low <= number <= high or (least is not None and number <= least):
            beyond = f" and above {least:g}" if least is not None else ""
            raise argparse.ArgumentTypeError(f"{text} is not in [{low:g}, {high:g}]{beyond}")
        return number

    parse.__name__ = kind.__name__
    return parse


positive_int = bounded(int, 1)
non_negative_int = bounded(int, 0)
random_seed = bounded(int, 0, 2**63 - 1)
finite_float = bounded(float)
non_negative_float = bounded(float, 0)
positive_float = bounded(float, 0, least=0)
fraction = bounded(float, 0, 1)
bit_width = bounded(int, 1, MAX_BITS)


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


def metrics_path(text: str) -> str:
    if Path(text).suffix != ".jsonl":
        raise argparse.ArgumentTypeError(f"{text} does not end in .jsonl")
    return text


# --- flags


@dataclass(frozen=True)
class Flag:
    """kind: makes the value of the word; bool is a switch. published: what `value` says of a flag
    that is None unless given.
    """

    name: str
    kind: Callable
    default: object
    help: str
    choices: tuple[str, ...] | None = None
    nargs: str | None = None
    published: object = None

    def add_to(self, group) -> None:
        if self.kind is bool:
            group.add_argument(f"--{self.name}", action="store_true", help=self.help)
            return
        shown = self.published if self.default in (None, "") else self.default
        listed = shown if isinstance(shown, list) else [shown]
        default = f" [{' '.join(map(str, listed))}]" if shown not in (None, "") else ""
        metavar = {"int": "N", "float": "X"}.get(self.kind.__name__, "VALUE")
        group.add_argument(
            f"--{self.name}",
            type=self.kind,
            default=self.default,
            choices=self.choices,
            nargs=self.nargs,
            metavar=None if self.choices else metavar,
            help=(self.help + default).replace("%", "%%"),
        )


PUBLISHED: dict[str, object] = {}


def auto(name: str, kind: Callable, published, help: str, choices=None) -> Flag:
    """A flag that is None unless given, where something else may know better."""
    PUBLISHED[name] = published
    return Flag(name, kind, None, help, choices, published=published)


def model_flag(name: str, kind: Callable, help: str, choices=None) -> Flag:
    """A setting of the model, which a checkpoint knows."""
    return auto(name, kind, getattr(TokenBridgeConfig(), name), help, choices)


def value(args: argparse.Namespace, name: str):
    """What a flag says, or the published value where it was not given."""
    given = getattr(args, name)
    return PUBLISHED.get(name) if given is None else given


DATA_PATH = auto("data_path", str, "./data/imagenet", "images in train/CLASS/")
CACHED_PATH = Flag("cached_path", str, "", "the cache that main_cache.py made")
QUANTIZER = model_flag("quantizer", str, "or fitted to --cached_path's latents", QUANTIZERS)
METRICS_FILE = Flag("metrics_file", metrics_path, None, "figures for programs, a line of JSON each")
JSON = Flag("json", bool, False, "the final figures as JSON on stdout, all else on stderr")
SEED = auto("seed", random_seed, 1, "of everything random")
DEVICE = Flag("device", str, "cuda", "cuda, mps or cpu; what the machine has instead is used")
RESUME = Flag("resume", str, "", "folder or file of a checkpoint; auto: the newest of --output_dir")
EVAL_WEIGHTS = Flag("eval_weights", str, "ema", "averaged or raw weights", ("ema", "model"))
EXTRACTOR = [
    Flag(
        "feature_extractor", str, INCEPTION, "of torch-fidelity, or MODULE:NAME, registered there"
    ),
    Flag("inception_weights", str, None, "of the extractor, torch-fidelity's Inception or other"),
]
DATA = [
    DATA_PATH,
    Flag("use_cached", bool, False, "read latents, not images"),
    CACHED_PATH,
    Flag("no_flip", bool, False, "no mirror images (digits, text)"),
    Flag("output_dir", str, "./output_dir", "checkpoints, logs and images"),
    Flag("log_dir", str, "", "TensorBoard's; default: --output_dir"),
    METRICS_FILE,
    JSON,
    Flag("dry_run", bool, False, "check everything, make one step, say what a training takes"),
    RESUME,
    Flag("finetune", str, "", "begin with a checkpoint's averaged weights, for other classes too"),
]
LATENT_SCALE = auto("latent_scale", latent_scale, "auto", "1 / std; auto: the cache's, KL-16's")
MODEL = [
    auto("model", str, "tokenbridge_large", "size", PRESETS),
    auto("quant_bits", bit_width, 6, "bits a latent scalar"),
    QUANTIZER,
    model_flag("vae_stride", positive_int, "pixels a latent position"),
    model_flag("patch_size", positive_int, "latent positions a token, along one side"),
    model_flag("class_num", positive_int, "classes; else as many as data or checkpoint have"),
    model_flag("quant_min", finite_float, "lowest scaled latent"),
    model_flag("quant_max", finite_float, "highest scaled latent"),
    model_flag("buffer_size", positive_int, "slots filled with the class"),
    model_flag("attn_dropout", fraction, "on attention weights"),
    model_flag("proj_dropout", fraction, "after projections"),
    model_flag("label_drop_prob", fraction, "share of labels dropped in training"),
    model_flag("mask_ratio_min", fraction, "least share of masked positions in training"),
    Flag("use_quantized_value", bool, False, "the encoder's input; it always is, as published"),
    LATENT_SCALE,
    auto("channel_order", channel_order, "auto", "the head's, as 8,1,10...; auto: likewise"),
    model_flag("head_input", str, "the sampler's first input to the head", HEAD_INPUTS),
    model_flag("head", str, "what predicts a token; mar_*: diffusion", tuple(HEADS)),
    model_flag("head_share", fraction, "of the masked positions, whose loss is computed"),
    model_flag("head_steps", head_steps, "of the masked head [4], or channels of each, as 2,2,5,7"),
    model_flag("mixture_components", positive_int, "of the mixture head [16]"),
    model_flag("diffloss_d", positive_int, "blocks of the diffusion head [3]"),
    model_flag("diffloss_w", positive_int, "width of the diffusion head [1024]"),
    model_flag("diffusion_batch_mul", positive_int, "timesteps a token in training [1]"),
    model_flag("num_sampling_steps", positive_int, "of the diffusion head [100]"),
]
VAE_PATH = auto("vae_path", str, "pretrained_models/vae/kl16.ckpt", "its weights, or a folder")
VAE = [
    model_flag("img_size", positive_int, "pixels, of a side"),
    VAE_PATH,
    model_flag("vae_embed_dim", positive_int, "latent channels"),
]
TRAINING = [
    auto("batch_size", positive_int, 16, "samples of a micro-batch"),
    auto("accum_iter", positive_int, 1, "micro-batches a step, of each process"),
    Flag("global_batch", positive_int, None, "samples a step, on any number of processes"),
    Flag("epochs", positive_int, 400, "in all, with those of --resume"),
    Flag("start_epoch", non_negative_int, 0, "the first one, without --resume"),
    Flag("warmup_epochs", non_negative_float, 100, "in which the rate rises from 0"),
    Flag("lr", non_negative_float, None, "peak learning rate; default: by --blr"),
    Flag("blr", non_negative_float, 1e-4, f"lr = blr * samples a step / {BLR_BATCH}"),
    Flag("min_lr", non_negative_float, 0.0, "learning rate at the end"),
    auto("lr_schedule", str, "cosine", "after warm-up; mar_*: constant", ("cosine", "constant")),
    Flag("weight_decay", non_negative_float, 0.02, "AdamW's"),
    Flag("grad_clip", positive_float, 3.0, "largest norm of the gradient"),
    Flag("ema_rate", fraction, 0.9999, "of the averaged weights, a step"),
    Flag("grad_checkpointing", bool, False, "less memory: recompute all blocks"),
    Flag("head_chunk", non_negative_int, None, "positions the head works on at once; 0 is all"),
    Flag("log_freq", positive_int, 20, "steps between two log lines"),
    Flag("max_skipped", positive_int, 20, "steps in a row, not finite, after which to stop"),
]
SAVING = [
    Flag("save_last_freq", positive_int, 5, "epochs between two"),
    Flag("save_steps", non_negative_int, 0, "steps, besides; 0: never"),
    Flag("save_minutes", non_negative_float, 30.0, "minutes, besides; 0: never"),
    Flag("keep_checkpoints", positive_int, 2, "how many of the last stay"),
    Flag("save_every", non_negative_int, 0, "epochs between those that all stay; 0: none"),
]
VALIDATION = [
    Flag("preview_freq", non_negative_float, 1.0, "epochs between image grids; 0: never"),
    Flag("preview_images", positive_int, 8, "of each, raw and averaged weights"),
    Flag("preview_iter", positive_int, 32, "iterations; guided as by --cfg"),
    Flag("val_freq", non_negative_float, 1.0, "epochs between validation losses; 0: never"),
    Flag("val_images", positive_int, 256, "validation images used, at most"),
    Flag("val_path", str, "", "validation images in CLASS/; default: val/ beside train/, if there"),
    Flag("val_cached_path", str, "", "or a cache of them (main_cache.py --split val)"),
    Flag("holdout", non_negative_int, 0, "or so many of the training images"),
]
SAMPLING = [
    Flag("num_iter", positive_int, [256], "iterations an image", nargs="+"),
    Flag("cfg", non_negative_float, [1.0], "guidance; 1 is none", nargs="+"),
    Flag("cfg_schedule", str, "linear", "of the guidance", CFG_SCHEDULES),
    Flag("temperature", non_negative_float, [1.0], "of the levels; 0: argmax", nargs="+"),
    Flag("order", str, "random", "in which positions are filled", ORDERS),
    Flag("token_cache", non_negative_int, 0, "approximate: iterations between whole ones; 0: off"),
]
EVALUATION = [
    Flag("evaluate", bool, False, "generate images, measure them and stop"),
    Flag("online_eval", bool, False, "evaluate while training"),
    Flag("eval_freq", positive_int, 40, "epochs between two, while training"),
    Flag("eval_bsz", positive_int, 64, "images a batch"),
    Flag("num_images", positive_int, 50000, "in all, spread over the classes"),
    Flag("classes", str, None, "draw these, by name or by number; default: all", nargs="+"),
    *SAMPLING,
    EVAL_WEIGHTS,
    Flag("keep_images", bool, False, "keep the PNG files once they are measured"),
    Flag("save_npz", bool, False, "all images as samples.npz, for ADM's evaluator"),
    Flag("fid_reference", str, None, "real images, a folder or npz: FID, KID, precision, recall"),
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
]
RECOGNISED, UNREAD = "torchrun and Slurm are recognised by their environment", "not read [-1]"
PROCESSES = [
    Flag("world_size", int, 1, "set by the launcher; not read"),
    Flag("dist_on_itp", bool, False, "started by Open MPI"),
    Flag("dist_url", str, "env://", "where they meet"),
    Flag("dist_timeout", positive_float, dist.NO_PROGRESS, "seconds without progress: all stop"),
]
PRECISION = [
    Flag("precision", str, "auto", "auto: bf16 on CUDA, else fp16; fp32 elsewhere", PRECISIONS),
    Flag("compile", bool, False, "compile the blocks: minutes at the start, faster steps"),
]


# --- the parser


class Parser(argparse.ArgumentParser):
    """--help shows defaults in 80 columns; a wrong flag gets one line and exit code 2.

    description: the script's docstring; what it says of letters is for readers of the code.
    """

    def __init__(self, description: str):
        super().__init__(
            prog=program(),
            description=description.partition("\nLetters:")[0],
            formatter_class=_HelpFormatter,
            allow_abbrev=False,  # a prefix that works today is ambiguous tomorrow
        )
        self.source = ""  # of what is parsed: a file, or the command line
        self.add_argument(
            "--config",
            metavar="FILE",
            help="settings, as `name: value` in YAML, or the config.yaml of a run; flags go before "
            "them, and --no_NAME switches off what the file switches on",
        )

    def add_flags(self, title: str, *flags: Flag, about: str | None = None):
        """A group, which is returned for further flags."""
        group = self.add_argument_group(title, about)
        for flag in flags:
            flag.add_to(group)
        return group

    def add_loader_flags(self) -> None:
        group = self.add_flags("loader", *LOADER)
        group.add_argument(
            "--pin_mem", action="store_true", default=True, help="page-locked batches (default)"
        )
        group.add_argument("--no_pin_mem", action="store_false", dest="pin_mem", help="pageable")

    def add_device_flags(self, *more: Flag, seed: Flag = SEED) -> None:
        self.add_flags("device", DEVICE, seed, *more)
        group = self.add_flags("processes", *PROCESSES, about=RECOGNISED)
        group.add_argument("--local_rank", "--local-rank", type=int, default=-1, help=UNREAD)

    def error(self, message: str):
        if self.source and "are required" in message:
            return  # the command line may give it
        print(f"{self.prog}: error: {self.source}{message} (see --help)", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)

    def parse(self, argv: list[str] | None = None) -> argparse.Namespace:
        """Like parse_args, with the settings of --config before the words of the command line."""
        self._add_negations()
        argv = [expand_home(word) for word in (sys.argv[1:] if argv is None else argv)]
        self._refuse_empty(argv)
        words, path = [], _value_of("--config", argv)
        if path is not None:
            self.source = f"--config {path}: "
            try:
                words = self._words_of(path, _value_of("--output_dir", argv))
            except (ValueError, OSError, RecursionError) as error:
                self.error(getattr(error, "strerror", None) or " ".join(str(error).split()))
            self.parse_known_args(words)
            self.source = ""
        args, unknown = self.parse_known_args(words + argv)
        if unknown:
            self.error(f"unknown: {' '.join(unknown)}{self._hint(unknown)}")
        return args

    def _words_of(self, path: str, output_dir: str | None) -> list[str]:
        """The words of a command line that say what a file of settings says, each checked alone.

        output_dir: the one that the command line names. Of the file that a run in another folder
        has left, the names of that run's own files are not taken.
        """
        settings = read_settings(path)
        elsewhere = output_dir not in (None, settings.get("output_dir"))
        if settings.pop(SAVED_BY, None) and elsewhere:
            settings = {k: v for k, v in settings.items() if k not in OF_ONE_FOLDER}
        words: list[str] = []
        for name, setting in settings.items():
            words += self._words(name, setting)
        return words

    def _words(self, name: str, setting) -> list[str]:
        actions = {
            option.removeprefix("--"): action
            for action in self._actions
            for option in action.option_strings
            if action.dest not in ("help", "config") and action.help != argparse.SUPPRESS
        }
        if name not in actions:
            raise ValueError(f"{name} is no setting of {self.prog}{did_you_mean(name, actions)}")
        action = actions[name]
        if action.nargs == 0:
            if not isinstance(setting, bool):
                raise ValueError(f"{name}: {setting!r} is not true or false")
            return [f"--{name}"] if setting else [] if name == "no_pin_mem" else [f"--no_{name}"]
        if setting is None or setting == "":
            return []
        parts = setting if isinstance(setting, list) else [setting]
        if not parts or any(isinstance(p, bool | dict | list | None.__class__) for p in parts):
            raise ValueError(f"{name}: {setting!r} is not a value or a list of values")
        parts = [os.path.expanduser(str(part)) for part in parts]
        if action.nargs:
            return [f"--{name}", *parts]
        return [f"--{name}={','.join(parts)}"]  # --channel_order 8,1,10

    def _refuse_empty(self, words: list[str]) -> None:
        """No flag has an empty value to mean: --resume "$RUN" has one where RUN is not set."""
        for before, word in zip(["", *words], words, strict=False):
            if word == "" or re.fullmatch(r"--\w+=", word):
                name = (word or before).rstrip("=")
                where = f"the value of {name}" if name.startswith("-") else "an argument"
                self.error(
                    f"{where} is empty: set the shell variable, or leave the flag out (and, to "
                    "undo what a file of settings says, remove its line there)"
                )

    def _add_negations(self) -> None:
        """--no_NAME for every switch, to turn off what a file turns on."""
        for action in list(self._actions):
            name = f"--no_{action.dest}"
            if (
                action.nargs == 0
                and action.const is True
                and name not in self._option_string_actions
            ):
                self.add_argument(
                    name, dest=action.dest, action="store_false", help=argparse.SUPPRESS
                ).default = argparse.SUPPRESS

    def _hint(self, unknown: list[str]) -> str:
        """The flag that may have been meant."""
        flag = next((word.split("=")[0] for word in unknown if word.startswith("--")), None)
        return did_you_mean(flag, self._option_string_actions) if flag is not None else ""


class _HelpFormatter(argparse.HelpFormatter):
    """The script's paragraphs, one placeholder a flag, and no wall of flags on top."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=28)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        """Paragraphs are filled anew; of a paragraph of commands, each stays one."""
        filled = []
        for paragraph in text.strip().split("\n\n"):
            commands = paragraph.startswith(COMMANDS)
            for part in paragraph.splitlines() if commands else [" ".join(paragraph.split())]:
                lines = textwrap.wrap(part, width - 6, break_long_words=False)
                filled.append((" \\\n    " if commands else "\n").join(lines))
            filled.append("")
        return "\n".join(filled).rstrip()

    def _format_action_invocation(self, action: argparse.Action) -> str:
        """As Python 3.13 does: the placeholder once, whatever the number of spellings."""
        if not action.option_strings or action.nargs == 0:
            return super()._format_action_invocation(action)
        values = self._format_args(action, action.dest.upper())
        return f"{', '.join(action.option_strings)} {values}"

    def _format_usage(self, usage, actions, groups, prefix) -> str:
        """What must be given; all the rest is below, explained."""
        needed = [a for a in actions if a.required or not a.option_strings]
        text = super()._format_usage(usage, needed, [], prefix)
        return f"{text.rstrip()} [flags]\n\n"


def expand_home(word: str) -> str:
    """~ and ~user in every value, as the shell does, but for --flag=~/folder, where it does not."""
    flag, equals, text = word.partition("=")
    if equals and flag.startswith("--"):
        return f"{flag}={os.path.expanduser(text)}"
    return os.path.expanduser(word)


def _value_of(flag: str, argv: list[str]) -> str | None:
    """The last value of a flag on a command line, before it is parsed."""
    found = None
    for word, following in zip(argv, [*argv[1:], None], strict=False):
        found = following if word == flag else found
        found = word.partition("=")[2] if word.startswith(f"{flag}=") else found
    return found


def train_parser(description: str) -> Parser:
    """That of main_tokenbridge.py and of the doctor."""
    parser = Parser(description)
    parser.add_flags("data and output", *DATA)
    parser.add_flags("model", *MODEL, about="a checkpoint made here knows its own settings")
    parser.add_flags("tokenizer", *VAE)
    parser.add_flags(
        "training", *TRAINING, about="a step takes batch_size x accum_iter samples a process"
    )
    parser.add_flags("checkpoints", *SAVING, about="written in the background")
    parser.add_flags(
        "validation while training",
        *VALIDATION,
        about="to TensorBoard; parts of epochs are possible, 0 is never; images are drawn with "
        "--cfg and --temperature",
    )
    parser.add_flags(
        "evaluation",
        *EVALUATION,
        about="several values of num_iter, cfg or temperature: all combinations, compared",
    )
    parser.add_flags("metrics", *METRICS)
    parser.add_loader_flags()
    parser.add_device_flags(*PRECISION)
    return parser


# --- files of settings


def read_settings(path: str) -> dict:
    """The `name: value` lines of a YAML file. Raises ValueError on anything else.

    Files of runs until version 0.1 hold every value, and the names of those that were given.
    """
    try:
        settings = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"is no file of settings ({' '.join(str(error).split())})") from error
    settings = {} if settings is None else settings
    if not isinstance(settings, dict) or not all(isinstance(name, str) for name in settings):
        raise ValueError("has no lines of the form 'name: value'")
    given = settings.pop(GIVEN, None)
    if given is not None:
        settings[SAVED_BY] = "version 0.1"
        for name in [name for name in settings if name not in given]:
            if settings[name] == PUBLISHED.get(name):
                del settings[name]
    return settings


def to_save(args: argparse.Namespace) -> dict:
    """The settings of a call as plain values, --channel_order as its flag has it."""
    return {
        name: ",".join(map(str, setting)) if isinstance(setting, tuple) else setting
        for name, setting in vars(args).items()
        if name not in NOT_SAVED
    }


def changed(args: argparse.Namespace, parser: argparse.ArgumentParser) -> str:
    """What is not as by default, in one line."""
    words = []
    for name, setting in to_save(args).items():
        if setting not in (parser.get_default(name), PUBLISHED.get(name, parser)):
            parts = setting if isinstance(setting, list) else [setting]
            words.append(f"{name}={' '.join(map(str, parts))}")
    return f"settings: {', '.join(words) or 'the defaults'}"


@contextmanager
def settings_saved(
    args: argparse.Namespace, path: Path, remarks: str = "", step: int = 0
) -> Iterator[None]:
    """Leave the settings of a job beside what it makes, from the main process.

    A job that fails before it has left anything else leaves nothing at all. remarks: what the
    settings led to, for comments. step: with which a training goes on; other settings than the
    last time are kept as those before it.
    """
    if not dist.is_main():
        yield
        return
    save_settings(args, path, remarks, step)
    try:
        yield
    except BaseException:
        if all(other.name in (path.name, LOCK) for other in path.parent.iterdir()):
            path.unlink(missing_ok=True)
        raise


def save_settings(args: argparse.Namespace, path: Path, remarks: str = "", step: int = 0) -> None:
    """Write a file that makes the same call again; for the arguments, see `settings_saved`."""
    settings = to_save(args) | {SAVED_BY: program()}
    body = yaml.safe_dump(settings, sort_keys=False, default_flow_style=None, allow_unicode=True)
    with as_user_error(f"{path}: cannot write", (OSError,)):
        path.parent.mkdir(parents=True, exist_ok=True)
        before = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
        if "".join(re.findall(r"^[^#].*\n?", before, re.MULTILINE)) == body:
            return
        # A second change at one step has trained nothing with the first.
        earlier = path.with_name(f"{path.stem}-before-step{step:08d}{path.suffix}")
        if before and step and not earlier.exists():
            _write(earlier, before)
        _write(path, "".join(f"# {line}\n" for line in remarks.splitlines()) + body)


def _write(path: Path, text: str) -> None:
    with atomic_write(path) as file:
        file.write(text.encode())


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
