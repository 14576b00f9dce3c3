"""What --vae_path names, a file or a folder, and reading it.

A file is a dict with the tensors under `model`, and `config` if it is not KL-16. A folder is one
of diffusers (util/vae_folder.py). Nothing in them is executed, and no size they claim is believed.
"""

import os
from pathlib import Path

import torch
from torch import Tensor

from models.diffusers_vae import DiffusersVAE
from models.vae import KL16, VAE, AutoencoderKL, check_layout
from util.errors import UserError, as_user_error
from util.files import atomic_write, load_tensors, sha256
from util.vae_folder import CONFIG, open_vae_folder

MAX_VAE_SIZE = 4096  # of any setting of a VAE; a file that claims more is not built


def load_vae(path: str | Path, embed_dim: int | None = None) -> VAE:
    """Read a VAE: kl16.ckpt, a file of the same form that also holds its `config`, or a folder.

    embed_dim: the channels it must have; None takes those of the file, or KL-16's.
    Raises UserError, naming --vae_path, unless every tensor matches.
    """
    vae = _load_folder(Path(path)) if Path(path).is_dir() else _load_file(path, embed_dim)
    if embed_dim not in (None, vae.channels):
        raise UserError(
            f"--vae_embed_dim {embed_dim}, but --vae_path {path} has {vae.channels} channels"
        )
    return vae


def vae_digest(path: str | Path) -> str:
    """SHA-256 by which caches and checkpoints know their VAE: of the file, or of the folder.

    Raises UserError if a folder is not that of a VAE.
    """
    return open_vae_folder(path).digest() if Path(path).is_dir() else sha256(path)


def _load_folder(path: Path) -> DiffusersVAE:
    folder = open_vae_folder(path)
    state = folder.tensors()
    try:
        # A configuration is a stranger's, and diffusers raises whatever it meets on its way.
        with as_user_error(f"--vae_path {folder.path}", (Exception,)):
            return DiffusersVAE(folder.config, state)
    except UserError as error:
        if not isinstance(error.__cause__, ImportError):
            raise
        raise UserError(
            f"--vae_path {path} is a VAE of diffusers, which cannot be imported "
            f"({error.__cause__}); pip install -e '.[diffusers]'"
        ) from error


def _load_file(path: str | Path, embed_dim: int | None) -> AutoencoderKL:
    if Path(path).suffix == ".safetensors":
        raise UserError(f"--vae_path {path}: name its folder, which has {CONFIG}, not the file")
    saved = load_tensors(path, "--vae_path")
    if not isinstance(saved.get("model"), dict):
        raise UserError(f"--vae_path {path}: no state dict 'model' in it; kl16.ckpt has one")
    config = saved.get("config", KL16 | {"embed_dim": embed_dim or KL16["embed_dim"]})
    damaged = (ValueError, TypeError, AttributeError, RuntimeError)
    with as_user_error(f"--vae_path {path}", damaged):
        _check_vae(config, saved["model"], os.path.getsize(path))
        vae = AutoencoderKL(**config)
        vae.load_published(saved["model"])
    return vae


def _check_vae(config: dict, state: dict[str, Tensor], size: int) -> None:
    """Raise ValueError unless the tensors are those of the settings, before they are given memory.

    size: of the file in bytes, of which every number in it takes at least one.
    """
    unknown = set(config) - set(KL16) if isinstance(config, dict) else {type(config).__name__}
    if unknown:
        raise ValueError(f"'config' is no dict of {', '.join(KL16)}: {str(unknown.pop())[:40]!r}")
    merged = KL16 | config
    levels = tuple(merged.pop("ch_mult"))
    sensible = all(type(n) is int and 0 < n <= MAX_VAE_SIZE for n in (*merged.values(), *levels))
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
