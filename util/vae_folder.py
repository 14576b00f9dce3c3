"""A folder with a VAE that diffusers saved: which files it is made of, and reading them.

    FOLDER/config.json                                 or FOLDER/vae/config.json, of a pipeline
    FOLDER/diffusion_pytorch_model.safetensors         or sharded, or the one variant there is
Nothing is ever unpickled: a folder with .bin files alone is refused.
"""

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from util.errors import UserError, as_user_error
from util.files import sha256, what_else

WEIGHTS = "diffusion_pytorch_model"
CONFIG = "config.json"
MAX_JSON_BYTES = 1 << 20  # of a configuration or an index; what is larger is neither


@dataclass(frozen=True)
class VaeFolder:
    """What was found: the configuration, and the files that hold the tensors, sorted by name."""

    path: Path
    config: dict
    weights: tuple[Path, ...]

    def digest(self) -> str:
        """SHA-256 of what it is: the settings, and the SHA-256 of each file of tensors."""
        kept = {k: v for k, v in self.config.items() if not k.startswith("_") or k == "_class_name"}
        content = [kept, [sha256(path) for path in self.weights]]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def tensors(self) -> dict[str, Tensor]:
        """Raises UserError, naming the file, if one is damaged."""
        state: dict[str, Tensor] = {}
        for path in self.weights:
            if other := what_else(path, wide=True):
                raise UserError(f"--vae_path {path}: this is {other}")
            with as_user_error(
                f"--vae_path {path}: damaged, fetch or save it again", (SafetensorError, OSError)
            ):
                state |= load_file(path)
        return state


def open_vae_folder(folder: str | Path) -> VaeFolder:
    """Raises UserError, naming what is missing and the remedy."""
    places = [Path(folder), Path(folder) / "vae"]
    place = next((p for p in places if (p / CONFIG).is_file()), None)
    if place is None:
        files = sorted(p.name for p in places[0].glob("*.ckpt"))
        remedy = f"name the file {files[0]} in it" if files else "name a folder that has one"
        raise UserError(
            f"--vae_path {folder} is a folder without {CONFIG} or vae/{CONFIG}, "
            f"so not a VAE of diffusers; {remedy}"
        )
    return VaeFolder(place, _read_json(place / CONFIG), _weights(place))


def folder_of_file(path: Path) -> VaeFolder | None:
    """A .safetensors file in diffusers' names, with the settings beside it; None for another file.

    Raises UserError if the settings are not there.
    """
    if path.suffix != ".safetensors" or not path.is_file():
        return None
    if other := what_else(path, wide=True):
        raise UserError(f"--vae_path {path}: this is {other}")
    damaged = as_user_error(f"--vae_path {path}: damaged, fetch it again", (SafetensorError,))
    with damaged, safe_open(path, framework="pt") as file:
        if not any(".resnets." in name for name in file.keys()):  # noqa: SIM118
            return None
    if not (path.parent / CONFIG).is_file():
        raise UserError(
            f"--vae_path {path} is a VAE in diffusers' names without its settings; put the "
            f"{CONFIG} of its repository beside it"
        )
    return VaeFolder(path.parent, _read_json(path.parent / CONFIG), (path,))


def _weights(folder: Path) -> tuple[Path, ...]:
    """The files of tensors: one, or those of an index; a variant (.fp16) where it is the only."""
    shard = re.compile(r"-\d{5}-of-\d{5}")
    found = [p for p in folder.glob(f"{WEIGHTS}*.safetensors") if not shard.search(p.name)]
    found = sorted([*found, *folder.glob(f"{WEIGHTS}*.safetensors.index*.json")])
    full = (f"{WEIGHTS}.safetensors", f"{WEIGHTS}.safetensors.index.json")
    chosen = [p for p in found if p.name in full][:1] or found
    if not chosen:
        raise UserError(_no_weights(folder))
    if len(chosen) > 1:
        names = ", ".join(p.name for p in chosen)
        raise UserError(f"--vae_path {folder} has the variants {names}; leave one of them in it")
    return (chosen[0],) if chosen[0].suffix == ".safetensors" else _shards(chosen[0])


def _no_weights(folder: Path) -> str:
    pickled = sorted(p.name for p in folder.glob("*.bin"))
    if not pickled:
        return f"--vae_path {folder} has no {WEIGHTS}.safetensors; fetch or save it again"
    return (
        f"--vae_path {folder} has only {pickled[0]}, which is pickled and never read; fetch "
        f"{WEIGHTS}.safetensors, or save it with diffusers' save_pretrained where you trust it"
    )


def _shards(index: Path) -> tuple[Path, ...]:
    with as_user_error(f"--vae_path {index}: damaged, fetch it again", (KeyError, AttributeError)):
        names = sorted(set(_read_json(index)["weight_map"].values()), key=str)
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise UserError(f"--vae_path {index}: {str(name)[:80]!r} is no file of this folder")
        if not (index.parent / name).is_file():
            raise UserError(f"--vae_path {index.parent} has no {name}; fetch it again")
    return tuple(index.parent / name for name in names)


def _read_json(path: Path) -> dict:
    with as_user_error(f"--vae_path {path}: damaged", (ValueError, OSError, RecursionError)):
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ValueError(f"it is larger than {MAX_JSON_BYTES} bytes")
        value = json.loads(path.read_bytes())
        if not isinstance(value, dict):
            raise ValueError("it holds no JSON object")
    return value
