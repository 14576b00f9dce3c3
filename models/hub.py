"""A model as a folder or a repository on the Hugging Face hub: config.json and model.safetensors.

config.json: the fields of `TokenBridgeConfig`. model.safetensors: all tensors in the published
names, a calibrated quantizer's levels among them; its header says where the weights come from
(`Origin`). README.md: a card. Only these two files are read, and nothing is ever unpickled.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from huggingface_hub import ModelCard, PyTorchModelHubMixin, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    RepositoryNotFoundError,
)
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from models.config import TokenBridgeConfig
from models.tokenizers.kl16 import check_layout

CONFIG, WEIGHTS = "config.json", "model.safetensors"
HEADER = "tokenbridge"  # the one entry of the safetensors header
LARGEST_CONFIG = 1 << 20  # bytes; a larger file is none
CARD = """---
{{ card_data }}
---

# TokenBridge

Class-conditional images of {{ config.img_size }} px in {{ config.class_num }} classes, by the
method of [arXiv 2503.16430](https://arxiv.org/abs/2503.16430).

```python
from models.generate import generate
from models.tokenbridge import TokenBridge
from util.vae import load_vae

model = TokenBridge.from_pretrained("THIS_FOLDER_OR_REPOSITORY")
vae = load_vae("pretrained_models/vae/kl16.ckpt")  # the VAE that it was trained with
images = generate(model, vae, [0, 1, 2], num_iter=64)  # uint8 [3, H, W, 3]
```

| setting | |
|---|---|
{% for name, value in config.items() %}| `{{ name }}` | {{ value }} |
{% endfor %}"""


@dataclass(frozen=True)
class Origin:
    """Where a model's weights come from, as far as that is known.

    weights: "ema" (averaged) or "model" (raw). classes: their names, in the order of the labels.
    vae_sha256: of the file of the VAE that made the latents.
    """

    weights: str | None = None
    step: int | None = None
    epoch: int | None = None
    classes: tuple[str, ...] | None = None
    vae_sha256: str | None = None

    def to_header(self, **facts) -> dict[str, str]:
        """What is known, and further facts, in JSON: a safetensors header holds only strings.

        In one of them: safetensors writes several in random order, and equal models should give
        equal files.
        """
        known = {name: value for name, value in asdict(self).items() if value is not None}
        return {HEADER: json.dumps(known | facts, sort_keys=True)}

    @classmethod
    def from_header(cls, header: dict[str, str]) -> "Origin":
        """The inverse. Raises ValueError on a header that says it in another way."""
        said = json.loads(header.get(HEADER, "{}"))
        if not isinstance(said, dict):
            raise ValueError(f"its header's {HEADER} holds a {type(said).__name__}")
        known = {f.name: said[f.name] for f in fields(cls) if f.name in said}
        for name, value in known.items():
            kind = {"step": int, "epoch": int, "classes": list}.get(name, str)
            if value is not None and type(value) is not kind:
                raise ValueError(f"its header's {name} is {str(value)[:60]!r}, no {kind.__name__}")
        classes = known.get("classes")
        if classes is not None:
            if not all(isinstance(c, str) for c in classes):
                raise ValueError("its header's classes are no list of names")
            known["classes"] = tuple(classes)
        return cls(**known)


class Pretrained(
    PyTorchModelHubMixin,
    library_name="tokenbridge",
    paper_url="https://arxiv.org/abs/2503.16430",
    tags=["image-generation", "class-conditional"],
    model_card_template=CARD,
):
    """`from_pretrained`, `save_pretrained` and `push_to_hub` for a TokenBridge.

    origin: of the weights that were loaded last; who changes the weights sets it anew.
    """

    config: TokenBridgeConfig
    origin: Origin = Origin()

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        force_download: bool = False,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        revision: str | None = None,
        map_location: str | torch.device = "cpu",
        **changes,
    ):
        """The model of a folder, or of a repository NAMESPACE/NAME, in evaluation mode.

        map_location: the device. changes: settings in place of the file's, such as head_input, and
        grad_checkpointing. The other arguments are huggingface_hub's.
        Raises FileNotFoundError if there is nothing of that name, ValueError if it is not a model
        of this form, is damaged, or does not fit the changes.
        """
        source = str(pretrained_model_name_or_path)
        found = {}
        for name in (CONFIG, WEIGHTS):
            found[name] = _find(
                source,
                name,
                force_download=force_download,
                token=token,
                cache_dir=cache_dir,
                local_files_only=local_files_only,
                revision=revision,
            )
        with _told_of(f"{source}: {CONFIG}"):
            options = {k: changes.pop(k) for k in ("grad_checkpointing",) if k in changes}
            saved = _read_json(found[CONFIG])
            config = TokenBridgeConfig.from_dict(saved | changes)
        with _told_of(f"{source}: {WEIGHTS}"):
            model = cls._load(found[WEIGHTS], config, options)
        return model.to(map_location).eval()

    @classmethod
    def _load(cls, path: Path, config: TokenBridgeConfig, options: dict):
        with safe_open(path, framework="pt") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
            cls._check_layout(shapes, config)
            origin = Origin.from_header(file.metadata() or {})
            model = cls(**config.to_dict(), **options)
            state = {name: file.get_tensor(name) for name in shapes}
            model.load_published(state, head_input=config.head_input)
        model.origin = origin
        return model

    @classmethod
    def _check_layout(cls, shapes: dict[str, list[int]], config: TokenBridgeConfig) -> None:
        """Raise ValueError, before anything is given memory, unless file and settings agree."""
        depth = max(config.encoder_depth, config.decoder_depth, config.channel_depth)
        if depth > len(shapes):
            raise ValueError(f"it has {len(shapes)} tensors, {CONFIG} claims {depth} blocks")
        with torch.device("meta"):
            expected = cls(**config.to_dict()).published_state_dict()
            check_layout({k: torch.empty(shape) for k, shape in shapes.items()}, expected)

    def _save_pretrained(self, save_directory: Path) -> None:
        """Both files, each whole or absent. Raises ValueError on a quantizer without levels."""
        if not self.fitted:
            raise ValueError("this model's calibrated quantizer has no levels yet: fit them first")
        header = self.origin.to_header(latent_scale=self.config.latent_scale)
        with _whole(save_directory / WEIGHTS) as path:
            save_file(_plain(self.published_state_dict()), path, header)
        with _whole(save_directory / CONFIG) as path:
            path.write_text(json.dumps(self.config.to_dict(), indent=2) + "\n")

    def generate_model_card(self, *args, **kwargs) -> ModelCard:
        return super().generate_model_card(*args, config=self.config.to_dict(), **kwargs)


def _find(source: str, name: str, **options) -> Path:
    """A file of a folder or of a repository, fetched. Raises FileNotFoundError."""
    if os.path.isdir(source):
        path = Path(source) / name
        if not path.is_file():
            raise FileNotFoundError(f"{source} has no {name}; {REMEDY}")
        return path
    try:
        return Path(hf_hub_download(source, name, **options))
    except HFValidationError:
        raise FileNotFoundError(
            f"{source}: no such folder, and no name of a repository (NAMESPACE/NAME)"
        ) from None
    except RepositoryNotFoundError as error:
        if isinstance(error, GatedRepoError):
            raise
        raise FileNotFoundError(
            f"{source}: no such folder, and the hub knows no such repository, or shows it only to "
            "those who are logged in (hf auth login)"
        ) from error
    except EntryNotFoundError as error:
        # Also a LocalEntryNotFoundError, where the hub cannot be asked: it says so itself.
        lines = str(error).strip().splitlines()
        reason = f"the repository has no {name}; {REMEDY}"
        if isinstance(error, FileNotFoundError):
            reason = f"no such folder, and not fetched from the hub: {lines[0]}"
        raise FileNotFoundError(f"{source}: {reason}") from error


REMEDY = (
    "a checkpoint of training or of the published code becomes such a folder by "
    "python -m util.export --resume FOLDER --output_dir OUT"
)


@contextmanager
def _told_of(file: str) -> Iterator[None]:
    """Say of which file it is, in one line, when a file holds anything but a model."""
    try:
        yield
    except (ValueError, TypeError, RuntimeError, OverflowError, SafetensorError) as error:
        raise ValueError(f"{file}: {' '.join(str(error).split())}") from error


def _read_json(path: Path) -> dict:
    with open(path, "rb") as file:
        text = file.read(LARGEST_CONFIG + 1)
    if len(text) > LARGEST_CONFIG:
        raise ValueError(f"more than {LARGEST_CONFIG} bytes, which no model's settings have")
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"damaged, not JSON ({error})") from error
    if not isinstance(values, dict):
        raise ValueError(f"holds a {type(values).__name__}, not settings by name")
    return values


def _plain(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors on the CPU, none a view of another's memory, as safetensors wants them."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    return {
        name: tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()
        for name, tensor in tensors.items()
    }


@contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """A path to write to; the file takes its name when it is complete and on the disk."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
