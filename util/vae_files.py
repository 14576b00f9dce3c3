"""What --vae_path names, a file or a folder, and reading it.

A file has tensors in the names of latent diffusion: of torch.save under `model` (with a `config` if
one was saved), under `state_dict`, as Lightning saves them, or bare; or of safetensors. A folder is
one of diffusers (util/vae_folder.py), and so is a .safetensors file in diffusers' names beside its
config.json. Nothing in them is executed, and no size they claim is believed.
"""

import os
from pathlib import Path

import torch
from torch import Tensor

from models.tokenizers.diffusers import DiffusersVAE
from models.tokenizers.kl16 import (
    KL16,
    PARTS,
    VAE,
    VARIANTS,
    AutoencoderKL,
    check_layout,
    settings_of,
)
from util import dist
from util.errors import UserError, as_user_error
from util.files import atomic_write, listed, load_tensors, sha256, unwrapped
from util.vae_folder import CONFIG, VaeFolder, folder_of_file, open_vae_folder

MAX_VAE_SIZE = 4096  # of any setting of a VAE; a file that claims more is not built
ANCHOR = "encoder.conv_in.weight"  # every VAE of these names has it


def load_vae(path: str | Path, embed_dim: int | None = None) -> VAE:
    """Read a VAE: kl16.ckpt, another file, or a folder of diffusers.

    embed_dim: the channels it must have; None takes those of the file.
    Raises UserError, naming --vae_path, unless every tensor matches.
    """
    folder = _of_diffusers(path)
    vae = _load_file(path) if folder is None else _load_folder(folder)
    if embed_dim not in (None, vae.channels):
        raise UserError(
            f"--vae_embed_dim {embed_dim}, but --vae_path {path} has {vae.channels} channels"
        )
    return vae


def vae_digest(path: str | Path) -> str:
    """SHA-256 by which caches and checkpoints know their VAE: of the file, or of the folder.

    Raises UserError if a folder is not that of a VAE.
    """
    folder = _of_diffusers(path)
    return sha256(path) if folder is None else folder.digest()


def _of_diffusers(path: str | Path) -> VaeFolder | None:
    return open_vae_folder(path) if Path(path).is_dir() else folder_of_file(Path(path))


def _load_folder(folder: VaeFolder) -> DiffusersVAE:
    state = folder.tensors()
    try:
        # A configuration is a stranger's, and diffusers raises whatever it meets on its way.
        with as_user_error(f"--vae_path {folder.path}", (Exception,)):
            return DiffusersVAE(folder.config, state)
    except UserError as error:
        if not isinstance(error.__cause__, ImportError):
            raise
        raise UserError(
            f"--vae_path {folder.path} is a VAE of diffusers, which cannot be imported "
            f"({error.__cause__}); pip install -e '.[diffusers]'"
        ) from error


def _load_file(path: str | Path) -> AutoencoderKL:
    saved = load_tensors(path, "--vae_path", wide=True)
    damaged = (ValueError, TypeError, AttributeError, RuntimeError, LookupError)
    with as_user_error(f"--vae_path {path}", damaged):
        state, left_out = _vae_tensors(saved)
        if "encoder.down_blocks.0.resnets.0.conv1.weight" in state:
            raise ValueError(f"in diffusers' names; save it as .safetensors beside its {CONFIG}")
        own = "config" in saved and "model" in saved  # that of a trainer is of another kind
        config = saved["config"] if own else settings_of(state)
        _check_vae(config, state, os.path.getsize(path))
        vae = AutoencoderKL(**config)
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
    tensors = {str(name): t for name, t in held.items() if isinstance(t, Tensor)}
    state, stripped = unwrapped(tensors)
    prefixes = [name.removesuffix(ANCHOR) for name in state if f".{name}".endswith(f".{ANCHOR}")]
    if len(prefixes) != 1 and "" not in prefixes:
        several = f"VAEs under {listed(prefixes)}" if prefixes else f"no VAE, but {listed(held)}"
        raise ValueError(f"it holds {several}; name a file with the tensors of one, {ANCHOR} ...")
    prefix = "" if "" in prefixes else prefixes[0]
    inside = {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}
    vae = {name: tensor for name, tensor in inside.items() if name.split(".")[0] in PARTS}
    others = sorted({n.split(".")[0] for n in state if n.removeprefix(prefix) not in vae})
    said = [f"read without {' and '.join(filter(None, (stripped, prefix)))} in its names"]
    said = said if stripped or prefix else []
    said += [f"{len(state) - len(vae)} tensors of {listed(others)} passed over"] if others else []
    return vae, "; ".join(said)


def _check_vae(config: dict, state: dict[str, Tensor], size: int) -> None:
    """Raise ValueError unless the tensors are those of the settings, before they are given memory.

    size: of the file in bytes, of which every number in it takes at least one.
    """
    known = KL16 | VARIANTS
    unknown = set(config) - set(known) if isinstance(config, dict) else {type(config).__name__}
    if unknown:
        raise ValueError(f"'config' is no dict of {', '.join(known)}: {str(unknown.pop())[:40]!r}")
    merged = known | config
    levels = tuple(merged.pop("ch_mult"))
    attention = [merged.pop(name) or () for name in ("encoder_attention", "decoder_attention")]
    sizes = (*levels, *(merged[name] for name in KL16 if name != "ch_mult"))
    sensible = all(type(n) is int and 0 < n <= MAX_VAE_SIZE for n in sizes)
    sensible &= all(level in range(len(levels)) for part in attention for level in part)
    if not (sensible and levels) or len(levels) * merged["num_res_blocks"] > len(state):
        raise ValueError("'config' has sizes that this VAE has not")
    with torch.device("meta"):
        layout = AutoencoderKL(**config).state_dict()
    check_layout(state, layout)
    if sum(tensor.numel() for tensor in layout.values()) > size:
        raise ValueError("its tensors claim more numbers than it holds")


def save_vae(path: str | Path, vae: AutoencoderKL) -> None:
    """Write a VAE with its configuration, as `load_vae` reads it."""
    with atomic_write(path) as file:
        torch.save({"model": vae.state_dict(), "config": vae.config}, file)
