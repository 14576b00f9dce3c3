"""What --token_cache and --order do to the demo's digits, and to the time that sampling takes.

python -m benchmarks.decoding [--demo output/demo --seeds 3] [--page FILE]

Needs what `make demo` left. Every point draws the same numbers of images with the same seeds and
the demo's flags; the judge is the demo's classifier of real digits.
Writes a Markdown table to stdout, or into FILE between its marks.
"""

import time
from dataclasses import replace
from pathlib import Path
from statistics import mean

import torch
from torch import Tensor
from tqdm import tqdm

from demo.classifier import EXTRACTOR, FEATURES
from models.sampler import SamplingOptions
from models.tokenizers.tokenizer import Tokenizer
from util.args import positive_int
from util.build import build_model
from util.checkpoint import find_checkpoint
from util.device import Precision
from util.errors import UserError, run
from util.evaluation.evaluator import Evaluator
from util.evaluation.extractor import Extractor
from util.evaluation.metrics import frechet, statistics
from util.evaluation.reference import load_fid_statistics
from util.evaluation.settings import EvalSettings
from util.page import check_place, write_between
from util.parser import Parser
from util.provenance import environment
from util.vae_files import load_vae

CPU = torch.device("cpu")
PRECISION = Precision("fp32", None)
DEMO = EvalSettings(
    num_images=360,
    batch_size=90,
    sampling=SamplingOptions(num_iter=16, cfg=2.0, temperature=0.5, seed=1),
)
POINTS = {
    "random order": {},
    "`--token_cache 2`": {"token_cache": 2},
    "`--token_cache 4`": {"token_cache": 4},
    "`--token_cache 8`": {"token_cache": 8},
    "`--order raster`": {"order": "raster"},
    "`--order confidence`": {"order": "confidence"},
}
MARK = "benchmarks.decoding"  # of the place in a page
HEAD = ("", "accuracy", "Fréchet distance", "s / 100 images", "times as fast")


def make_parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("--demo", default="output/demo", help="folder that make demo filled")
    parser.add_argument("--seeds", type=positive_int, default=3, help="each with 360 images")
    parser.add_argument("--page", type=Path, help="Markdown file to write the table into")
    return parser


class Judge:
    """Accuracy and Fréchet distance (not FID) of images by the demo's classifier."""

    def __init__(self, demo: Path):
        self.extractor = Extractor(EXTRACTOR, demo / "classifier.pth", CPU)
        self.stats = load_fid_statistics(demo / "digits.npz", FEATURES)

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[float, float]:
        found = self.extractor(images)
        accuracy = (found["logits"].argmax(dim=1) == labels).double().mean().item()
        return accuracy, frechet(statistics(found["features"]), self.stats)


def measure(demo: Path, seeds: int) -> dict[str, list[tuple[float, float, float]]]:
    """{point: accuracy, Fréchet distance and seconds of every seed}, turn by turn."""
    judge = Judge(demo)
    checkpoint = find_checkpoint(str(demo / "model"), "", must_exist=True)
    model = build_model(checkpoint.config, checkpoint, "model_ema").eval()
    tokenizer = Tokenizer(load_vae(str(demo / "vae.ckpt")), checkpoint.config.latent_scale)
    evaluator, classes = Evaluator(model, tokenizer, CPU, PRECISION), checkpoint.config.class_num
    labels = torch.arange(DEMO.num_images) // (DEMO.num_images // classes)
    batches = [range(i, i + DEMO.batch_size) for i in range(0, DEMO.num_images, DEMO.batch_size)]
    found: dict[str, list] = {name: [] for name in POINTS}
    for seed in tqdm(range(1, seeds + 1), "seeds", disable=None):
        for name, change in POINTS.items():
            sampling = replace(DEMO.sampling, seed=seed, **change)
            began = time.perf_counter()
            parts = [
                evaluator.generate(ids, labels[ids.start : ids.stop], sampling) for ids in batches
            ]
            seconds = time.perf_counter() - began
            found[name].append((*judge(torch.cat(parts), labels), seconds))
    return found


def table(found: dict[str, list[tuple[float, float, float]]]) -> list[str]:
    """Means over the seeds, and the range of what the seeds differ by."""
    plain = mean(seconds for *_, seconds in next(iter(found.values())))
    lines = ["| " + " | ".join(HEAD) + " |", "|" + "---|" * len(HEAD)]
    for name, runs in found.items():
        accuracies, distances, times = zip(*runs, strict=True)
        cells = [
            name,
            f"{100 * mean(accuracies):.1f} % ({100 * min(accuracies):.1f} to "
            f"{100 * max(accuracies):.1f})",
            f"{mean(distances):.2f} ({min(distances):.2f} to {max(distances):.2f})",
            f"{mean(times) / DEMO.num_images * 100:.2f}",
            f"{plain / mean(times):.2f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    args = make_parser().parse()
    if args.page:
        check_place(args.page, MARK)
    demo = Path(args.demo)
    missing = [
        name
        for name in ("model", "vae.ckpt", "classifier.pth", "digits.npz")
        if not (demo / name).exists()
    ]
    if missing:
        raise UserError(f"--demo {demo} lacks {', '.join(missing)}; run make demo first")
    found = measure(demo, args.seeds)
    where = environment(CPU, PRECISION.name, 1)
    lines = [
        *table(found),
        "",
        f"Means over {args.seeds} seeds of {DEMO.num_images} images each, "
        f"{DEMO.sampling.num_iter} iterations, `--cfg {DEMO.sampling.cfg:g} "
        f"--temperature {DEMO.sampling.temperature:g}`; the least and the "
        f"most in brackets. Seconds with the VAE. {where['processor']}, {where['system']}, Python "
        f"{where['Python']}, torch {where['torch']}, {torch.get_num_threads()} threads, git "
        f"{where['git revision'][:12]}.",
        "",
    ]
    if args.page:
        write_between(args.page, MARK, lines)
    print("\n".join(lines))


if __name__ == "__main__":
    run(main)
