"""Checkpoints in the published form, and how a `--resume` finds them.

A checkpoint is a dict with the published keys `model`, `model_ema` (parameters only),
`optimizer`, `epoch`, `scaler`, and ours: `step`, `schedule` (what a step is made of), `config`
(the model's settings), `classes`, `vae_sha256`, `args`, and `averages` where there are others than
`model_ema`, by their names. `util.saver` writes them.
"""

import errno
import math
import os
import shutil
import sys
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from numbers import Integral
from pathlib import Path

import torch
from torch import Tensor

from models.config import TokenBridgeConfig
from models.hub import CONFIG, WEIGHTS
from models.tokenbridge import CLASS_ROWS, POSITIONS, TokenBridge, resized_positions
from util import dist
from util.errors import UserError, as_user_error
from util.files import atomic_write, flush, listed, load_tensors, unwrapped
from util.optim import EMA, PowerEMA, load_moments

LAST = "checkpoint-last.pth"
AUTO = "auto"
FINETUNE = "--finetune"
# What --eval_weights calls a checkpoint's averaged and raw weights, and their keys in it.
WEIGHT_KEYS = {"ema": "model_ema", "model": "model"}
# Names that training gives; a copy beside them, such as -good.pth, is its owner's.
STEP_FILES = f"checkpoint-step{'[0-9]' * 8}.pth"
EPOCH_FILES = f"checkpoint-epoch{'[0-9]' * 4}.pth"
SNAPSHOTS = "posthoc_ema"  # the folder of `util.posthoc_ema`
# Of a network's file system, of permissions and limits: the file may be whole, and read tomorrow.
OUT_OF_REACH = {errno.ESTALE, errno.ETIMEDOUT, errno.EACCES, errno.EPERM, errno.EMFILE}


@dataclass(frozen=True)
class Checkpoint:
    """saved: what is in the file. flag: that named it. Without a path, it is no checkpoint: it is
    false, and knows nothing.
    """

    path: Path | None = None
    saved: dict = field(default_factory=dict)
    flag: str = "--resume"

    def __bool__(self) -> bool:
        return self.path is not None

    @property
    def named(self) -> str:
        return f"{self.flag} {self.path}"

    @property
    def begins(self) -> bool:
        """Whether a training begins, with its weights if there are any: no run goes on."""
        return not self or self.flag == FINETUNE

    @property
    def config(self) -> TokenBridgeConfig | None:
        """The model's settings; None if the file comes from the published code."""
        if "config" not in self.saved:
            return None
        with as_user_error(self.named, (ValueError, TypeError, AttributeError)):
            return TokenBridgeConfig.from_dict(self.saved["config"])

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes it was trained on, by label, if it says."""
        return tuple(map(str, self.saved.get("classes") or ()))

    @property
    def averages(self) -> dict[str, dict[str, Tensor]]:
        """State dicts by the names of `util.optim.build_averages`."""
        others = self.saved.get("averages", {})
        if not isinstance(others, dict):
            raise UserError(f"{self.named}: 'averages' is no dict of state dicts")
        rates = self.argument("ema_rate")
        if not rates:
            return others
        first = rates[0] if isinstance(rates, list) else rates  # one, before there were more
        return {str(first): self.saved.get("model_ema")} | others

    def weights(self, key: str) -> dict[str, Tensor]:
        """The state dict under `model`, `model_ema` or an average's name."""
        state = self.saved[key] if key in self.saved else self.averages.get(key)
        if not isinstance(state, dict) or not all(isinstance(t, Tensor) for t in state.values()):
            raise UserError(f"{self.named}: no state dict {key!r} (it has {listed(self.saved)})")
        return state

    def key(self, kind: str) -> str:
        """Where the weights are that --eval_weights names. Raises UserError if it has others."""
        if (only := self.saved.get("weights", kind)) != kind:
            remedy = f"pass --eval_weights {only}"
            raise UserError(f"{self.named} holds the {only} weights alone; {remedy}")
        keys = WEIGHT_KEYS | {name: name for name in self.averages}
        if kind not in keys:
            raise UserError(f"--eval_weights {kind}: {self.named} has {', '.join(keys)}")
        return keys[kind]

    def load_into(self, model: TokenBridge, key: str) -> None:
        """Load one of its state dicts; every tensor must match."""
        state, classes = self.weights(key), model.config.class_num
        with as_user_error(f"{self.named}, {key!r}"):
            if (rows := len(state.get(CLASS_ROWS, ()))) not in (0, classes):
                raise ValueError(f"{rows} classes, not --class_num {classes}; see {FINETUNE}")
            for name, tensor in state.items():
                if not tensor.isfinite().all():
                    raise ValueError(f"{name} is not finite; take an earlier checkpoint")
            model.load_published(state, head_input=model.config.head_input)

    def to_finetune(self) -> "Checkpoint":
        """Its averaged weights alone, the raw ones where it has no others, and its settings."""
        keys = [key for key in ("model", "model_ema") if key in self.saved]
        state = {name: tensor for key in keys for name, tensor in self.weights(key).items()}
        if CLASS_ROWS not in state or len(set(POSITIONS) & set(state)) != 3:
            held = listed(state or self.saved)
            raise UserError(f"{self.named}: no TokenBridge model in it (it has {held})")
        saved = {k: v for k, v in self.saved.items() if k in ("classes", "vae_sha256", "config")}
        kind = self.saved.get("weights", "ema" if "model_ema" in keys else "model")
        return replace(self, saved=saved | {"model": state, "weights": kind})

    def fitted(
        self, config: TokenBridgeConfig, classes: list[str], seed: int
    ) -> tuple["Checkpoint", list[str]]:
        """Its class embedding and positions made those of a model, and what was done.

        classes: of the data, by label. Rows stay by the classes' names, where the file knows them;
        else by number, unless the data have fewer classes than it. The others are drawn anew.
        """
        state, count = self.saved["model"], config.class_num
        rows, width = state[CLASS_ROWS].shape
        if self.classes and classes:
            number, how = {name: i for i, name in enumerate(self.classes[:rows])}, "by name"
            kept = {i: number[name] for i, name in enumerate(classes[:count]) if name in number}
        else:
            fewer, how = 0 < len(classes) < rows, "by number"
            kept = {} if fewer else {i: i for i in range(min(rows, count))}
        generator = torch.Generator().manual_seed(seed)
        table = torch.randn(count, width, generator=generator) * 0.02
        for i, row in kept.items():
            table[i] = state[CLASS_ROWS][row]
        new = [name for i, name in enumerate(classes) if i not in kept]
        drawn = f"{count - len(kept)} new" + (f" ({listed(new)})" if new else "")
        kind = "averaged" if self.saved["weights"] == "ema" else "raw"
        notes = [f"beginning with the {kind} weights of {self.named}"]
        notes += [f"class embedding: {len(kept)} of {rows} rows kept {how}; {drawn}"]
        length = min(state[name].shape[1] for name in POSITIONS if name in state)
        sides = [math.isqrt(length), config.grid_size]
        if sides[0] != sides[1]:
            notes.append("positions interpolated from {0} x {0} to {1} x {1}".format(*sides))
        state = resized_positions(state, config.grid_size) | {CLASS_ROWS: table}
        return replace(self, saved=self.saved | {"model": state, "classes": classes}), notes

    def release(self) -> None:
        """Let go of the tensors."""
        for key in ("model", "model_ema", "averages", "optimizer"):
            self.saved.pop(key, None)

    def load_training_state(
        self,
        averages: dict[str, EMA],
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
    ) -> list[str]:
        """Load all but the model itself; returns what a user should know of it.

        Weights of one kind alone are also the average's first. Another rate than before goes on
        from `model_ema` if it is the first, else from the weights.
        """
        notes, known, goes_on = [], self.averages, "optimizer" in self.saved
        for number, (name, ema) in enumerate(averages.items()):
            key = name if name in known else "model_ema"
            if name in known or (number == 0 and (goes_on or key in self.saved)):
                with as_user_error(f"{self.named}, {key!r}"):
                    ema.load_state_dict(self.weights(key))
            elif number and goes_on and isinstance(ema, PowerEMA):
                begin = "its tracks begin with the training"
                raise UserError(f"--posthoc_ema: {self.named} has no {name}; {begin}")
            elif number:
                notes.append(f"the average {name} begins with the weights of {self.named}")
        if not goes_on:
            return notes
        if dropped := sorted(set(self.saved.get("averages", ())) - set(averages)):
            flags = "--ema_rate and --posthoc_ema name others"
            notes.append(f"warning: the averages {', '.join(dropped)} end here; {flags}")
        damaged = (ValueError, LookupError, TypeError, AttributeError, RuntimeError)
        with as_user_error(f"{self.named}, 'optimizer' or 'scaler'", damaged):
            load_moments(optimizer, self.saved["optimizer"])
            if self.saved.get("scaler"):
                scaler.load_state_dict(self.saved["scaler"])
        return notes

    def argument(self, name: str):
        """A flag of the run that wrote it, if it says."""
        args = self.saved.get("args")
        return args.get(name) if isinstance(args, dict) else None

    def last_rate(self) -> float | None:
        """The learning rate of the step before it was saved, if it says."""
        with suppress(LookupError, TypeError, ValueError):
            return float(self.saved["optimizer"]["param_groups"][0]["lr"])

    def whole_number(self, name: str, default: int | None = None) -> int:
        """`epoch`, `step`, ... as the file has it. Raises UserError if it is none."""
        value = self.saved.get(name, default)
        if not isinstance(value, Integral):
            raise UserError(f"{self.named}: {name!r} is {value!r:.60}, not a whole number")
        return int(value)


def load_checkpoint(path: Path, flag: str = "--resume") -> Checkpoint:
    """Read a checkpoint, its checksums compared. A state dict alone is its raw weights."""
    saved = load_tensors(path, flag, wide=True)
    bare = saved.get("state_dict", saved)
    tensors = isinstance(bare, dict) and all(isinstance(value, Tensor) for value in bare.values())
    if "model" not in saved and tensors and bare:
        saved = {"model": bare, "weights": "model"}
    for key in [key for key in ("model", "model_ema") if isinstance(saved.get(key), dict)]:
        with as_user_error(f"{flag} {path}, {key!r}"):
            own = unwrapped(saved[key])
        if own.keys() != saved[key].keys():
            dist.print_main(f"{flag} {path}, {key!r}: without module. and _orig_mod. in its names")
        saved[key] = own
    return Checkpoint(path, saved, flag)


def load_exported(folder: Path, flag: str) -> Checkpoint | None:
    """A folder of util.export, if it is one: weights of one kind, which stand for both kinds."""
    if not (folder / WEIGHTS).is_file():
        return None
    with as_user_error(flag, (ValueError, OSError)):
        model = TokenBridge.from_pretrained(folder)
    state = model.published_state_dict()
    averaged = {name: state[name] for name, _ in model.published_parameters()}
    saved = {"model": state, "model_ema": averaged, "config": model.config.to_dict()}
    saved |= {name: value for name, value in asdict(model.origin).items() if value is not None}
    return Checkpoint(folder / WEIGHTS, saved, flag)


def find_checkpoint(
    resume: str,
    output_dir: str,
    must_exist: bool,
    read_only: bool = False,
    flag: str = "--resume",
) -> Checkpoint | None:
    """The checkpoint that --resume or another flag names: a folder, a file, a folder of
    util.export, or "auto", the newest whole one of --output_dir.

    None if there is none yet in --output_dir, which the published commands name from the first
    start on. Raises UserError if it is missing anywhere else, or damaged.
    """
    folder, path = Path(output_dir), Path(resume)
    own = resume == AUTO or path.resolve() == folder.resolve()
    if resume == AUTO:
        found = newest_whole(folder, read_only)
    else:
        # Killed between a checkpoint and its second name, a run has a newer one than LAST.
        files = saved_in(folder) if own else []
        files += [file for file in (path, path / LAST) if file.is_file() and file.name != WEIGHTS]
        found = load_checkpoint(files[0], flag) if files else load_exported(path, flag)
    if found is None and (must_exist or not own):
        raise UserError(
            f"{flag} {resume} does not exist or holds no whole checkpoint; name a folder with "
            f"{LAST}, a .pth file, or an export's folder with {CONFIG} and {WEIGHTS}"
        )
    return found


def saved_in(folder: Path) -> list[Path]:
    """The checkpoints of a run, newest first; a file that has several names once."""
    steps, epochs = (sorted(folder.glob(f), reverse=True) for f in (STEP_FILES, EPOCH_FILES))
    kept: list[Path] = []
    for path in (*steps, folder / LAST, *epochs):
        if path.is_file() and not any(path.samefile(other) for other in kept):
            kept.append(path)
    return kept


def newest_whole(folder: Path, read_only: bool = False) -> Checkpoint | None:
    """The newest checkpoint that can be read, the same for all; damaged ones are set aside.

    read_only: change nothing in the folder; the newest one must be whole then.
    """
    found, lost = None, False
    if dist.is_main():
        for path in saved_in(folder):
            try:
                found = load_checkpoint(path)
                break
            except UserError as error:
                if read_only or getattr(error.__cause__, "errno", None) in OUT_OF_REACH:
                    raise
                aside = path.with_name(path.name + ".damaged")
                os.replace(path, aside)
                print(f"{error}; set aside as {aside.name}", file=sys.stderr, flush=True)
        if found is not None and not read_only:
            with as_user_error(f"--output_dir {folder}: cannot write", (OSError,)):
                give_name(found.path, folder / LAST)
        # Those set aside before count: the next attempt must not begin from scratch.
        lost = found is None and any(folder.glob("checkpoint-*.pth.damaged"))
    path, lost = dist.gather_objects((found and found.path, lost))[0]
    if lost:
        remedy = "give a mended one its name back, or name another --output_dir"
        raise UserError(f"--resume auto: all checkpoints in {folder} are damaged; {remedy}")
    return load_checkpoint(path) if path and not found else found


def give_name(path: Path, name: Path) -> None:
    """Let a whole file have a second name, without a copy where links exist."""
    if name.exists() and name.samefile(path):
        return
    temporary = name.with_name(f".{name.name}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(path, temporary)
        os.replace(temporary, name)
        flush(name.parent)
    except OSError:  # a file system without links
        with path.open("rb") as source, atomic_write(name) as copy:
            shutil.copyfileobj(source, copy)


def same_place(known: str | None, path: str) -> bool:
    """Whether both name one folder of a checkpoint, or the checkpoint in it."""
    places = [Path(place).resolve() for place in (known, path) if place]
    folders = [place.parent if place.name == LAST else place for place in places]
    return len(folders) == 2 and folders[0] == folders[1]


def refuse_other_run(output_dir: str, checkpoint: Checkpoint | None) -> None:
    """Raise UserError if a run would write over the checkpoints of another one."""
    found = saved_in(Path(output_dir))
    if checkpoint and checkpoint.path.parent.resolve() == Path(output_dir).resolve():
        step = checkpoint.saved.get("step", 0)
        found = [path for path in found[:1] if path.name > f"checkpoint-step{step:08d}.pth"]
    if found:
        begun = f"from {checkpoint.path}" if checkpoint else "from scratch"
        raise UserError(
            f"--output_dir {output_dir} holds {found[0].name}, which a run {begun} would replace; "
            "pass --resume auto to go on with it, or name another folder"
        )
