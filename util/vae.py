"""What --vae_path names, a file or a folder, and reading it.

A file has tensors in the names of latent diffusion: of torch.save under `model` (with a `config` if
one was saved), under `state_dict`, or bare; or of safetensors. A folder is one of diffusers, or a
pipeline with vae/ in it: config.json and diffusion_pytorch_model.safetensors or its one variant,
which may be named itself. A file with a codebook is in the names of LlamaGen, one of l-DeTok in its
own, of which the averages (`model_ema`) are read. Nothing in them is executed.
"""

import hashlib
import json
import re
from pathlib import Path

import torch
from torch import Tensor

from models.tokenizers import detok
from models.tokenizers.detok import DeTok
from models.tokenizers.diffusers import DiffusersVAE
from models.tokenizers.kl16 import VAE, AutoencoderKL
from models.tokenizers.vq import EMBEDDING, VQModel
from util import dist
from util.errors import UserError, as_user_error
from util.files import atomic_write, listed, load_tensors, sha256, unwrapped

CONFIG = "config.json"
WEIGHTS = re.compile(r"diffusion_pytorch_model(?:\.(\w+))?\.safetensors")
PARTS = ("encoder", "decoder", "quantize", "quant_conv", "post_quant_conv")
# Every VAE in the names of latent diffusion has the first, every l-DeTok the second.
ANCHORS = ("encoder.conv_in.weight", detok.ANCHOR)
DAMAGED = (ValueError, TypeError, AttributeError, RuntimeError, LookupError)


def load_vae(path: str | Path, embed_dim: int | None = None) -> VAE:
    """Read a VAE: kl16.ckpt, another file, or a folder of diffusers.

    embed_dim: the channels it must have; None takes those of the file.
    Raises UserError unless every tensor matches.
    """
    weights = diffusers_weights(Path(path))
    if weights is None:
        vae = _load_file(Path(path))
    else:
        config, variant = _settings(weights), WEIGHTS.fullmatch(weights.name)[1]
        # A configuration is a stranger's, and diffusers raises whatever it meets on its way.
        with as_user_error(f"--vae_path {path}", (Exception,)):
            vae = DiffusersVAE(weights.parent, config, variant)
    if embed_dim not in (None, vae.channels):
        raise UserError(f"--vae_embed_dim {embed_dim}, but {path} has {vae.channels} channels")
    return vae


def vae_digest(path: str | Path) -> str:
    """SHA-256 by which caches and checkpoints know their VAE. Raises UserError without one.

    Of a folder: of its settings, and of the SHA-256 of its tensors.
    """
    weights = diffusers_weights(Path(path))
    if weights is None:
        return sha256(path)
    settings = _settings(weights)
    kept = {k: v for k, v in settings.items() if not k.startswith("_") or k == "_class_name"}
    content = [kept, [sha256(weights)]]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def save_vae(path: str | Path, vae: AutoencoderKL | VQModel | DeTok) -> None:
    """Write a VAE with its configuration, as `load_vae` reads it."""
    with atomic_write(path) as file:
        torch.save({"model": vae.state_dict(), "config": vae.config}, file)


def _load_file(path: Path) -> AutoencoderKL | VQModel | DeTok:
    saved = load_tensors(path, "--vae_path", wide=True)
    with as_user_error(f"--vae_path {path}", DAMAGED):
        state = _vae_tensors(saved, path)
        own = "config" in saved and "model" in saved  # that of a trainer is of another kind
        family = DeTok if detok.ANCHOR in state else AutoencoderKL
        family = VQModel if EMBEDDING in state else family
        vae = family(**(saved["config"] if own else family.settings_of(state)))
        vae.load_published(state)
    return vae


def _vae_tensors(saved: dict, path: Path) -> dict[str, Tensor]:
    """The tensors of the VAE in a file, in their own names; what was left out is said.

    Raises ValueError, naming what is there, where there is none, or several.
    """
    held = next((saved[key] for key in ("model", "state_dict") if key in saved), saved)
    held = saved["model_ema"] if detok.ANCHOR in saved.get("model_ema", ()) else held
    state = unwrapped({str(k): t for k, t in held.items() if isinstance(t, Tensor)})
    ends = [(name, end) for name in state for end in ANCHORS if f".{name}".endswith(f".{end}")]
    if len(ends) != 1 or any(".resnets." in name for name in state):
        remedy = f"one in diffusers' names needs its folder, with {CONFIG}"
        raise ValueError(f"it holds {listed(held)}, not one VAE with {ANCHORS[0]}; {remedy}")
    prefix = ends[0][0].removesuffix(ends[0][1])
    inside = {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}
    vae = {name: tensor for name, tensor in inside.items() if name.split(".")[0] in PARTS}
    if others := sorted({n for n in state if n.removeprefix(prefix) not in vae}):
        dist.print_main(f"--vae_path {path}: passed over {listed(others)}")
    return vae


def diffusers_weights(path: Path) -> Path | None:
    """The file of tensors in a folder of diffusers; None for a file of another kind.

    Raises UserError unless the folder has its settings and one such file, or one of several in
    full precision.
    """
    if path.is_dir():
        folder = path if (path / CONFIG).is_file() else path / "vae"
        files = [file for file in sorted(folder.glob("*")) if WEIGHTS.fullmatch(file.name)]
    elif path.is_file() and WEIGHTS.fullmatch(path.name):
        folder, files = path.parent, [path]
    else:
        return None
    chosen = [file for file in files if "." not in file.stem] or files
    if len(chosen) != 1 or not (folder / CONFIG).is_file():
        asked = f"{CONFIG} and one diffusion_pytorch_model.safetensors (no .bin file is read)"
        here = listed(sorted(p.name for p in path.glob("*")))
        raise UserError(f"--vae_path {path}: a folder of diffusers has {asked}, here are {here}")
    return chosen[0]


def _settings(weights: Path) -> dict:
    """config.json beside the weights."""
    path = weights.parent / CONFIG
    with as_user_error(f"--vae_path {path}: damaged", (ValueError, TypeError, OSError)):
        return dict(json.loads(path.read_bytes()))
