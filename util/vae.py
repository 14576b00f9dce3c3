"""What --vae_path names, a file or a folder, and reading it.

A file has tensors in the names of latent diffusion: of torch.save under `model` (with a `config` if
one was saved), under `state_dict`, or bare; or of safetensors. A folder is one of diffusers, or a
pipeline with vae/ in it: config.json and diffusion_pytorch_model.safetensors, or its shards, or its
one variant. Such a .safetensors file may be named itself. Nothing in them is executed.
A file with a codebook is in the names of LlamaGen.
"""

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from models.tokenizers.diffusers import DiffusersVAE
from models.tokenizers.kl16 import VAE, AutoencoderKL, settings_of
from models.tokenizers.vq import EMBEDDING, VQModel
from models.tokenizers.vq import settings_of as vq_settings_of
from util import dist
from util.errors import UserError, as_user_error
from util.files import atomic_write, listed, load_tensors, sha256, unwrapped, what_else

CONFIG = "config.json"
WEIGHTS = "diffusion_pytorch_model"
PARTS = ("encoder", "decoder", "quantize", "quant_conv", "post_quant_conv")
NAME = re.compile(
    rf"{WEIGHTS}(?:\.(\w+))?\.safetensors|{WEIGHTS}\.safetensors\.index(?:\.(\w+))?\.json"
)
ANCHOR = "encoder.conv_in.weight"  # every VAE in the names of latent diffusion has it


def load_vae(path: str | Path, embed_dim: int | None = None) -> VAE:
    """Read a VAE: kl16.ckpt, another file, or a folder of diffusers.

    embed_dim: the channels it must have; None takes those of the file.
    Raises UserError unless every tensor matches.
    """
    folder = diffusers_folder(path)
    vae = _load_file(Path(path)) if folder is None else folder.load()
    if embed_dim not in (None, vae.channels):
        raise UserError(
            f"--vae_embed_dim {embed_dim}, but --vae_path {path} has {vae.channels} channels"
        )
    return vae


def vae_digest(path: str | Path) -> str:
    """SHA-256 by which caches and checkpoints know their VAE. Raises UserError without one."""
    folder = diffusers_folder(path)
    return sha256(path) if folder is None else folder.digest()


def save_vae(path: str | Path, vae: AutoencoderKL | VQModel) -> None:
    """Write a VAE with its configuration, as `load_vae` reads it."""
    with atomic_write(path) as file:
        torch.save({"model": vae.state_dict(), "config": vae.config}, file)


def _load_file(path: Path) -> AutoencoderKL | VQModel:
    saved = load_tensors(path, "--vae_path", wide=True)
    damaged = (ValueError, TypeError, AttributeError, RuntimeError, LookupError)
    with as_user_error(f"--vae_path {path}", damaged):
        state, left_out = _vae_tensors(saved)
        if any(".resnets." in name for name in state):
            raise ValueError(f"in diffusers' names; save it as .safetensors beside its {CONFIG}")
        own = "config" in saved and "model" in saved  # that of a trainer is of another kind
        vq = (VQModel, vq_settings_of)
        family, sizes = vq if EMBEDDING in state else (AutoencoderKL, settings_of)
        vae = family(**(saved["config"] if own else sizes(state)))
        vae.load_published(state)
    if left_out:
        dist.print_main(f"--vae_path {path}: {left_out}")
    return vae


def _vae_tensors(saved: dict) -> tuple[dict[str, Tensor], str]:
    """The tensors of the VAE in a file, in their own names, and what to say of the others.

    Raises ValueError, naming what is there, where there is none, or several.
    """
    held = next((saved[key] for key in ("model", "state_dict") if key in saved), saved)
    if not isinstance(held, dict):
        raise ValueError(f"under 'model' is a {type(held).__name__}, not a state dict")
    state, stripped = unwrapped({str(k): t for k, t in held.items() if isinstance(t, Tensor)})
    prefixes = [name.removesuffix(ANCHOR) for name in state if f".{name}".endswith(f".{ANCHOR}")]
    if len(prefixes) != 1 and "" not in prefixes:
        several = f"VAEs under {listed(prefixes)}" if prefixes else f"no VAE, but {listed(held)}"
        raise ValueError(f"it holds {several}; name a file with the tensors of one, {ANCHOR} ...")
    prefix = "" if "" in prefixes else prefixes[0]
    inside = {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}
    vae = {name: tensor for name, tensor in inside.items() if name.split(".")[0] in PARTS}
    others = sorted({n.split(".")[0] for n in state if n.removeprefix(prefix) not in vae})
    without, notes = " and ".join(filter(None, (stripped, prefix))), []
    notes += [f"read without {without} in its names"] if without else []
    notes += [f"{len(state) - len(vae)} tensors of {listed(others)} passed over"] if others else []
    return vae, "; ".join(notes)


@dataclass(frozen=True)
class DiffusersFolder:
    """config: of config.json. variant: in the names of the files with tensors, `weights`."""

    path: Path
    config: dict
    variant: str | None
    weights: tuple[Path, ...]

    def digest(self) -> str:
        """SHA-256 of what it is: the settings, and the SHA-256 of each file of tensors."""
        kept = {k: v for k, v in self.config.items() if not k.startswith("_") or k == "_class_name"}
        content = [kept, [sha256(path) for path in self.weights]]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def load(self) -> DiffusersVAE:
        # A configuration is a stranger's, and diffusers raises whatever it meets on its way.
        with as_user_error(f"--vae_path {self.path}", (Exception,)):
            return DiffusersVAE(self.path, self.config, self.variant)


def diffusers_folder(path: str | Path) -> DiffusersFolder | None:
    """Of a folder, or a file in diffusers' names; None for any other file. Raises UserError."""
    path, is_folder = Path(path), Path(path).is_dir()
    if not is_folder and not _in_diffusers_names(path):
        return None
    folder = path if is_folder else path.parent
    folder = folder if (folder / CONFIG).is_file() or not is_folder else folder / "vae"
    if not (folder / CONFIG).is_file():
        files = sorted(p.name for p in path.glob("*.ckpt"))
        remedy = f"name the file {files[0]} in it" if files else "fetch it"
        raise UserError(f"--vae_path {path}: a VAE of diffusers needs {CONFIG} here; {remedy}")
    names = sorted(p.name for p in folder.iterdir()) if is_folder else [path.name]
    matches = filter(None, map(NAME.fullmatch, names))
    files = {match[1] or match[2]: folder / match[0] for match in matches}  # by variant
    if not files and not is_folder:
        raise UserError(f"--vae_path {path}: in diffusers' names; call it {WEIGHTS}.safetensors")
    if not files:
        remedy = "fetch it, or save it again with save_pretrained (a .bin file is never read)"
        raise UserError(f"--vae_path {path}: no {WEIGHTS}.safetensors; {remedy}")
    if len(files) > 1 and None not in files:
        raise UserError(f"--vae_path {path} has the variants {listed(files)}; leave one of them")
    variant = None if None in files else next(iter(files))
    return DiffusersFolder(folder, _read_json(folder / CONFIG), variant, _parts(files[variant]))


def _in_diffusers_names(path: Path) -> bool:
    if path.suffix != ".safetensors" or not path.is_file() or what_else(path, wide=True):
        return False
    with (
        as_user_error(f"--vae_path {path}: damaged", (SafetensorError,)),
        safe_open(path, framework="pt") as file,
    ):
        return any(".resnets." in name for name in file.keys())  # noqa: SIM118


def _parts(file: Path) -> tuple[Path, ...]:
    """This file, or those that it is the index of."""
    if file.suffix == ".safetensors":
        return (file,)
    names = sorted(set(_read_json(file).get("weight_map", {}).values()))
    for name in names:
        if Path(name).name != name or not (file.parent / name).is_file():
            raise UserError(f"--vae_path {file}: {name} is no file of this folder")
    return tuple(file.parent / name for name in names)


def _read_json(path: Path) -> dict:
    with as_user_error(f"--vae_path {path}: damaged", (ValueError, OSError, RecursionError)):
        value = json.loads(path.read_bytes())
        if not isinstance(value, dict):
            raise ValueError("it holds no JSON object")
        return value
