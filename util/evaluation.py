"""Evaluation: image numbers -> sampler -> VAE decoder -> PNG files, FID, IS."""

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from models.sampler import CFG_SCHEDULES, evaluation_mode, sample_latents
from models.tokenbridge import TokenBridge
from models.tokenizer import Tokenizer
from util import dist, metrics
from util.args import Parser, non_negative_float, positive_int
from util.build import ModelFlags, build_config, build_model, build_vae, check_vae, warn_other_vae
from util.checkpoint import find_checkpoint, load_checkpoint
from util.device import Precision
from util.errors import UserError
from util.files import atomic_write, sha256
from util.images import Gallery, grid, save_png, to_uint8
from util.metrics import ImageFeatures, Inception

GRID_ROWS, GRID_COLUMNS = 8, 10
DECODE_BATCH = 32


def add_evaluation_flags(parser: Parser) -> None:
    group = parser.add_argument_group("evaluation")
    group.add_argument("--evaluate", action="store_true", help="generate images and stop")
    group.add_argument("--online_eval", action="store_true", help="evaluate while training")
    group.add_argument("--eval_freq", type=positive_int, default=40, help="in epochs")
    group.add_argument("--eval_bsz", type=positive_int, default=64, help="images a batch")
    group.add_argument("--num_images", type=positive_int, default=50000, help="in all")
    group.add_argument("--num_iter", type=positive_int, default=256, help="iterations")
    group.add_argument("--cfg", type=non_negative_float, default=1.0, help="guidance; 1 is none")
    group.add_argument("--cfg_schedule", choices=CFG_SCHEDULES, default="linear")
    group.add_argument("--temperature", type=non_negative_float, default=1.0, help="0: argmax")
    group.add_argument(
        "--eval_weights", choices=("ema", "model"), default="ema", help="averaged or raw weights"
    )


@dataclass(frozen=True)
class EvalSettings:
    """What decides the generated images. Image i is of class i // (num_images / classes)."""

    num_images: int
    eval_bsz: int
    num_iter: int
    cfg: float
    cfg_schedule: str
    temperature: float
    seed: int
    weights: str = "ema"  # or "model", the raw ones

    def folder_name(self) -> str:
        return (
            f"ariter{self.num_iter}-temp{self.temperature:g}-{self.cfg_schedule}cfg{self.cfg:g}"
            f"-image{self.num_images}-seed{self.seed}-{self.weights}"
        )


def eval_settings(args: argparse.Namespace, class_num: int) -> EvalSettings:
    if args.num_images % class_num:
        raise UserError(
            f"--num_images {args.num_images} is not a multiple of --class_num {class_num}: "
            "every class gets the same number"
        )
    return EvalSettings(
        num_images=args.num_images,
        eval_bsz=args.eval_bsz,
        num_iter=args.num_iter,
        cfg=args.cfg,
        cfg_schedule=args.cfg_schedule,
        temperature=args.temperature,
        seed=args.seed,
        weights=args.eval_weights,
    )


def evaluate_checkpoint(
    args: argparse.Namespace, device: torch.device, precision: Precision
) -> None:
    """Load a checkpoint and generate; without one there is nothing to evaluate."""
    if not args.resume:
        raise UserError("--evaluate needs --resume, the folder of the checkpoint to evaluate")
    checkpoint = load_checkpoint(find_checkpoint(args.resume, args.output_dir, must_exist=True))
    vae = build_vae(args)
    config = build_config(ModelFlags.of(args), checkpoint, manifest=None, vae=vae)
    check_vae(vae, config, args.vae_path)
    warn_other_vae(checkpoint, sha256(args.vae_path))
    settings = eval_settings(args, config.class_num)
    key = "model_ema" if args.eval_weights == "ema" else "model"
    model = build_model(config, checkpoint, key).to(device)
    tokenizer = Tokenizer(vae, config.latent_scale).to(device)
    inception = metrics.prepare(
        args.fid_stats, args.inception_weights, device, wanted=not args.no_metrics
    )
    dist.print_main(f"{args.eval_weights} weights of {checkpoint.path}")
    checkpoint.release()
    folder = Path(args.output_dir) / settings.folder_name()
    evaluate(model, tokenizer, settings, folder, device, precision, inception)


def evaluate(
    model: TokenBridge,
    tokenizer: Tokenizer,
    settings: EvalSettings,
    folder: Path,
    device: torch.device,
    precision: Precision,
    inception: Inception | None,
) -> tuple[dict[str, float], Tensor | None]:
    """Write the images into folder/images, a grid and metrics.json beside them.

    Each process takes whole batches, the same ones on any number of processes; image i depends on
    (seed, i) alone. inception: None if nothing can be measured.
    Returns, on the main process, the metrics and the grid, uint8 [3, H, W].
    """
    (folder / "images").mkdir(parents=True, exist_ok=True)
    features = ImageFeatures(inception) if inception is not None else None
    gallery = Gallery(shown_ids(settings.num_images, model.config.class_num))
    starts = range(0, settings.num_images, settings.eval_bsz)[dist.rank() :: dist.world_size()]
    with evaluation_mode(model):
        for start in tqdm(starts, desc="generating", disable=not dist.is_main()):
            ids = range(start, min(start + settings.eval_bsz, settings.num_images))
            images = generate(model, tokenizer, ids, settings, device, precision)
            for image_id, image in zip(ids, images, strict=True):
                save_png(image, folder / "images" / f"{image_id:05d}.png")
            gallery.add(ids, images)
            if features is not None:
                features.add(list(ids), images)
    results = features.compute() if features is not None else {}
    shown, samples = gallery.gather(), None
    if shown is not None:
        samples = grid(shown, min(model.config.class_num, GRID_COLUMNS))
        save_png(samples, folder / "grid.png")
        write_results(folder, settings, model, results)
    dist.barrier()
    return results, samples


def shown_ids(num_images: int, class_num: int) -> list[int]:
    """Images for a first look: a column for each of the first classes."""
    per_class = num_images // class_num
    rows, columns = range(min(per_class, GRID_ROWS)), range(min(class_num, GRID_COLUMNS))
    return [c * per_class + k for k in rows for c in columns]


def generate(
    model: TokenBridge,
    tokenizer: Tokenizer,
    ids: range,
    settings: EvalSettings,
    device: torch.device,
    precision: Precision,
) -> Tensor:
    """The images of those numbers, uint8 [N, 3, H, W], on the CPU."""
    per_class = settings.num_images // model.config.class_num
    with precision.autocast(device):
        latents = sample_latents(
            model,
            torch.tensor([i // per_class for i in ids]),
            num_iter=settings.num_iter,
            cfg=settings.cfg,
            cfg_schedule=settings.cfg_schedule,
            temperature=settings.temperature,
            seed=settings.seed,
            image_ids=ids,
        )
    # The decoder's first-level maps of 256 images at 256 px would fill a GPU on their own.
    parts = [to_uint8(tokenizer.decode(part)).cpu() for part in latents.split(DECODE_BATCH)]
    return torch.cat(parts)


def write_results(
    folder: Path, settings: EvalSettings, model: TokenBridge, results: dict[str, float]
) -> None:
    record = {
        "metrics": results,
        "settings": asdict(settings),
        "images_per_class": settings.num_images // model.config.class_num,
        "model": model.config.to_dict(),
    }
    with atomic_write(folder / "metrics.json") as file:
        file.write(json.dumps(record, indent=1).encode())
    print(f"{settings.num_images} images in {folder}; a first look: {folder / 'grid.png'}")
    for name, value in results.items():
        print(f"{name}: {value:.4f}")
