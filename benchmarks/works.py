"""The works of the model: training step, forward, head, sampling, quantizer, optimizer, VAE."""

import itertools
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import engine_tokenbridge
from benchmarks.kept import kept_for_backward
from benchmarks.plain import SAMPLING, TRAINING, Parts, plain, swapped
from benchmarks.variants import variants
from benchmarks.work import FAST, PLAIN, Settings, Variant, Work
from engine_tokenbridge import train_step
from models import masking
from models.quantizer import GaussianQuantizer
from models.sampler import sample_latents
from models.tokenbridge import TokenBridge
from models.tokenizers.kl16 import KL16, AutoencoderKL
from models.tokenizers.tokenizer import Tokenizer
from util import flops
from util.agreement import Agreement
from util.ema import EMA
from util.optim import build_optimizer
from util.plan import Plan, Run, Schedule, TrainSettings

GUIDANCE = 3.0
TOKEN_CACHE = 4  # iterations


def build_model(settings: Settings, name: str | None = None, **changes) -> TokenBridge:
    """The named model of random weights, by default the one to be measured."""
    torch.manual_seed(0)
    config = replace(settings.config(name or settings.model), **changes)
    return TokenBridge(**config.to_dict()).to(settings.device)


def class_labels(count: int, model: TokenBridge, device: torch.device | None = None) -> Tensor:
    """One class after the other, int64 [count]; after the last comes the first."""
    return torch.arange(count, device=device) % model.config.class_num


@dataclass(frozen=True)
class Training:
    """A training run without files, and one batch of cached posteriors."""

    run: Run
    batch: list[Tensor]
    settings: TrainSettings

    @classmethod
    def of(cls, settings: Settings) -> "Training":
        model, device = build_model(settings).train(), settings.device
        channels, *sides = model.config.latent_shape
        moments = torch.randn(settings.batch_size, 2 * channels, *sides, device=device)
        labels = class_labels(settings.batch_size, model, device)
        schedule = Schedule(settings.batch_size, micro_batches=1, images=10**6, seed=0)
        run = Run(
            model=model,
            ema=EMA(model.published_parameters(), 0.9999),
            optimizer=build_optimizer(model.published_parameters(), 1e-4, 0.02),
            scaler=torch.amp.GradScaler(device.type, enabled=False),
            agreement=Agreement(device),
            tokenizer=Tokenizer(None, model.config.latent_scale),
            device=device,
            precision=settings.precision("fp32"),
        )
        plan = TrainSettings(
            plan=Plan(schedule, 0),
            epochs=1,
            grad_clip=3.0,
            max_skipped=20,
            cached=True,
            eval_freq=1,
            output_dir=Path(),
            extras={},
        )
        return cls(run, [moments, labels], plan)

    @property
    def parts(self) -> Parts:
        return Parts(self.run.model, self.run.optimizer, self.run.ema)

    def step(self, settings: Settings, precision: str) -> Callable[[], None]:
        """What `engine_tokenbridge.train` does in a step, but for log and checkpoints."""
        run, numbers = replace(self.run, precision=settings.precision(precision)), itertools.count()

        def step() -> None:
            batches = iter([self.batch])
            result = train_step(run, run.model, batches, next(numbers), self.settings)
            run.agreement.conclude(result.skipped)

        return step


def fixed_mask(settings: Settings) -> AbstractContextManager:
    """Training masks the same number of positions in every run; which ones remains random."""
    return swapped(masking, "draw_mask_ratio", lambda minimum: settings.mask_ratio)


def training_step(settings: Settings) -> Work:
    training = Training.of(settings)
    single = (
        "chunks",
        "modulations",
        "dropout",
        "backbone",
    )  # EMA and AdamW are works of their own
    return Work(
        "train",
        f"training step, batch {settings.batch_size}, {settings.masked} masked positions",
        settings.batch_size,
        "images",
        variants(
            settings,
            partial(training.step, settings),
            training.parts,
            TRAINING,
            single,
            partial(fixed_mask, settings),
        ),
        settings.batch_size * flops.training_step(training.run.model.config, settings.masked).total,
    )


def random_mask(settings: Settings, model: TokenBridge) -> Tensor:
    orders = masking.random_orders(settings.batch_size, model.config.seq_len, settings.device)
    return (orders < settings.masked).to(settings.device)


def latents_and_labels(settings: Settings, model: TokenBridge) -> tuple[Tensor, Tensor]:
    shape = settings.batch_size, *model.config.latent_shape
    labels = class_labels(settings.batch_size, model, settings.device)
    return torch.randn(shape, device=settings.device), labels


def forward(settings: Settings) -> Work:
    model = build_model(settings).eval()
    latents, labels = latents_and_labels(settings, model)
    mask = random_mask(settings, model)

    def run(precision: str) -> Callable[[], None]:
        @torch.no_grad()
        def once() -> None:
            with settings.precision(precision).autocast(settings.device):
                model(latents, labels, mask)

        return once

    return Work(
        "forward",
        f"evaluation forward, batch {settings.batch_size}, {settings.masked} masked positions",
        settings.batch_size,
        "images",
        variants(settings, run, Parts(model), ("quantizer", "head", "backbone")),
        settings.batch_size * flops.forward(model.config, settings.masked).total,
    )


def head_sampling(settings: Settings) -> Work:
    model = build_model(settings).eval()
    config, count = model.config, settings.head_tokens
    z = torch.randn(count, config.decoder_embed_dim, device=settings.device)
    uniforms = torch.rand(count, config.token_dim, device=settings.device)

    def run(precision: str) -> Callable[[], None]:
        def once() -> None:
            with settings.precision(precision).autocast(settings.device):
                model.head.sample(z, uniforms)

        return once

    return Work(
        "head",
        f"head sampling, {count} tokens",
        count,
        "tokens",
        variants(settings, run, Parts(model), ("sampling",)),
        flops.head_sampling(config, count).total,
    )


def sampling(settings: Settings, num_iter: int) -> Work:
    short = num_iter == settings.iterations[0]
    name = settings.model if short else settings.long_model
    model = build_model(settings, name).eval()
    labels = class_labels(settings.sampled, model)

    def run(precision: str, token_cache: int = 0) -> Callable[[], None]:
        def once() -> None:
            with settings.precision(precision).autocast(settings.device):
                sample_latents(
                    model, labels, num_iter=num_iter, cfg=GUIDANCE, token_cache=token_cache
                )

        return once

    single = ("sampling", "guidance", "backbone") if short else ()
    if not short:
        settings = replace(settings, switches=False)
    found = variants(settings, run, Parts(model), SAMPLING, single)
    last = settings.precisions[-1]
    lazy = Variant(f"--token_cache {TOKEN_CACHE}", last, run(last, TOKEN_CACHE), counted=False)
    found.append(lazy)
    return Work(
        f"sample{num_iter}",
        f"sampling {settings.sampled} images, {num_iter} iterations, cfg {GUIDANCE}, {name}",
        settings.sampled,
        "images",
        found,
        settings.sampled * flops.sampling(model.config, num_iter, guided=True).total,
    )


def quantizer(settings: Settings) -> Work:
    module = GaussianQuantizer(64).to(settings.device)
    x = torch.randn(settings.quantized, device=settings.device)
    parts = Parts(model=WithQuantizer(module))
    only = replace(settings, precisions=("fp32",))
    return Work(
        "quantizer",
        f"quantizer, {list(settings.quantized)}, 6 bits, encode",
        x.numel(),
        "scalars",
        variants(only, lambda _: lambda: module.encode(x), parts, ("quantizer",)),
    )


@dataclass(frozen=True)
class WithQuantizer:
    quantizer: GaussianQuantizer


def ema(settings: Settings) -> Work:
    model = build_model(settings)
    average = EMA(model.published_parameters(), 0.9999)
    only = replace(settings, precisions=("fp32",))
    skipped = torch.zeros((), device=settings.device)
    count = sum(p.numel() for p in model.parameters())
    parts = Parts(ema=average)
    found = variants(only, lambda _: lambda: average.update(skipped), parts, ("ema",))
    return Work("ema", "EMA update", count, "parameters", found)


def optimizer(settings: Settings) -> Work:
    model = build_model(settings)
    adamw = build_optimizer(model.published_parameters(), 1e-4, 0.02)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e-3)
    skipped = torch.zeros((), device=settings.device)
    only = replace(settings, precisions=("fp32",))
    count = sum(p.numel() for p in model.parameters())

    def run(_: str) -> Callable[[], None]:
        return lambda: engine_tokenbridge.guarded_step(adamw, skipped)  # the one that is swapped

    found = variants(only, run, Parts(optimizer=adamw), ("optimizer",))
    return Work("optimizer", "AdamW step", count, "parameters", found)


def vae(settings: Settings, direction: str) -> Work:
    torch.manual_seed(0)
    tokenizer = Tokenizer(AutoencoderKL(), 1.0).to(settings.device)
    images = torch.randn(
        settings.batch_size, 3, settings.img_size, settings.img_size, device=settings.device
    )
    latents = tokenizer.mode(tokenizer.posterior(images))
    only = replace(settings, precisions=("fp32",))
    once = {
        "encode": lambda: tokenizer.posterior(images),
        "decode": lambda: tokenizer.decode(latents),
    }[direction]
    count = {"encode": flops.vae_encode, "decode": flops.vae_decode}[direction]
    return Work(
        f"vae_{direction}",
        f"VAE {direction}, batch {settings.batch_size}",
        settings.batch_size,
        "images",
        variants(only, lambda _: once, Parts(), ("channels_last",)),
        settings.batch_size * count(KL16, settings.img_size),
    )


def kept(settings: Settings) -> list[dict]:
    """Bytes that a training forward keeps for backward, plain and fast, at two batch sizes."""
    model = build_model(settings).train()
    latents, labels = latents_and_labels(settings, model)
    mask, rows = random_mask(settings, model), []
    sizes = [settings.batch_size, settings.batch_size // 2]
    for precision in settings.precisions:
        for name, switches in ((FAST, ()), (PLAIN, ("quantizer", "head", "backbone"))):
            row = {"variant": name, "precision": precision, "images": sizes}
            found = []
            for size in filter(None, sizes):
                with plain(Parts(model), *switches):
                    found.append(
                        kept_for_backward(
                            lambda n=size, p=precision: _loss(
                                settings, p, model, latents[:n], labels[:n], mask[:n]
                            ),
                            model.parameters(),
                        )
                    )
            rows.append(row | {key: [asdict(k)[key] for k in found] for key in ("hooks", "alive")})
    return rows


def _loss(settings, precision, model, latents, labels, mask) -> Tensor:
    with settings.precision(precision).autocast(settings.device):
        return model(latents, labels, mask)
