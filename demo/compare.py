"""Every head on the same images, tokenizer, backbone and optimizer steps, measured the same way.

python -m demo.compare [--data gallery] [--quick] [--long] [--only GROUP ...] [--heads HEAD ...]
python -m demo.compare --render benchmarks/results/heads.json

What is finished is not done again, also after a kill. Everything goes to output/compare, with
-gallery and -quick behind it; --render puts a results.json into the pages of docs/, as tables and
charts.
"""

import ctypes
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import fields
from datetime import timedelta
from fractions import Fraction
from functools import cached_property, partial
from itertools import product
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np
import torch

from demo import classifier
from demo.compare_page import GROUPS, draw_sheet, render, tables
from models import flops
from models.config import HEAD_QUANTIZERS, HEADS, QUANTIZERS, TokenBridgeConfig
from models.quantizer import entropy
from models.sampler import SamplingOptions, iterations
from models.tokenbridge import TokenBridge
from models.tokenizers.tokenizer import Tokenizer
from util import ROOT, dist
from util.args import Parser
from util.checkpoint import find_checkpoint
from util.data.latent_cache import open_cache
from util.errors import UserError
from util.evaluation.extractor import Extractor
from util.evaluation.folder import read_json, write_json
from util.evaluation.metrics import Accumulator, Measure, score
from util.evaluation.reconstruction import quantized
from util.evaluation.reference import load_fid_statistics
from util.files import only_job_in
from util.logging import environment, git_revision
from util.setup import build_model
from util.validation import evenly_spread, read_latents

# The user's own commands; {root} is the folder of the comparison, {run} that of a training.
JUDGE = "--feature_extractor demo.classifier:judge --inception_weights {root}/classifier.pth"
COMMANDS = {
    "data": "-m demo.{subject} --output {root}/data",
    "cache": "main_cache.py --img_size {size} --vae_path {vae} --data_path {root}/data "
    "--cached_path {root}/cache-{tokenizer} --shard_size 360 --num_workers 0 --device cpu",
    "judge": "-m demo.classifier train --root {root} --network {subject} --epochs {judge}",
    "statistics": "-m util.fid_stats --image_dir {root}/data/train --img_size {size} "
    f"{JUDGE} --num_workers 0 --output {{root}}/statistics.npz --device cpu",
    "train": "main_tokenbridge.py --config configs/{subject}.yaml --head {head} --seed {seed} "
    "--cached_path {root}/cache-{tokenizer} --vae_path {vae} --val_path {root}/data/val "
    "--val_images {val_images} --batch_size {batch} --epochs {epochs} --warmup_epochs {warmup} "
    "--save_every {often} --val_freq {often} --preview_freq 0 --resume auto --device cpu "
    "--output_dir {run} --metrics_file {run}/metrics.jsonl",
    "draw": "main_tokenbridge.py --evaluate --vae_path {vae} --resume {checkpoint} --seed {seed} "
    "--num_images {images} --eval_bsz 90 --keep_images --device cpu "
    f"{JUDGE} --fid_stats {{root}}/statistics.npz --output_dir {{folder}}",
}
# About as many parameters as the channel head of tokenbridge_tiny has, where flags decide it; four
# timesteps a token, as MAR trains.
TRAINED = {"diffusion": ("--diffloss_d=3", "--diffloss_w=96", "--diffusion_batch_mul=4")}
# Nothing is clipped: after so little training, the published 100 steps of sampling diverge.
DRAWN = {"diffusion": ("--num_sampling_steps=500",)}
WARMUP = 2 / 24  # of the epochs, as in configs/digits.yaml
# Ways to draw from the channel head, and the guidances of which each takes its best, at the
# published temperature: near the best one for these digits, 0.4, little guidance is needed.
SAMPLED = [(), ("--cfg_schedule=constant",), ("--cfg_schedule=cosine",)]
SAMPLED += [("--cfg_schedule=cosine", "--cfg_power=2"), ("--mask_schedule=exp",)]
for ends in ("0 0.5", "0.18 0.6", "0.5 1"):
    SAMPLED += [("--cfg_schedule=constant", "--cfg_interval", *ends.split())]
for flag in ("--order=raster", "--order=confidence", "--token_cache=2", "--token_cache=4"):
    SAMPLED += [(flag,)]
EXPONENTIAL = "--mask_distribution=exp", "--mask_ratio_min=0.2"  # as published
GUIDANCES, TEMPERATURE = (1.5, 2.0, 3.0, 4.0), 0.96
REPORTED = 1000  # added to the seed of the images by which the temperature is chosen
TRAINING, DRAWING = {"channel": 230}, {"diffusion": 900}  # seconds planned, of others 120 and 150
CPU = torch.device("cpu")
PARENT_DIES = 1  # PR_SET_PDEATHSIG of Linux


class Scale(NamedTuple):
    """On which images, and how much is done. lr: as configured. discrete: flags of heads that have
    levels. judge: its epochs. slower: how many times as long as with the digits a stage takes.
    more: flags of all trainings.
    """

    subject: str = "digits"
    size: int = 32
    channels: int = 8
    lr: float = 3e-3
    discrete: tuple[str, ...] = ("--quant_bits=4",)
    slower: float = 1
    quick: bool = False
    val_images: int = 360
    epochs: int = 48
    batch: int = 32
    images: int = 360
    judge: int = 30
    iterations: tuple[int, ...] = (4, 8, 16)
    temperatures: tuple[float, ...] = (0.2, 0.4, 0.6, 0.8, 1.0, 1.2)
    guidances: tuple[float, ...] = (1.0, 2.0)
    more: tuple[str, ...] = ()


CALIBRATED = "--quant_bits=4", "--quantizer=calibrated"
DATA = {"digits": Scale()}
DATA["gallery"] = Scale(
    *("emoji", 64, 16, 2e-3, CALIBRATED),
    slower=10,
    val_images=310,
    epochs=24,
    batch=8,
    images=330,
)
FEW = "--log_freq=4", "--save_last_freq=1", "--ema_rate=0.9"
QUICK = dict(quick=True, val_images=32, epochs=2, batch=128, images=80, judge=3, iterations=(2, 4))
QUICK |= dict(temperatures=(0.7, 1.0), guidances=(2.0,), more=FEW)


class Run(NamedTuple):
    """A training and the images that are drawn of it. label: its row in the group's table.

    like: a run of equal steps; this one has as many epochs as fit into the time of `first`.
    """

    group: str
    label: str
    head: str
    seed: int
    flags: tuple[str, ...] = ()
    like: str = ""

    @property
    def parts(self) -> tuple[str, ...]:
        """Of shares the held-out loss is what is asked; ways to draw need no training."""
        if self.group == "sampling":
            return ("draw",)
        return ("train",) if self.group.startswith("share") else ("train", "draw")

    @property
    def trained(self) -> str:
        """The training that is drawn from."""
        return f"heads-channel-{self.seed}" if self.group == "sampling" else self.name

    @property
    def name(self) -> str:
        words = re.findall(r"[\w.]+", self.label)
        return "-".join([self.group, *words, str(self.seed)])

    @property
    def first(self) -> str:
        """The training that the others of its group are measured by."""
        of_shares = self.group.startswith("share")
        return f"{'share-1-rate-x1' if of_shares else 'heads-channel'}-{self.seed}"

    @property
    def tokenizer(self) -> str:
        return "vq" if self.head == "codebook" else "vae"

    def at_equal_time(self, group: str) -> "Run":
        return self._replace(group=group, like=self.name)


def all_runs(seed: int, scale: "Scale") -> Iterator[Run]:
    """Those of a seed, each after what its number of epochs depends on."""
    equal = [Run("heads", head, head, seed, TRAINED.get(head, ())) for head in HEADS]
    yield from equal
    yield from (run.at_equal_time("time") for run in equal if run.head != "channel")
    channel = partial(Run, head="channel", seed=seed)
    for bits in (3, 4, 5, 6, 7, 8):
        if f"--quant_bits={bits}" not in scale.discrete:
            yield channel("bits", f"{bits} bits", flags=(f"--quant_bits={bits}",))
    natural = f"--channel_order={','.join(map(str, range(scale.channels)))}"
    yield channel("order", "natural order", flags=(natural,))
    for width, depth in ((32, 2), (128, 2), (64, 1), (64, 4)):
        size = f"--channel_embed_dim={width}", f"--channel_depth={depth}"
        yield channel("size", f"{width} x {depth}", flags=size)
    yield channel("masks", "mask_distribution exp", flags=EXPONENTIAL)
    norm, calibrated = ("--latent_norm=channel",), ("--quantizer=calibrated",)
    if scale.discrete != CALIBRATED:  # which have no range, and those emoji one norm
        for limit in (2, 3, 4):
            limits = f"--quant_min={-limit}", f"--quant_max={limit}"
            yield channel("range", f"range {limit}", flags=limits)
        for flags in (norm, calibrated, norm + calibrated):
            yield channel("latents", " ".join(flags).replace("=", " "), flags=flags)
    for flags in SAMPLED:
        yield channel("sampling", " ".join(flags).replace("=", " ") or "as published", flags=flags)
    for share, times in product((1, 2, 4, 8), (1, 2)):
        flags = f"--head_share={1 / share}", f"--lr={scale.lr * times}"
        run = channel("share", f"{Fraction(1, share)}, rate x{times}", flags=flags)
        yield from (run, run.at_equal_time("share-time")) if share > 1 else (run,)


class Comparison:
    """The stages of some runs; their results lie in root/results, their output in root/logs."""

    def __init__(self, root: Path, scale: Scale, runs: Sequence[Run]):
        self.root, self.scale, self.log = root, scale, root / "logs"
        self.results = "results-quick" if scale.quick else "results"
        # Of every stage its name, the seconds that are planned, and what makes its result.
        self.stages = {name: (10, partial(self.call, name)) for name in ("data", "judge")}
        for run in runs:
            cache = partial(self.call, "cache", tokenizer=run.tokenizer)
            self.stages[f"cache-{run.tokenizer}"] = 10, cache
        self.stages["statistics"] = 10, partial(self.call, "statistics")
        self.stages["floor"] = 5, self.floor
        for run in runs:
            seconds = {"train": TRAINING.get("channel" if run.like else run.head, 120)}
            seconds["draw"] = DRAWING.get(run.head, 150)
            for part in run.parts:
                self.stages[f"{run.name}-{part}"] = seconds[part], partial(getattr(self, part), run)
        for name, (seconds, work) in self.stages.items():
            self.stages[name] = 8 if scale.quick else seconds * scale.slower, work

    def result(self, stage: str) -> dict | None:
        path = self.root / self.results / f"{stage}.json"
        return read_json(path) if path.exists() else None

    def run(self) -> None:
        """All stages that are not finished; what is left takes as much longer as what was done."""
        waiting = {k: stage for k, stage in self.stages.items() if self.result(k) is None}
        for folder in (self.results, "logs"):
            (self.root / folder).mkdir(parents=True, exist_ok=True)
        began, done, every = time.monotonic(), 0.0, sum(planned for planned, _ in waiting.values())
        for number, (name, (planned, work)) in enumerate(waiting.items(), 1):
            taken = time.monotonic() - began
            left = (every - done) * (20 + taken) / (20 + done)
            clock = [timedelta(seconds=round(x)) for x in (taken, left)]
            progress = "{} so far, about {} left".format(*clock)
            print(f"{number}/{len(waiting)} {name}   {progress}", flush=True)
            self.log, done = self.root / "logs" / f"{name}.log", done + planned
            found = (work() or {}) | {"commit": git_revision()}
            write_json(self.root / self.results / f"{name}.json", found)

    def call(self, command: str, more: Sequence = (), **values) -> None:
        """One of COMMANDS, its output in the log; the end of everything if it fails."""
        values = self.scale._asdict() | {"root": self.root, "tokenizer": "vae"} | values
        values["vae"] = f"demo/{self.scale.subject}_{values['tokenizer']}.ckpt"
        words = [word.format(**values) for word in COMMANDS[command].split()]
        words = [sys.executable, *words, *map(str, more)]
        env = {"OMP_NUM_THREADS": "2", "TQDM_MININTERVAL": "5"} | os.environ
        with open(self.log, "ab") as log:
            both = dict(stdout=log, stderr=subprocess.STDOUT)
            done = subprocess.run(words, cwd=ROOT, env=env, preexec_fn=die_with_parent, **both)
        if done.returncode:
            lines = self.log.read_text(errors="replace").splitlines()[-20:]
            failed = f"failed with exit code {done.returncode}: {' '.join(words)}"
            print(failed, f"the end of {self.log}:", *lines, sep="\n", file=sys.stderr)
            sys.exit(1)

    def train(self, run: Run) -> dict:
        """Train, and what --metrics_file says of it; shares before all of them have converged."""
        folder = self.root / run.name
        epochs = self.scale.epochs // (2 if run.group.startswith("share") else 1)
        if run.like:
            known = [self.result(f"{name}-train") for name in (run.first, run.like)]
            if None in known:
                raise UserError(f"{run.name} comes after {run.first} and {run.like}")
            epochs = max(1, round(epochs * known[0]["seconds"] / known[1]["seconds"]))
        values = dict(tokenizer=run.tokenizer, head=run.head, seed=run.seed, run=folder)
        bits = () if run.head in HEAD_QUANTIZERS else self.scale.discrete
        values |= dict(epochs=epochs, warmup=round(WARMUP * epochs, 2), often=max(2, epochs // 6))
        self.call("train", [*self.scale.more, *bits, *run.flags], **values)
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        timed = [line for line in lines if "speed/images_per_second" in line]
        each = [self.scale.batch / line["speed/images_per_second"] for line in timed]
        steps = np.diff([line["step"] for line in timed], prepend=0)
        return {
            "epochs": epochs,
            "seconds": float(steps @ each),  # without validation and saving
            "tflop": float(steps * each @ [line["speed/tflops_per_device"] for line in timed]),
            "step_seconds": median(each),
            "memory_gib": max(line["speed/memory_gib"] for line in timed),
            "validation": [[x["step"], x[k]] for x in lines if (k := "validation/loss_ema") in x],
        } | self.levels(run)

    def levels(self, run: Run) -> dict:
        """How training latents use the levels: bits of a channel, and the share out of range."""
        checkpoint = find_checkpoint(str(self.root / run.name), "", must_exist=True)
        if (config := checkpoint.config).quantizer not in QUANTIZERS:
            return {}
        model, cache = build_model(config, checkpoint, "model_ema"), f"cache-{run.tokenizer}"
        data, tokenizer = open_cache(str(self.root / cache)), Tokenizer(None, *config.latent_norm)
        latents, _ = read_latents(data, evenly_spread(len(data), 1000), tokenizer, CPU)
        _, facts = quantized(latents, model.quantizer)
        outside = facts["outside"].sum().item() / latents.numel()
        return {"entropy_bits": entropy(facts["counts"][0]).mean().item(), "out_of_range": outside}

    def draw(self, run: Run) -> dict:
        """Choose temperature and guidance by one seed, then measure the images of another one."""
        scale, folder = self.scale, self.root / f"{run.name}-images"
        model, flags = self.root / run.trained, DRAWN.get(run.head, ())
        shutil.rmtree(folder, ignore_errors=True)  # a part of the images, a part of the time

        def points(name: str, checkpoint: Path, seed: int, **swept: Sequence) -> list[dict]:
            words = (word for flag, values in swept.items() for word in (f"--{flag}", *values))
            where = dict(
                tokenizer=run.tokenizer, checkpoint=checkpoint, seed=seed, folder=folder / name
            )
            self.call("draw", [*flags, *words], **where)
            found = [self.point(path) for path in (folder / name).glob("*/metrics.json")]
            return sorted(found, key=lambda point: point["num_iter"])

        middle, seed, curve = scale.iterations[1:2], run.seed + REPORTED, []
        grid = {"temperature": scale.temperatures, "cfg": scale.guidances}
        if run.group == "sampling":
            if self.result(f"{run.trained}-train") is None:
                raise UserError(f"{run.name} comes after {run.trained}: --only heads")
            grid, flags = {"temperature": [TEMPERATURE], "cfg": GUIDANCES}, run.flags
        tried = points("tried", model, run.seed, num_iter=middle, **grid)
        config = read_json(next((folder / "tried").glob("*/metrics.json")))["model"]
        best = min(tried, key=lambda point: point["frechet"])
        chosen = {name: best[name] for name in grid}
        fixed = {name: [value] for name, value in chosen.items()}
        for epoch in range(1, scale.epochs if run.group == "heads" else 0):
            if (path := model / f"checkpoint-epoch{epoch:04d}.pth").exists():
                (point,) = points(path.stem, path, seed, num_iter=middle, **fixed)
                curve.append(point | {"epoch": epoch})
        found = {**chosen, "tried": tried, "curve": curve, "config": config}
        found["points"] = points("reported", model, seed, num_iter=scale.iterations, **fixed)
        return found | head_figures(config)

    def reported(self, run: Run) -> torch.Tensor:
        """The images of a run that is finished, class by class."""
        iterations = self.scale.iterations[1]
        (folder,) = (self.root / f"{run.name}-images" / "reported").glob(f"ariter{iterations}-*")
        return classifier.generated_images(folder)[0]

    def point(self, path: Path) -> dict:
        """Of a metrics.json beside its images."""
        record = read_json(path)
        images, labels = classifier.generated_images(path.parent)
        found = {name: record["settings"][name] for name in ("num_iter", "temperature", "cfg")}
        found["seconds_100"] = 100 * record["seconds"] / len(images)
        found["evaluations"] = evaluations(record["settings"], record["model"])
        return found | self.figures(images, labels)

    def floor(self) -> dict:
        """What real images get that training does not know."""
        return self.figures(*classifier.labelled_images(self.root / "data" / "val"))

    def figures(self, images: torch.Tensor, labels: torch.Tensor) -> dict:
        """Fréchet distance to the training images with its error, and the judge's accuracy."""
        sums, features = Accumulator(self.judge.layers), self.judge(images)
        sums.update(features)
        found = score(sums, self.measure).figures
        right = (features["logits"].argmax(dim=1) == labels).double().mean().item()
        error = found.get("frechet_distance_standard_error")
        return {"frechet": found["frechet_distance"], "frechet_error": error, "accuracy": right}

    @cached_property
    def judge(self) -> Extractor:
        return Extractor("judge", self.root / "classifier.pth", CPU)

    @cached_property
    def measure(self) -> Measure:
        width = self.judge.width("fid", self.scale.size)
        return Measure(self.judge, load_fid_statistics(self.root / "statistics.npz", width))


def evaluations(settings: dict, model: dict) -> int:
    """Of the backbone, for one image; a guided iteration is two."""
    known = {field.name for field in fields(SamplingOptions)} & set(settings)
    options = SamplingOptions(**{name: settings[name] for name in known})
    steps = iterations(options, TokenBridgeConfig.from_dict(model).seq_len)
    return sum(1 + (scale != 1) for _, _, scale in steps)


def head_figures(settings: dict) -> dict:
    """Parameters, and operations for one position: forward and backward, and one draw."""
    config = TokenBridgeConfig.from_dict(settings)
    parameters = TokenBridge(**settings).head.parameters()
    found = {"parameters": sum(parameter.numel() for parameter in parameters)}
    return found | {"flops_training": flops.head(config), "flops_drawing": flops.head(config, True)}


def die_with_parent() -> None:
    """No training goes on alone in the folder in which the same command wants to go on."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PARENT_DIES, signal.SIGKILL)


def main() -> None:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--data", choices=tuple(DATA), default="digits", help="images")
    add("--quick", action="store_true", help="a few steps of each, about 4 minutes; poor images")
    add("--long", action="store_true", help="seeds 0 1 2, equal time, ablations: many hours")
    add("--only", nargs="+", choices=tuple(GROUPS), help="these tables [heads; --long: all]")
    add("--heads", nargs="+", choices=tuple(HEADS), default=[*HEADS], help="these [all]")
    add("--output_dir", type=Path, help="[output/compare, with -gallery, -quick]")
    add("--render", type=Path, help="a results.json, to put into docs/; runs nothing")
    args = parser.parse()
    if args.render:
        results = read_json(args.render)
        if results.get("data", "digits") != "digits":
            raise UserError(f"--render {args.render}: the pages are about the digits")
        render(results)
        if (sheet := args.render.with_name("heads.png")).exists():
            shutil.copy(sheet, ROOT / "docs" / "images")
        return
    groups, heads = args.only or (tuple(GROUPS) if args.long else ["heads"]), set(args.heads)
    name = "compare" + "-gallery" * (args.data == "gallery") + "-quick" * args.quick
    root, scale = (args.output_dir or Path("output") / name).absolute(), DATA[args.data]
    scale = scale._replace(**QUICK) if args.quick else scale
    vq = ROOT / "demo" / f"{scale.subject}_vq.ckpt"
    if "codebook" in heads and not vq.exists():
        print(f"codebook is left out: {vq} is not there", flush=True)
        heads.remove("codebook")
    runs = [run for seed in range(3) for run in all_runs(seed, scale)]
    chosen = [run for run in runs if run.group in groups and run.head in heads]
    chosen = [run for run in chosen if run.seed == 0 or args.long]
    with only_job_in(root, "--output_dir"):
        comparison = Comparison(root, scale, chosen)
        comparison.run()
        about = environment(CPU, "fp32", 1)
        results = {"about": about, "data": args.data, "quick": args.quick}
        results |= {"floor": comparison.result("floor"), "runs": []}
        for run in runs:  # of all calls so far
            parts = {part: comparison.result(f"{run.name}-{part}") for part in run.parts}
            results["runs"] += [run._asdict() | parts] if None not in parts.values() else []
        write_json(root / "results.json", results)
        drawn = {run.label: comparison.reported(run) for run in chosen if run.group == "heads"}
        if drawn:
            draw_sheet(drawn, root / "heads.png")
    print(f"\n{tables(results)}\nwritten: {root / 'results.json'}")


if __name__ == "__main__":
    dist.run(main)
