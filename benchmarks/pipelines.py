"""Whole commands at a small size: filling a latent cache, and an evaluation from noise to features.

The VAE is KL-16 and the network of the features torch-fidelity's Inception, both of random
weights, which cost the same as trained ones.
"""

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path

import torch

import main_cache
from benchmarks.inception import save_random_inception
from benchmarks.loaders import PHOTO, make_photos
from benchmarks.plain import swapped
from benchmarks.work import FAST, Settings, Variant, Work
from benchmarks.works import GUIDANCE, build_model
from models.config import PUBLISHED_LATENT_SCALE
from models.sampler import SamplingOptions
from models.tokenizers.kl16 import AutoencoderKL
from models.tokenizers.tokenizer import Tokenizer
from util.evaluation.evaluator import EvalSettings, Evaluator
from util.evaluation.extractor import INCEPTION, Extractor
from util.evaluation.metrics import Measure
from util.provenance import cores
from util.vae_files import save_vae


def in_silence(call: Callable[[], object]) -> None:
    """What the command prints is not the benchmark's."""
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        call()


@contextmanager
def at_once(_depth: int) -> Iterator[Callable[..., None]]:
    """In place of `in_background`: what is handed over is done before anything else is."""
    yield lambda call, *args: call(*args)


def in_turn() -> AbstractContextManager:
    return swapped(main_cache, "in_background", at_once)


def fill_cache(folder: Path, **flags) -> None:
    """main_cache.py into a new folder, from its reading of the VAE's file to the manifest."""
    with tempfile.TemporaryDirectory(dir=folder) as cache:
        given = {"cached_path": Path(cache) / "cache", **flags}
        argv = [str(part) for k, v in given.items() for part in (f"--{k}", v)]
        args = main_cache.make_parser().parse(argv)
        in_silence(lambda: main_cache.write_cache(args, torch.device(args.device)))


def caching(settings: Settings, folder: Path) -> Work:
    """Mirror images included; in four batches or more, so that one is decoded beside another."""
    torch.manual_seed(0)
    vae_path = folder / "vae.ckpt"
    save_vae(vae_path, AutoencoderKL())
    photos = make_photos(folder / "photos", settings.cached)
    flags = {"vae_path": vae_path, "data_path": photos, "img_size": settings.img_size}
    flags |= {"num_workers": max(1, cores() - 1), "device": settings.device.type}
    flags |= {"batch_size": max(1, min(128, settings.cached // 4))}
    run = partial(fill_cache, folder, **flags)
    found = [Variant(FAST, "", run)]
    if settings.switches:
        found.append(Variant("encode and write in turn", "", run, in_turn))
    title = f"caching {settings.cached} JPEG images of {PHOTO[0]} x {PHOTO[1]}, both views"
    return Work("caching", title, settings.cached, "images", found)


def evaluation(settings: Settings, folder: Path) -> Work:
    """Sampling, VAE decode, PNG files and Inception's features of a few images."""
    count, device = settings.evaluated, settings.device
    model = build_model(settings, settings.long_model, class_num=count).eval()
    torch.manual_seed(0)
    tokenizer = Tokenizer(AutoencoderKL(), PUBLISHED_LATENT_SCALE).to(device)
    weights = save_random_inception(folder / "inception.pth")
    measure = Measure(Extractor(INCEPTION, weights, device))
    asked = EvalSettings(
        num_images=count,
        batch_size=count,
        sampling=SamplingOptions(num_iter=settings.iterations[0], cfg=GUIDANCE),
    )

    def run(precision: str) -> Callable[[], None]:
        def once() -> None:
            arithmetic = settings.precision(precision)
            with tempfile.TemporaryDirectory(dir=folder) as place:
                target = Path(place) / "evaluation"
                evaluator = Evaluator(model, tokenizer, device, arithmetic, measure)
                in_silence(lambda: evaluator.evaluate(asked, target))

        return once

    last = settings.precisions[-1]
    found = [Variant(FAST, last, run(last))]
    title = (
        f"evaluation of {count} images, {settings.long_model}, {asked.sampling.num_iter} iterations"
    )
    return Work("evaluation", f"{title}, PNG and features", count, "images", found)
