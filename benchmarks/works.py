"""The works that are timed. Weights are random, which costs the same."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from unittest.mock import patch

import torch
from torch import Tensor, nn

from models import flops
from models.config import TokenBridgeConfig
from models.masking import MaskRatios
from models.sampler import SamplingOptions, sample_latents
from models.tokenbridge import TokenBridge
from models.tokenizers.kl16 import AutoencoderKL
from models.tokenizers.tokenizer import DECODE_BATCH, Tokenizer
from util.device import accelerate, resolve_precision
from util.optim import EMA, build_optimizer, guarded_step

MASK_RATIO = 0.867  # the mean of training's
CFG = 3.0  # guidance
HEAD_POSITIONS = 32  # for each image of the batch


@dataclass(frozen=True)
class Settings:
    """The sizes of everything: a batch of images, and a batch of HEAD_POSITIONS times as many.

    without: the part of a training step that is replaced by nothing, to see what it costs:
    backbone, head or optimizer (with the average). sampling: options of `sample_latents`.
    """

    config: TokenBridgeConfig
    batch_size: int
    num_iter: int
    device: torch.device
    compile: bool = False
    grad_checkpointing: bool = False
    cuda_graphs: bool = False
    without: str = ""
    sampling: dict = field(default_factory=dict)

    @property
    def masked(self) -> int:
        """Masked positions of an image in training and forward."""
        return math.ceil(self.config.seq_len * MASK_RATIO)

    def autocast(self, precision: str) -> AbstractContextManager:
        return resolve_precision(precision, self.device).autocast(self.device)

    @property
    def labels(self) -> Tensor:
        return torch.arange(self.batch_size, device=self.device) % self.config.class_num

    def build_model(self) -> TokenBridge:
        torch.manual_seed(0)
        options = dict(grad_checkpointing=self.grad_checkpointing)
        with self.device:  # weights are drawn where that is fast
            model = TokenBridge(**options, **self.config.to_dict()).to(self.device)
        accelerate(model, self.device, self.compile, self.cuda_graphs)
        if self.without == "backbone":
            z = model.backbone.mask_token  # [1, 1, D]
            model.backbone.forward = lambda *inputs: z.expand(*inputs[-1].shape, -1)
        if self.without == "head":
            model.head.loss = lambda z, targets, grad_scale: z.float().square().mean()
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
        # The mean of the masks, in every step; and head_share is of masks that are drawn.
        mean = patch.object(MaskRatios, "draw", lambda ratios: MASK_RATIO)
        with settings.autocast(precision), mean:
            loss = model(latents, labels)
        loss.backward()
        if settings.without != "optimizer":
            nn.utils.clip_grad_norm_(model.parameters(), 3.0)
            guarded_step(optimizer, skipped)
            ema.update(skipped)
        optimizer.zero_grad(set_to_none=True)

    title = f"training step, batch {batch}, {settings.masked} masked positions"
    operations = batch * flops.training_step(model.config, settings.masked)
    return Work(title, batch, "images", step, None if settings.without else operations)


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
    options = {"num_iter": num_iter, "cfg": CFG} | settings.sampling

    def sample(precision: str) -> None:
        with settings.autocast(precision):
            sample_latents(model, labels, **options)

    said = ", ".join(f"{name} {value}" for name, value in options.items())
    title = f"sampling {count} images, {said}"
    # The token cache's are counted as the plain sampler's: what it saves shows as a larger share.
    operations = count * flops.sampling(model.config, SamplingOptions(**options))
    return Work(title, count, "images", sample, operations)


def vae(settings: Settings, direction: str) -> Work:
    """Encoding in fp32, the only way; decoding in any precision, as --vae_precision has it."""
    torch.manual_seed(0)
    tokenizer = Tokenizer(AutoencoderKL(), 1.0).to(settings.device)
    batch, size = settings.batch_size, settings.config.img_size
    images = torch.randn(batch, 3, size, size, device=settings.device)
    latents = tokenizer.mode(tokenizer.posterior(images))

    def run(precision: str) -> None:
        if direction == "encode":
            tokenizer.posterior(images)
            return
        tokenizer.decode_dtype = resolve_precision(precision, settings.device).dtype
        for part in latents.split(DECODE_BATCH):
            tokenizer.decode(part)

    operations = batch * vae_operations(size)[direction]
    precisions = ("fp32",) if direction == "encode" else ("fp32", "bf16")
    return Work(f"VAE {direction}, batch {batch}", batch, "images", run, operations, precisions)


@torch.no_grad()
def features(settings: Settings) -> Work:
    """torchvision's Inception v3 at 299 px: as costly as the network that FID is measured with."""
    from torchvision.models import inception_v3  # seconds, which the others shall not wait

    network = inception_v3(weights=None, init_weights=False).to(settings.device).eval()
    images = torch.randn(settings.batch_size, 3, 299, 299, device=settings.device)

    def run(precision: str) -> None:
        with torch.no_grad():
            network(images)

    title = f"Inception v3, batch {settings.batch_size}"
    return Work(title, settings.batch_size, "images", run, precisions=("fp32",))


@torch.no_grad()
def vae_operations(size: int, **vae) -> dict[str, int]:
    """Of encoding an image of so many pixels a side and of decoding it, by torch's own counter."""
    with torch.device("meta"):
        network, images = AutoencoderKL(**vae), torch.empty(1, 3, size, size)
        latents = network.encode(images).mean
        encode = flops.count(lambda: network.encode(images))
        return {"encode": encode, "decode": flops.count(lambda: network.decode(latents))}


WORKS: dict[str, Callable[[Settings], Work]] = {
    "train": training,
    "head": head_sampling,
    "sample": sampling,
    "vae_encode": partial(vae, direction="encode"),
    "vae_decode": partial(vae, direction="decode"),
    "features": features,
}
