"""What the page can draw with: checkpoints that are there, each with its VAE and class names.

    a folder or file -> find_checkpoint -> model; its VAE by checksum -> tokenizer
Nothing that is read is executed (see util.files.load_tensors).
"""

import argparse
import copy
import os
import re
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import torch

from models.config import PRESETS, PUBLISHED_LATENT_SCALE, preset
from models.tokenbridge import TokenBridge
from models.tokenizers.kl16 import VAE
from models.tokenizers.tokenizer import Tokenizer
from util.build import ModelFlags, check_vae
from util.checkpoint import AUTO, WEIGHT_KEYS, Checkpoint, find_checkpoint, saved_in
from util.errors import UserError
from util.export import load
from util.vae import load_vae, vae_digest

DEMO = "output/demo"
PLACES = (f"{DEMO}/model", f"{DEMO}/exported", "output_dir", "exported")
PLACES += tuple(f"pretrained_models/tokenbridge/tokenbridge_{size}" for size in ("large", "huge"))
IMAGENET = 1000
SYNSET = re.compile(r"n\d{8}")  # ImageNet's folders, whose sorted order is that of its classes
MOST = 1e4  # of a setting that a page can show
KEPT = 2  # models in memory at a time


@dataclass(frozen=True)
class Defaults:
    """What a model draws with unless the page says otherwise: those of the published large one."""

    num_iter: int = 64
    cfg: float = 3.1
    cfg_schedule: str = "linear"
    temperature: float = 0.96
    order: str = "random"


@dataclass(frozen=True)
class Loaded:
    """A model with its tokenizer, on the device. facts: what is worth knowing, in a few words."""

    model: TokenBridge
    tokenizer: Tokenizer
    classes: tuple[str, ...]
    defaults: Defaults
    facts: tuple[str, ...]
    warnings: tuple[str, ...] = ()


class Library:
    """Checkpoints by the name of their file or folder, loaded when they are first asked for.

    args: of `demo.app`. typed: whether other paths than those it lists may be asked for.
    """

    def __init__(self, args: argparse.Namespace, device: torch.device, typed: bool = True):
        self.args, self.device, self.typed = args, device, typed
        self._loaded: OrderedDict[tuple, Loaded] = OrderedDict()
        self._digests: dict[tuple, str] = {}

    def choices(self) -> list[str]:
        """Those of --resume, or of the places where the commands of the README leave them."""
        given = self.args.resume or [place for place in PLACES if Path(place).is_dir()]
        found: list[str] = []
        for place in given:
            saved = [str(path) for path in saved_in(Path(place))] if Path(place).is_dir() else []
            exported = (Path(place) / "model.safetensors").is_file()
            found += saved or ([place] if exported or self.args.resume else [])
        return list(dict.fromkeys(found))

    def load(self, name: str, weights: str) -> Loaded:
        """The checkpoint of that name. Raises UserError on what is none, or has no VAE here."""
        name = (name or "").strip()
        if not name:
            raise UserError("no checkpoint is chosen: pick one, or run make demo, which trains one")
        if name == AUTO or not os.path.exists(name):  # which no path makes raise
            raise UserError(
                f"checkpoint {name[:200]!r} does not exist; name a folder of a training or of "
                "util.export, or a .pth file"
            )
        if not self.typed and name not in self.choices():
            raise UserError(
                f"checkpoint {name!r} is not in the list; a page that others can reach reads no "
                "other files: name it by --resume when starting it"
            )
        if weights not in WEIGHT_KEYS:
            raise UserError(f"weights {weights!r} are not one of {', '.join(WEIGHT_KEYS)}")
        key = (name, weights, _stamp(Path(name)))
        if key not in self._loaded:
            while len(self._loaded) >= KEPT:
                self._loaded.popitem(last=False)
            self._loaded[key] = self._read(name, weights)
        self._loaded.move_to_end(key)
        return self._loaded[key]

    def tokenizer(self, name: str, weights: str) -> tuple[Tokenizer, Loaded | None]:
        """The checkpoint's, or without any checkpoint KL-16, whose scale is published."""
        if name or self.choices():
            loaded = self.load(name, weights)
            return loaded.tokenizer, loaded
        path = self.args.vae_path
        vae = load_vae(path)
        if not vae.is_kl16:
            raise UserError(
                f"--vae_path {path} is not KL-16, so its latents' scale is not known: pick a "
                "checkpoint that was trained with it"
            )
        return Tokenizer(vae, PUBLISHED_LATENT_SCALE).to(self.device), None

    def _read(self, name: str, weights: str) -> Loaded:
        checkpoint = find_checkpoint(name, name, must_exist=True, read_only=True)
        args = copy.copy(self.args)
        args.eval_weights = weights
        args.explicit = set(args.explicit) - {"vae_path"}  # which VAE it is comes below
        if checkpoint.config is None and "model" not in args.explicit:
            args.model = size_of(checkpoint)
        model = load(ModelFlags.of(args), checkpoint, weights, None)
        path, warnings = self._find_vae(checkpoint)
        vae = load_vae(path)
        check_vae(vae, model.config, str(path))
        defaults = defaults_of(checkpoint)
        classes = class_names(model.config.class_num, model.origin.classes)
        checkpoint.release()
        return Loaded(
            model.to(self.device),
            Tokenizer(vae, model.config.latent_scale).to(self.device),
            classes,
            defaults,
            facts_of(model, vae, path, len(classes)),
            warnings,
        )

    def _find_vae(self, checkpoint: Checkpoint) -> tuple[Path, tuple[str, ...]]:
        """The VAE that a checkpoint was trained with, by its checksum, and what to warn of."""
        wanted = checkpoint.saved.get("vae_sha256")
        named = [self.args.vae_path]
        if "vae_path" not in self.args.explicit:
            beside = [checkpoint.path.parent, checkpoint.path.parent.parent]
            trained_with = checkpoint.argument("vae_path")
            said = [trained_with] if isinstance(trained_with, str) and trained_with else []
            named = [*said, *(str(folder / "vae.ckpt") for folder in beside), *named]
        present = [Path(path) for path in dict.fromkeys(named) if Path(path).exists()]
        fitting = [path for path in present if not wanted or self._digest(path) == wanted]
        if fitting:
            return fitting[0], ()
        if present and "vae_path" in self.args.explicit:
            warning = f"{present[0]} is not the VAE it was trained with: colours may be wrong"
            return present[0], (warning,)
        what = f" (SHA-256 {str(wanted)[:12]})" if wanted else ""
        raise UserError(
            f"the VAE{what} of {checkpoint.path} is at none of {', '.join(dict.fromkeys(named))}; "
            "start the page with --vae_path"
        )

    def _digest(self, path: Path) -> str:
        key = (str(path), _stamp(path))
        if key not in self._digests:
            self._digests[key] = vae_digest(path)
        return self._digests[key]


def _stamp(path: Path) -> tuple:
    """Changes when the file does, or the files of a folder: training replaces checkpoints."""
    files = [path, *path.glob("*")] if path.is_dir() else [path]
    stats = [file.stat() for file in sorted(files) if file.exists()]
    return tuple((stat.st_ino, stat.st_mtime_ns, stat.st_size) for stat in stats)


def size_of(checkpoint: Checkpoint) -> str:
    """The --model of a published checkpoint, which does not say it, by the width of its classes."""
    embedding = checkpoint.weights("model").get("class_emb.weight")
    width = embedding.shape[-1] if embedding is not None else None
    for name in PRESETS:
        if preset(name)["encoder_embed_dim"] == width:
            return name
    raise UserError(f"checkpoint {checkpoint.path}: of none of the sizes {', '.join(PRESETS)}")


def defaults_of(checkpoint: Checkpoint) -> Defaults:
    """As training drew its previews, if there is a training that says so."""
    changes = {}
    for field, name, kinds in (
        ("num_iter", "preview_iter", (int,)),
        ("cfg", "cfg", (int, float)),
        ("temperature", "temperature", (int, float)),
    ):
        value = checkpoint.argument(name)
        value = value[0] if isinstance(value, list) and value else value
        if type(value) in kinds and 0 <= value < MOST:
            changes[field] = value
    return Defaults(**changes)


def facts_of(model: TokenBridge, vae: VAE, path: Path, classes: int) -> tuple[str, ...]:
    config, origin = model.config, model.origin
    bits = (config.quant_levels - 1).bit_length()
    count = sum(parameter.numel() for parameter in model.parameters())
    facts = [
        f"{count / 1e6:.1f} M parameters",
        f"{classes} classes",
        f"{config.img_size} px",
        f"{config.grid_size} × {config.grid_size} positions of {config.token_dim} × {bits} bits",
        f"VAE {path}",
    ]
    return (*facts, f"step {origin.step:,}") if origin.step is not None else tuple(facts)


def class_names(class_num: int, known: tuple[str, ...] | None) -> tuple[str, ...]:
    """Of those trained, as its folders were called; ImageNet's thousand by their English names."""
    of_imagenet = not known or all(SYNSET.fullmatch(name) for name in known)
    if class_num == IMAGENET and of_imagenet and len(known or ()) in (0, IMAGENET):
        from torchvision.models import ResNet50_Weights  # its list of names, not its weights

        return tuple(ResNet50_Weights.DEFAULT.meta["categories"])
    return tuple(known or ())[:class_num] or tuple(map(str, range(class_num)))


def class_labels(names: tuple[str, ...]) -> list[str]:
    """What the list shows: a name and its number, where that is not the name."""
    return [name if name == str(i) else f"{name} ({i})" for i, name in enumerate(names)]
