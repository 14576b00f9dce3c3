"""The works that are timed. Weights are random, which costs the same."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from models import flops
from models.config import TokenBridgeConfig
from models.masking import random_orders
from models.sampler import sample_latents
from models.tokenbridge import TokenBridge
from models.tokenizers.kl16 import AutoencoderKL
from models.tokenizers.tokenizer import Tokenizer
from util.device import compile_model, resolve_precision
from util.optim import EMA, build_optimizer, guarded_step

MASK_RATIO = 0.867  # the mean of training's
CFG = 3.0  # guidance
HEAD_POSITIONS = 32  # for each image of the batch


@dataclass(frozen=True)
class Settings:
    """The sizes of everything: a batch of images, and a batch of HEAD_POSITIONS times as many."""

    config: TokenBridgeConfig
    batch_size: int
    num_iter: int
    device: torch.device
    compile: bool = False

    @property
    def masked(self) -> int:
        """Masked positions of an image in training and forward."""
        return math.ceil(self.config.seq_len * MASK_RATIO)

    def autocast(self, precision: str) -> AbstractContextManager:
        return resolve_precision(precision, self.device).autocast(self.device)

    @property
    def labels(self) -> Tensor:
        return torch.arange(self.batch_size, device=self.device) % self.config.class_num

    def random_mask(self) -> Tensor:
        """[B, L] bool, in each row as many as the mask ratio says."""
        return random_orders(self.batch_size, self.config.seq_len, self.device) < self.masked

    def build_model(self) -> TokenBridge:
        torch.manual_seed(0)
        model = TokenBridge(**self.config.to_dict()).to(self.device)
        if self.compile:
            compile_model(model, self.device)
        return model


@dataclass(frozen=True)
class Work:
    """run: once, given a precision's name. items, operations: of one run, as far as counted."""

    title: str
    items: int
    unit: str
    run: Callable[[str], object]
    operations: float | None = None
    precisions: tuple[str, ...] | None = None


def training(settings: Settings) -> Work:
    """A step of `engine_tokenbridge` in one process, without log and checkpoints."""
    model, batch = settings.build_model().train(), settings.batch_size
    channels, *sides = model.config.latent_shape
    moments = torch.randn(batch, 2 * channels, *sides, device=settings.device)
    labels, skipped = settings.labels, moments.new_zeros(())
    tokenizer = Tokenizer(None, model.config.latent_scale)
    optimizer = build_optimizer(model.published_parameters(), 1e-4, 0.02)
    ema = EMA(model.published_parameters(), 0.9999)

    def step(precision: str) -> None:
        latents = tokenizer.from_moments(moments)
        with settings.autocast(precision):
            loss = model(latents, labels, settings.random_mask())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 3.0)
        guarded_step(optimizer, skipped)
        optimizer.zero_grad(set_to_none=True)
        ema.update(skipped)

    title = f"training step, batch {batch}, {settings.masked} masked positions"
    operations = batch * flops.training_step(model.config, settings.masked)
    return Work(title, batch, "images", step, operations)


def head_sampling(settings: Settings) -> Work:
    model, count = settings.build_model().eval(), HEAD_POSITIONS * settings.batch_size
    z = torch.randn(count, model.config.decoder_embed_dim, device=settings.device)
    uniforms = torch.rand(count, model.config.token_dim, device=settings.device)

    def sample(precision: str) -> None:
        with settings.autocast(precision):
            model.head.sample(z, uniforms)

    title = f"head sampling, {count} tokens"
    operations = count * flops.head(model.config, sampled=True)
    return Work(title, count, "tokens", sample, operations)


def sampling(settings: Settings) -> Work:
    model = settings.build_model().eval()
    count, num_iter, labels = settings.batch_size, settings.num_iter, settings.labels

    def sample(precision: str) -> None:
        with settings.autocast(precision):
            sample_latents(model, labels, num_iter=num_iter, cfg=CFG)

    title = f"sampling {count} images, {num_iter} iterations, cfg {CFG:g}"
    operations = count * flops.sampling(model.config, num_iter, guided=True)
    return Work(title, count, "images", sample, operations)


def vae(settings: Settings, direction: str) -> Work:
    torch.manual_seed(0)
    tokenizer = Tokenizer(AutoencoderKL(), 1.0).to(settings.device)
    batch, size = settings.batch_size, settings.config.img_size
    images = torch.randn(batch, 3, size, size, device=settings.device)
    latents = tokenizer.mode(tokenizer.posterior(images))

    def run() -> Tensor:
        return tokenizer.decode(latents) if direction == "decode" else tokenizer.posterior(images)

    operations = batch * vae_operations(size)[direction]
    title, precisions = f"VAE {direction}", ("fp32",)  # it has no other
    return Work(title, batch, "images", lambda _: run(), operations, precisions)


@torch.no_grad()
def vae_operations(size: int, **vae) -> dict[str, int]:
    """Of encoding an image of so many pixels a side and of decoding it, by torch's own counter."""
    with torch.device("meta"), sdpa_kernel(SDPBackend.MATH):  # shapes alone; no fused attention
        network = AutoencoderKL(**vae)
        with FlopCounterMode(display=False) as encode:
            moments = network.moments(torch.empty(1, 3, size, size))
        with FlopCounterMode(display=False) as decode:
            network.decode(moments[:, : network.channels])
    return {"encode": encode.get_total_flops(), "decode": decode.get_total_flops()}


WORKS: dict[str, Callable[[Settings], Work]] = {
    "train": training,
    "head": head_sampling,
    "sample": sampling,
    "vae_encode": partial(vae, direction="encode"),
    "vae_decode": partial(vae, direction="decode"),
}
