"""Checkpoints in the published form, and how a `--resume` finds them.

A checkpoint is a dict with the published keys `model`, `model_ema` (parameters only),
`optimizer`, `epoch`, `scaler`, and ours: `step`, `schedule` (what a step is made of), `config`
(the model's settings), `classes`, `vae_sha256`, `args`. It is read by the published code, and the
published code's are read here. `util.saver` writes them.
"""

import errno
import os
import re
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from models.config import TokenBridgeConfig
from models.pretrained import CONFIG, WEIGHTS
from models.tokenbridge import TokenBridge
from util import dist
from util.ema import EMA
from util.errors import UserError, as_user_error
from util.files import flush_file, flush_folder, load_tensors

LAST = "checkpoint-last.pth"
AUTO = "auto"
# What --eval_weights calls a checkpoint's averaged and raw weights, and their keys in it.
WEIGHT_KEYS = {"ema": "model_ema", "model": "model"}
# Names that training gives; a copy beside them, such as -good.pth, is its owner's.
STEP_FILES = f"checkpoint-step{'[0-9]' * 8}.pth"
EPOCH_FILES = f"checkpoint-epoch{'[0-9]' * 4}.pth"
# Of a network's file system, of permissions and limits; not of what a file holds.
OUT_OF_REACH = (
    errno.ESTALE,
    errno.ETIMEDOUT,
    errno.EACCES,
    errno.EPERM,
    errno.EMFILE,
    errno.ENFILE,
)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read: its path and the dict of the file."""

    path: Path
    saved: dict

    @property
    def config(self) -> TokenBridgeConfig | None:
        """The model's settings; None if the file comes from the published code."""
        if "config" not in self.saved:
            return None
        with as_user_error(f"--resume {self.path}", (ValueError, TypeError, AttributeError)):
            return TokenBridgeConfig.from_dict(self.saved["config"])

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes it was trained on, by label; none if it does not say."""
        return tuple(map(str, self.saved.get("classes") or ()))

    def weights(self, key: str) -> dict[str, Tensor]:
        """The state dict under `model` or `model_ema`."""
        state = self.saved.get(key)
        if not isinstance(state, dict) or not all(isinstance(t, Tensor) for t in state.values()):
            keys = ", ".join(map(str, self.saved)) or "nothing"
            raise UserError(f"--resume {self.path}: no state dict {key!r} in it (it has {keys})")
        return state

    def key(self, kind: str) -> str:
        """Where the weights are that --eval_weights names. Raises UserError if it has others."""
        kept = self.saved.get("weights", kind)
        if kept != kind:
            raise UserError(
                f"--resume {self.path} holds the {kept} weights alone; pass --eval_weights {kept}"
            )
        return WEIGHT_KEYS[kind]

    def load_into(self, model: TokenBridge, key: str) -> None:
        """Load one of its state dicts; every tensor must match."""
        with as_user_error(f"--resume {self.path}, {key!r}"):
            model.load_published(self.weights(key), head_input=model.config.head_input)

    def release(self) -> None:
        """Let go of the tensors, which would stay in memory as long as the run."""
        for key in ("model", "model_ema", "optimizer"):
            self.saved.pop(key, None)

    def load_training_state(
        self, ema: EMA, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler
    ) -> bool:
        """Load all but the model itself; false for a file with weights alone."""
        with as_user_error(f"--resume {self.path}, 'model_ema'"):
            ema.load_state_dict(self.weights("model_ema"))
        if "optimizer" not in self.saved:
            return False
        damaged = (ValueError, LookupError, TypeError, AttributeError, RuntimeError)
        with as_user_error(f"--resume {self.path}, 'optimizer'", damaged):
            load_moments(optimizer, self.saved["optimizer"])
        if self.saved.get("scaler"):
            with as_user_error(f"--resume {self.path}, 'scaler'", damaged):
                scaler.load_state_dict(self.saved["scaler"])
        return True

    def argument(self, name: str):
        """A flag of the run that wrote it; None if it does not say."""
        args = self.saved.get("args")
        return args.get(name) if isinstance(args, dict) else None

    def whole_number(self, name: str) -> int:
        """`epoch`, `step`, ... as the file has it. Raises UserError if it is none."""
        value = self.saved.get(name)
        if type(value) is not int:
            raise UserError(f"--resume {self.path}: {name!r} is {value!r}, not a whole number")
        return value


def load_moments(optimizer: torch.optim.Optimizer, saved: dict) -> None:
    """Load AdamW's moments and step counts; its settings stay those of this run's flags.

    Raises ValueError unless they are of the same parameters in the same groups.
    """
    groups = optimizer.state_dict()["param_groups"]
    numbers = [group["params"] for group in groups]
    if [group["params"] for group in saved["param_groups"]] != numbers:
        raise ValueError("its groups of parameters are those of another model")
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for number, state in saved["state"].items():
        expected = parameters[number].shape
        for name in ("exp_avg", "exp_avg_sq"):
            if state[name].shape != expected:
                raise ValueError(
                    f"{name} of parameter {number} is {tuple(state[name].shape)}, "
                    f"not {tuple(expected)}"
                )
    optimizer.load_state_dict({"state": saved["state"], "param_groups": groups})


def load_checkpoint(path: Path, remedy: str = "") -> Checkpoint:
    """Read a checkpoint, its checksums compared, without executing anything in it.

    remedy: what else to say to the user of a damaged one.
    """
    try:
        return Checkpoint(path, load_tensors(path, "--resume"))
    except UserError as error:
        raise UserError(f"{error}{remedy}") from error


def load_exported(folder: Path) -> Checkpoint:
    """A folder of util.export: weights alone, of one kind, which stand for both kinds."""
    with as_user_error("--resume", (ValueError, OSError)):
        model = TokenBridge.from_pretrained(folder)
    state = model.published_state_dict()
    averaged = {name: state[name] for name, _ in model.published_parameters()}
    saved = {"model": state, "model_ema": averaged, "config": model.config.to_dict()}
    known = {name: value for name, value in asdict(model.origin).items() if value is not None}
    if "classes" in known:
        known["classes"] = list(known["classes"])
    return Checkpoint(folder / WEIGHTS, saved | known)


def find_checkpoint(
    resume: str, output_dir: str, must_exist: bool, read_only: bool = False
) -> Checkpoint | None:
    """The checkpoint that --resume names: a folder, a file, a folder of util.export, or "auto", the
    newest whole one of --output_dir.

    None if there is none yet in the output folder of the run, which the published commands name
    from the first start on. Raises UserError if it is missing anywhere else, or damaged.
    """
    folder = Path(output_dir)
    if resume == AUTO:
        found = newest_whole(folder, read_only)
        if found is None and must_exist:
            raise UserError(f"--resume auto: no whole checkpoint in --output_dir {output_dir}")
        return found
    path = Path(resume)
    if path.is_file():
        if path.name == WEIGHTS:
            raise UserError(f"--resume {resume} needs its {CONFIG}; name the folder of both")
        return load_checkpoint(path)
    own = path.resolve() == folder.resolve()
    # Killed between a checkpoint and its second name, a run has a newer one than LAST.
    newest = saved_in(folder)[:1] if own else []
    if newest:
        return load_checkpoint(newest[0], "; --resume auto takes the newest whole one")
    if (path / LAST).is_file():
        return load_checkpoint(path / LAST)
    if (path / WEIGHTS).is_file():
        return load_exported(path)
    if own and not must_exist:
        return None
    what = f"holds no {LAST}" if path.is_dir() else "does not exist"
    raise UserError(
        f"--resume {resume} {what}; name a folder with a {LAST}, a .pth file, or "
        "a folder of util.export"
    )


def saved_in(folder: Path) -> list[Path]:
    """The checkpoints of a run, newest first; a file that has several names once."""
    steps = sorted(folder.glob(STEP_FILES), reverse=True)
    others = [folder / LAST, *sorted(folder.glob(EPOCH_FILES), reverse=True)]
    kept: list[Path] = []
    for path in (*steps, *others):
        if path.is_file() and not any(path.samefile(other) for other in kept):
            kept.append(path)
    return kept


def newest_whole(folder: Path, read_only: bool = False) -> Checkpoint | None:
    """The newest checkpoint that can be read; damaged ones are named and set aside.

    The main process chooses, so that all take the same. read_only: change nothing in the folder;
    the newest one must be whole then.
    """
    found = None
    if dist.is_main():
        for path in saved_in(folder):
            try:
                found = load_checkpoint(path)
                break
            except UserError as error:
                if read_only or is_out_of_reach(error):
                    raise
                aside = path.with_name(path.name + ".damaged")
                os.replace(path, aside)
                print(f"{error}; set aside as {aside.name}", file=sys.stderr, flush=True)
        if found is not None and not read_only:
            with as_user_error(f"--output_dir {folder}: cannot write", (OSError,)):
                give_name(found.path, folder / LAST)
    path = dist.gather_objects(found.path if found else None)[0]
    # Those set aside before count: the next attempt must not begin from scratch without a word.
    lost = dist.is_main() and found is None and any(folder.glob("checkpoint-*.pth.damaged"))
    if any(dist.gather_objects(lost)):
        raise UserError(
            f"--resume auto: all checkpoints in {folder} are damaged (NAME.damaged); mend one and "
            "give it its name back, or name another --output_dir"
        )
    if path is None or found is not None:
        return found
    return load_checkpoint(path)


def is_out_of_reach(error: UserError) -> bool:
    """Whether `load_checkpoint` failed where the file may be whole: tomorrow it can be read."""
    causes = (error.__cause__, getattr(error.__cause__, "__cause__", None))
    return any(isinstance(cause, OSError) and cause.errno in OUT_OF_REACH for cause in causes)


def give_name(path: Path, name: Path) -> None:
    """Let a whole file have a second name, at once and without a copy where links exist."""
    if name.exists() and name.samefile(path):
        return
    temporary = name.with_name(f".{name.name}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(path, temporary)
    except OSError:  # a file system without links
        shutil.copyfile(path, temporary)
        flush_file(temporary)
    os.replace(temporary, name)
    flush_folder(name.parent)


def refuse_other_run(output_dir: str, checkpoint: Checkpoint | None) -> None:
    """Raise UserError if a run would write over the checkpoints of another one."""
    found = saved_in(Path(output_dir))
    if not found:
        return
    if checkpoint is not None and checkpoint.path.parent.samefile(output_dir):
        newest = re.fullmatch(r"checkpoint-step(\d+)\.pth", found[0].name)
        if newest is None or checkpoint.saved.get("step", 0) >= int(newest[1]):
            return
    begun = "from scratch" if checkpoint is None else f"from {checkpoint.path}"
    raise UserError(
        f"--output_dir {output_dir} holds {found[0].name}, which a run {begun} would replace; pass "
        "--resume auto to go on with it, name another folder, or move its checkpoints away"
    )
