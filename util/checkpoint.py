"""Checkpoints and VAE files, in the published form, and how a `--resume` finds them.

A checkpoint is a dict with the published keys `model`, `model_ema` (parameters only),
`optimizer`, `epoch`, `scaler`, and ours: `step`, `config` (the model's settings), `classes`,
`vae_sha256`, `args`. It is read by the published code, and the published code's are read here.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from models.config import TokenBridgeConfig
from models.tokenbridge import TokenBridge
from models.vae import KL16, AutoencoderKL
from util.ema import EMA
from util.errors import UserError, as_user_error
from util.files import atomic_write, load_tensors

LAST = "checkpoint-last.pth"


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

    def weights(self, key: str) -> dict[str, Tensor]:
        """The state dict under `model` or `model_ema`."""
        state = self.saved.get(key)
        if not isinstance(state, dict) or not all(isinstance(t, Tensor) for t in state.values()):
            keys = ", ".join(map(str, self.saved)) or "nothing"
            raise UserError(f"--resume {self.path}: no state dict {key!r} in it (it has {keys})")
        return state

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
    ) -> int | None:
        """Load all but the model itself; return how many epochs it has behind it.

        None for a file with weights alone.
        """
        with as_user_error(f"--resume {self.path}, 'model_ema'"):
            ema.load_state_dict(self.weights("model_ema"))
        if "optimizer" not in self.saved:
            return None
        damaged = (ValueError, LookupError, TypeError, AttributeError, RuntimeError)
        with as_user_error(f"--resume {self.path}, 'optimizer'", damaged):
            load_moments(optimizer, self.saved["optimizer"])
        if self.saved.get("scaler"):
            with as_user_error(f"--resume {self.path}, 'scaler'", damaged):
                scaler.load_state_dict(self.saved["scaler"])
        epoch = self.saved.get("epoch")
        if type(epoch) is not int:
            raise UserError(f"--resume {self.path}: 'epoch' is {epoch!r}, not a whole number")
        return epoch + 1


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


def find_checkpoint(resume: str, output_dir: str, must_exist: bool) -> Path | None:
    """The checkpoint that --resume names, a folder or a file.

    None if --resume is the output folder of a run that has not saved yet: the published commands
    name it from the first start on. Raises UserError if it is missing anywhere else.
    """
    path = Path(resume)
    if path.is_file():
        return path
    if (path / LAST).is_file():
        return path / LAST
    if not must_exist and path.resolve() == Path(output_dir).resolve():
        return None
    what = f"holds no {LAST}" if path.is_dir() else "does not exist"
    raise UserError(f"--resume {resume} {what}; name a folder with a {LAST}, or a .pth file")


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint without executing anything in it."""
    return Checkpoint(path, load_tensors(path, "--resume"))


def save_checkpoint(
    folder: Path,
    model: TokenBridge,
    ema: EMA,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    **progress,
) -> Path:
    """Write checkpoint-last.pth, whole or not at all. progress: step, epoch and plain values."""
    path = folder / LAST
    folder.mkdir(parents=True, exist_ok=True)
    for unfinished in folder.glob(f".{LAST}.*.tmp"):  # of a process that was killed while saving
        unfinished.unlink()
    with atomic_write(path) as file:
        torch.save(
            {
                "model": model.published_state_dict(),
                "model_ema": ema.state_dict(),
                "optimizer": optimizer.state_dict(),
                # The published code scales in any precision and refuses an empty state.
                "scaler": scaler.state_dict() or torch.amp.GradScaler("cpu").state_dict(),
                "config": model.config.to_dict(),
                **progress,
            },
            file,
        )
    return path


def load_vae(path: str | Path, embed_dim: int | None = None) -> AutoencoderKL:
    """Read a VAE: kl16.ckpt, or a file of the same form that also holds its `config`.

    embed_dim: the channels it must have; None takes those of the file, or KL-16's.
    Raises UserError, naming --vae_path, unless every tensor matches.
    """
    saved = load_tensors(path, "--vae_path")
    if not isinstance(saved.get("model"), dict):
        raise UserError(f"--vae_path {path}: no state dict 'model' in it; kl16.ckpt has one")
    config = saved.get("config", KL16 | {"embed_dim": embed_dim or KL16["embed_dim"]})
    with as_user_error(f"--vae_path {path}", (ValueError, TypeError, AttributeError)):
        vae = AutoencoderKL(**config)
        vae.load_published(saved["model"])
    if embed_dim not in (None, vae.config["embed_dim"]):
        found = vae.config["embed_dim"]
        raise UserError(f"--vae_embed_dim {embed_dim}, but --vae_path {path} has {found} channels")
    return vae


def save_vae(path: str | Path, vae: AutoencoderKL) -> None:
    """Write a VAE with its configuration, as `load_vae` reads it."""
    with atomic_write(path) as file:
        torch.save({"model": vae.state_dict(), "config": vae.config}, file)
