"""A model as a folder or a repository on the Hugging Face hub: config.json and model.safetensors.

config.json: the fields of `TokenBridgeConfig`. model.safetensors: all tensors in the published
names; its header holds their `Origin`. Nothing is ever unpickled.
"""

import json
import os
import shutil
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import PyTorchModelHubMixin, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, RepositoryNotFoundError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from models.config import TokenBridgeConfig

CONFIG, WEIGHTS = "config.json", "model.safetensors"
HEADER = "tokenbridge"  # one entry: safetensors writes several in random order
DOWNLOAD_OPTIONS = ("revision", "token", "cache_dir", "force_download", "local_files_only")
DAMAGE = (ValueError, TypeError, AttributeError, ArithmeticError, RuntimeError, SafetensorError)


@dataclass(frozen=True)
class Origin:
    """classes: names by label. args: the flags of training's own images. None: not known."""

    weights: str | None = None  # "ema" (averaged) or "model" (raw)
    step: int | None = None
    epoch: int | None = None
    classes: tuple[str, ...] | None = None
    vae_sha256: str | None = None
    args: dict | None = None

    @classmethod
    def from_header(cls, header: dict[str, str] | None) -> "Origin":
        """Of a safetensors file."""
        known = json.loads((header or {}).get(HEADER, "{}"))
        if known.get("classes") is not None:
            known["classes"] = tuple(map(str, known["classes"]))
        return cls(**{field.name: known.get(field.name) for field in fields(cls)})


class Pretrained(
    PyTorchModelHubMixin, library_name="tokenbridge", paper_url="https://arxiv.org/abs/2503.16430"
):
    """`from_pretrained`, `save_pretrained` and `push_to_hub`. origin: of the weights."""

    config: TokenBridgeConfig
    origin: Origin = Origin()

    @classmethod
    def from_pretrained(
        cls, source: str | Path, *, map_location="cpu", grad_checkpointing: bool = False, **options
    ):
        """The model of a folder, or of a repository NAMESPACE/NAME, in evaluation mode.

        options: of `hf_hub_download` (revision, ...), or settings to change (head_input, ...).
        Raises FileNotFoundError if there is none, ValueError if it is damaged or does not fit.
        """
        download = {name: options.pop(name) for name in DOWNLOAD_OPTIONS if name in options}
        settings, weights = (_fetch(str(source), name, download) for name in (CONFIG, WEIGHTS))
        try:
            name = CONFIG
            config = TokenBridgeConfig.from_dict(json.loads(settings.read_bytes()) | options)
            name = WEIGHTS
            with safe_open(weights, framework="pt") as file:
                model = cls(**config.to_dict(), grad_checkpointing=grad_checkpointing)
                model.origin = Origin.from_header(file.metadata())
                state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            model.load_published(state, config.head_input)
        except DAMAGE as error:
            raise ValueError(f"{source}: {name}: {' '.join(str(error).split())}") from error
        return model.to(map_location).eval()

    def _save_pretrained(self, save_directory: Path) -> None:
        """Both files, each whole or absent. Raises ValueError on a quantizer without levels."""
        if self.quantizer is not None and not self.quantizer.fitted:
            raise ValueError("this model's calibrated quantizer has no levels yet: fit them first")
        # Copies: safetensors takes no tensor that is a view of another's memory.
        state = {name: tensor.clone() for name, tensor in self.published_state_dict().items()}
        known = {name: value for name, value in asdict(self.origin).items() if value is not None}
        known["latent_scale"] = self.config.latent_scale
        with TemporaryDirectory(prefix=".", dir=save_directory) as folder:
            save_file(state, Path(folder, WEIGHTS), {HEADER: json.dumps(known, sort_keys=True)})
            Path(folder, CONFIG).write_text(json.dumps(self.config.to_dict(), indent=2) + "\n")
            # safetensors makes files that only their owner may read.
            shutil.copymode(Path(folder, CONFIG), Path(folder, WEIGHTS))
            for name in (WEIGHTS, CONFIG):
                os.replace(Path(folder, name), save_directory / name)


def _fetch(source: str, name: str, options: dict) -> Path:
    """A file of a folder, or of a repository. Raises FileNotFoundError."""
    if os.path.isdir(source):
        return Path(source, name)
    try:
        return Path(hf_hub_download(source, name, **options))
    except (HFValidationError, RepositoryNotFoundError, EntryNotFoundError) as error:
        reason = " ".join(str(error).split())
        raise FileNotFoundError(f"{source}: no such folder, nor on the hub: {reason}") from error
