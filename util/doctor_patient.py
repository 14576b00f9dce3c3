"""Whom util.doctor examines: the flags of a training and what they lead to, and what is found.

Each thing is read once, when a check first asks for it; what cannot be read is one check's failure
and for all others Unknown.
"""

import argparse
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path

import torch

from models.config import TokenBridgeConfig
from models.tokenbridge import TokenBridge
from models.tokenizers.kl16 import VAE
from models.tokenizers.tokenizer import Tokenizer
from util.build import ModelFlags, build_config, build_vae
from util.checkpoint import Checkpoint, find_checkpoint
from util.data.histogram import LatentHistogram
from util.data.images import ImageDataset
from util.data.latent_cache import CachedLatents, open_cache
from util.data.listing import ImageList, list_images
from util.errors import UserError
from util.evaluation.extractor import INCEPTION, Extractor, published_weights, registered_name
from util.files import load_tensors
from util.inputs import open_checkpoint, prepare_finetuning
from util.vae import vae_digest

OK, WARNING, FAILURE = "ok", "warning", "failure"
MEASURED_IMAGES = 64  # of --data_path, where no cache says how the latents are distributed


class Unknown(Exception):
    """A check cannot be made for want of something that another check reports."""


@dataclass(frozen=True)
class Finding:
    """text: what was found, with its values. remedy: what helps, if anything has to.

    by_channel: figures of every channel by name, for --json; the text has their extremes.
    """

    state: str
    text: str
    remedy: str = ""
    name: str = ""
    by_channel: dict[str, list[float]] = field(default_factory=dict)

    def named(self, name: str) -> "Finding":
        return replace(self, name=name)

    def on_process(self, rank: int) -> "Finding":
        return replace(self, text=f"process {rank}: {self.text}") if rank else self

    def to_dict(self) -> dict:
        return asdict(self)


def judged(problems: list[str], text: str, remedy: str, state: str = WARNING) -> Finding:
    """ok, or the problems with the remedy."""
    if problems:
        return Finding(state, f"{text}: {'; '.join(problems)}", remedy)
    return Finding(OK, text)


class Patient:
    """The flags and what they lead to; each thing is read when it is first asked for, once."""

    def __init__(self, args: argparse.Namespace, device: torch.device):
        self.args, self.device = args, device

    @cached_property
    def needs_vae(self) -> bool:
        return not self.args.use_cached or self.args.online_eval or self.args.evaluate

    @cached_property
    def vae_sha256(self) -> str | None:
        """None where there is no VAE."""
        if not Path(self.args.vae_path).exists():
            return None
        try:
            return vae_digest(self.args.vae_path)
        except UserError:
            raise Unknown("it needs the VAE") from None

    @cached_property
    def vae_or_error(self) -> VAE | UserError:
        try:
            return build_vae(self.args).eval()
        except UserError as error:
            return error

    @property
    def vae(self) -> VAE:
        if isinstance(self.vae_or_error, UserError):
            raise Unknown("it needs the VAE")
        return self.vae_or_error

    @cached_property
    def cache(self) -> CachedLatents | None:
        """Not compared with anything, which `cache` below does."""
        if not self.args.cached_path:
            return None
        try:
            return open_cache(self.args.cached_path)
        except UserError:
            raise Unknown("it needs the cache") from None

    @property
    def manifest(self) -> dict | None:
        return self.cache.manifest if self.cache is not None else None

    @cached_property
    def images(self) -> ImageList:
        try:
            return list_images(self.args.data_path)
        except UserError:
            raise Unknown("it needs the images of --data_path") from None

    @cached_property
    def extractor(self) -> Extractor | None:
        """None where its weights are not at hand: nothing is downloaded here."""
        given = self.args.inception_weights
        name = registered_name(self.args.feature_extractor)
        path = Path(given) if given else published_weights() if name == INCEPTION else None
        if path is None or not (given or path.is_file()):
            return None
        load_tensors(path, "--inception_weights")
        return Extractor(name, path, torch.device("cpu"))

    @cached_property
    def found_checkpoint(self) -> Checkpoint | None:
        """As a training or an evaluation finds it, but nothing is set aside."""
        args = self.args
        if args.evaluate:
            return (
                find_checkpoint(args.resume, args.output_dir, True, True) if args.resume else None
            )
        found = open_checkpoint(args.resume, args.output_dir, True, args.finetune)
        begins = found is not None and found.begins
        return prepare_finetuning(found, args, self.classes) if begins else found

    @property
    def classes(self) -> list[str]:
        """Of the training data; none where they cannot be read."""
        try:
            data = self.cache if self.args.use_cached else self.images
        except Unknown:
            return []
        return data.classes if data is not None else []

    @cached_property
    def config_or_error(self) -> TokenBridgeConfig | UserError:
        vae = None if isinstance(self.vae_or_error, UserError) else self.vae_or_error
        try:
            checkpoint = self.found_checkpoint
        except UserError:
            raise Unknown("it needs the checkpoint") from None
        try:
            flags = ModelFlags.of(self.args)
            classes = 0 if self.args.evaluate else len(self.classes)
            return build_config(flags, checkpoint, self.manifest, vae, classes)
        except UserError as error:
            return error

    @property
    def config(self) -> TokenBridgeConfig:
        if isinstance(self.config_or_error, UserError):
            raise Unknown("it needs the model's settings")
        return self.config_or_error

    @cached_property
    def model(self) -> TokenBridge:
        """Without its numbers."""
        settings = self.config.to_dict()  # which may read the VAE, and that one with its numbers
        with torch.device("meta"):
            return TokenBridge(**settings)

    @cached_property
    def latents(self) -> tuple[LatentHistogram, str]:
        """How the latents are distributed, not scaled, and whose they are."""
        if self.manifest is not None and self.manifest.get("histogram"):
            histogram = LatentHistogram.from_dict(self.manifest["histogram"])
            return histogram, f"{len(self.cache)} cached images"
        samples = self.images.samples
        chosen = samples[:: max(1, len(samples) // MEASURED_IMAGES)][:MEASURED_IMAGES]
        tokenizer = Tokenizer(self.vae, 1.0).to(self.device)
        dataset = ImageDataset(chosen, self.args.img_size, "drop", self.args.max_image_pixels)
        histogram = LatentHistogram.empty(self.vae.channels)
        for item in (dataset[i] for i in range(len(dataset))):
            if item is not None:
                generator = torch.Generator(self.device).manual_seed(self.args.seed)
                latents = tokenizer.encode(item[0][None].to(self.device), generator)
                histogram += LatentHistogram.of(latents.cpu())
        if not histogram.counts.any():
            raise Unknown("none of the images looked at can be read")
        return histogram, f"{len(chosen)} images of --data_path"
