"""What the page of demo/app.py computes.

    checkpoint -> model, its VAE by checksum -> sampling_steps -> VAE decode
    picture -> center_crop -> posterior -> quantizer or none -> VAE decode -> PSNR
Letters: B images, G positions of a side, K levels, S side of an image in pixels.
"""

import argparse
import math
import os
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from models.backbone import unpatchify
from models.config import PRESETS, preset
from models.generate import known_positions
from models.hub import WEIGHTS
from models.quantizer import GaussianQuantizer, Quantizer, entropy
from models.sampler import NOTHING, Given, SamplingOptions, iterations, sampling_steps
from models.tokenbridge import CLASS_ROWS, TokenBridge
from models.tokenizers.tokenizer import Tokenizer, decode_images, to_uint8
from util.checkpoint import Checkpoint, find_checkpoint, saved_in
from util.data.images import center_crop, psnr, read_image
from util.device import resolve_precision
from util.download import PLACES
from util.errors import UserError, as_user_error
from util.evaluation.reconstruction import draw_latents, quantized
from util.export import load
from util.setup import check_vae
from util.vae import load_vae, vae_digest

FOLDERS = ["output/demo/model", "output/demo/exported", "output/gallery/model"]
FOLDERS += ["output/gallery/exported", "output_dir", "exported"]
FOLDERS += [f"pretrained_models/{Path(PLACES[model]).parent}" for model in ("large", "huge")]
FOLDERS += ["demo/gallery"]  # which comes with the code
MOST_PIXELS = 1024  # a side of a picture: a VAE's memory grows with the area


class Loaded(NamedTuple):
    """A model with its tokenizer, on the device. settings: how training drew its images."""

    model: TokenBridge
    tokenizer: Tokenizer
    classes: tuple[str, ...]
    settings: dict
    facts: str


@dataclass(frozen=True, eq=False)
class Library:
    """Checkpoints to choose from: those of --resume, or where the README's commands leave them."""

    flags: argparse.Namespace
    device: torch.device

    def choices(self) -> list[str]:
        named, found = self.flags.resume, {}
        for path in map(Path, named or FOLDERS):
            whole = [path] if named or (path / WEIGHTS).is_file() else []
            found |= dict.fromkeys(map(str, saved_in(path) or whole))
        return list(found)

    def load(self, name: str, weights: str) -> Loaded:
        """A choice with its "ema" or "model" weights. Raises UserError if it is none."""
        if name not in self.choices():
            raise UserError(f"checkpoint {name!r} is not in the list: name it by --resume")
        return _read(self, name, weights, os.stat(name).st_mtime_ns)  # training replaces files

    def vae_of(self, checkpoint: Checkpoint) -> tuple[str, bool]:
        """The VAE that it was trained with, by its checksum; False for another that was named."""
        digest, folder = checkpoint.saved.get("vae_sha256"), checkpoint.path.parent
        given, trained = self.flags.vae_path, checkpoint.argument("vae_path")
        beside = [*sorted(folder.glob("*vae.ckpt")), *sorted(folder.parent.glob("*vae.ckpt"))]
        paths = [given] if given else [trained, *beside, f"pretrained_models/{PLACES['vae']}"]
        paths = [str(path) for path in paths if path]
        for path in filter(os.path.exists, paths):
            same = not digest or vae_digest(path) == digest
            if same or given:
                return path, same
        where = f"none of {', '.join(paths)}; start the page with --vae_path"
        raise UserError(f"the VAE of {checkpoint.path} (SHA-256 {str(digest)[:12]}) is {where}")


@lru_cache(maxsize=2)
def _read(library: Library, name: str, weights: str, _changed: int) -> Loaded:
    checkpoint = find_checkpoint(name, name, must_exist=True, read_only=True)
    flags = argparse.Namespace(**vars(library.flags))
    if checkpoint.config is None and flags.model is None:  # published: by its width
        sizes = {preset(size)["encoder_embed_dim"]: size for size in PRESETS}
        width = checkpoint.weights("model").get(CLASS_ROWS, torch.empty(0)).shape[-1]
        flags.model = sizes.get(width)
    path, same = library.vae_of(checkpoint)
    vae = load_vae(path)
    model = load(flags, checkpoint, weights, vae).to(library.device)
    config = model.config
    check_vae(vae, config, path)
    facts = (
        f"{sum(parameter.numel() for parameter in model.parameters()) / 1e6:.1f} M parameters, "
        f"{config.img_size} px, {config.grid_size} × {config.grid_size} positions of "
        f"{config.token_dim} × {config.quant_levels} levels, step {model.origin.step}, VAE `{path}`"
    )
    facts += "" if same else ", **which is not the one it was trained with**"
    tokenizer = Tokenizer(vae, *config.latent_norm).to(library.device)
    classes = class_names(config.class_num, model.origin.classes)
    return Loaded(model, tokenizer, classes, settings_of(checkpoint), facts)


def settings_of(checkpoint: Checkpoint) -> dict:
    """As training drew its images, if it says so, else as the published large model draws."""
    settings = {"num_iter": 64, "cfg": 3.1, "temperature": 0.96}
    for name, flag in zip(settings, ("preview_iter", "cfg", "temperature"), strict=True):
        value = checkpoint.argument(flag)
        value = value[0] if isinstance(value, list) and value else value
        if isinstance(value, int | float) and 0 <= value < 1e4:
            settings[name] = value
    return settings


def class_names(class_num: int, trained: tuple[str, ...] | None) -> tuple[str, ...]:
    """As the folders of the training were called; ImageNet's thousand by their English names."""
    if class_num == 1000 and all(re.fullmatch(r"n\d{8}", name) for name in trained or ()):
        from torchvision.models import ResNet50_Weights  # its list of names, not its weights

        return tuple(ResNet50_Weights.DEFAULT.meta["categories"])
    return tuple(trained or map(str, range(class_num)))


def draw(
    loaded: Loaded,
    labels: Sequence[int],
    options: SamplingOptions,
    seconds: float = 0.0,
    given: Given = NOTHING,
) -> Iterator[tuple[int, int, np.ndarray, np.ndarray]]:
    """The images of `models.generate.generate`, of the same labels and options, step by step.

    seconds: to take at least, so that eyes can follow. given: what is known of the images. Yields,
    after iterations that do not take longer to show than to compute, number, how many there are,
    pixels uint8 [B, S, S, 3], and maps [2, B, G, G]: the iteration that filled a position, the mean
    log-probability of its channels; NaN where nothing was drawn.
    """
    model, config = loaded.model, loaded.model.config
    device = next(model.parameters()).device
    precision = resolve_precision("auto", device)
    unknown = config.seq_len
    if given.known_mask is not None:
        unknown -= int(given.known_mask[0].sum())
    steps = len(iterations(options, unknown)) or 1
    maps = torch.full((2, len(labels), config.seq_len), math.nan)
    states = sampling_steps(model, torch.tensor(labels), options, given=given)
    began = due = time.monotonic()
    for number in range(1, steps + 1):
        with precision.autocast(device):  # not around the loop: threads may change
            state = next(states)
        positions, sure = state.positions.cpu(), state.log_probs.float().mean(dim=-1).cpu()
        maps.scatter_(2, positions.expand(2, -1, -1), torch.stack([number + 0 * sure, sure]))
        now = time.monotonic()
        if number == steps or now >= due:
            latents = unpatchify(state.values, config.patch_size, config.grid_size)
            pixels = decode_images(loaded.tokenizer, latents).permute(0, 2, 3, 1).numpy()
            grids = maps.unflatten(2, (config.grid_size, config.grid_size)).numpy().copy()
            yield number, steps, pixels, grids
            due = time.monotonic() + max(0.05, time.monotonic() - now)
        time.sleep(max(0.0, began + seconds * number / steps - time.monotonic()))


def editing(loaded: Loaded, painted: Sequence[str], count: int) -> Given:
    """What is known of `count` images of a picture; painted: its file, and those of what is painted
    on it, dark on a light or transparent ground. Raises UserError.
    """
    config = loaded.model.config
    if not painted[0]:
        raise UserError("there is no picture: drop one")
    with as_user_error("this picture"):
        images = [center_crop(read_image(path), config.img_size) for path in painted]
    drawn = [np.array(layer.convert("L")) < 255 for layer in images[1:]]
    mask = np.any(drawn, axis=0) if drawn else np.zeros((config.img_size,) * 2, bool)
    if not mask.any():
        raise UserError("nothing is painted over: paint with the brush what shall be drawn anew")
    known = known_positions(loaded.model, loaded.tokenizer, images[0], mask)
    return Given(**{k: x.expand(count, *x.shape[1:]).cpu() for k, x in known.items()})


@torch.no_grad()
def reconstruct(
    loaded: Loaded, picture: str, size: int, bits: Sequence[int]
) -> tuple[np.ndarray, list[str]]:
    """The centre of a picture, through the VAE alone, and quantized, as reconstruction.py does.

    At the model's own bits by its own levels, at others by the published ones in its range.
    Returns uint8 [N, S, S, 3] and captions. Raises UserError.
    """
    tokenizer, config, stride = loaded.tokenizer, loaded.model.config, loaded.tokenizer.vae.stride
    if not stride <= size <= MOST_PIXELS or size % stride:
        raise UserError(f"{size} px: choose a multiple of {stride} up to {MOST_PIXELS}")
    with as_user_error("this picture"):
        crop = torch.from_numpy(np.array(center_crop(read_image(picture), size)))
    original = crop.permute(2, 0, 1)[None]
    device = next(tokenizer.parameters()).device
    latents = draw_latents(tokenizer, original.to(device), [0], seed=1)
    pixels, captions, coded = [original], ["Original"], {"Continuous VAE": latents}
    for width in bits:
        quantizer = loaded.model.quantizer
        if not isinstance(quantizer, Quantizer) or quantizer.levels != 2**width:
            quantizer = GaussianQuantizer(2**width, config.quant_min, config.quant_max).to(device)
        values, facts = quantized(latents, quantizer)
        coded[f"{width} bits, {entropy(facts['counts'][0]).mean():.2f} used"] = values
    for name, values in coded.items():
        pixels.append(to_uint8(tokenizer.decode(values)).cpu())
        captions.append(f"{name}: {psnr(pixels[-1], original).item():.2f} dB")
    return torch.cat(pixels).permute(0, 2, 3, 1).numpy(), captions
