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
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import fields
from datetime import timedelta
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch

from demo import classifier
from demo.compare_page import GROUPS, draw_sheet, render, tables
from demo.compare_runs import DATA, QUICK, Run, Scale, all_runs
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
from util.device import environment, git_revision
from util.errors import UserError
from util.evaluation.folder import read_json, write_json
from util.evaluation.metrics import Measure
from util.evaluation.reconstruction import quantized
from util.files import only_job_in
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
# Nothing is clipped: after so little training, the published 100 steps of sampling diverge.
DRAWN = {"diffusion": ("--num_sampling_steps=500",)}
WARMUP = 2 / 24  # of the epochs, as in configs/digits.yaml
GUIDANCES, TEMPERATURE = (1.5, 2.0, 3.0, 4.0), 0.96
REPORTED = 1000  # added to the seed of the images by which the temperature is chosen
CPU = torch.device("cpu")
PARENT_DIES = 1  # PR_SET_PDEATHSIG of Linux


class Comparison:
    """The stages of some runs; their results lie in root/results, their output in root/logs."""

    def __init__(self, root: Path, scale: Scale, runs: Sequence[Run]):
        self.root, self.scale, self.log = root, scale, root / "logs"
        self.results = "results-quick" if scale.quick else "results"
        # Of every stage its name and what makes its result.
        self.stages = {name: partial(self.call, name) for name in ("data", "judge")}
        for run in runs:
            cache = partial(self.call, "cache", tokenizer=run.tokenizer)
            self.stages[f"cache-{run.tokenizer}"] = cache
        self.stages |= {"statistics": partial(self.call, "statistics"), "floor": self.floor}
        for run in runs:
            for part in run.parts:
                self.stages[f"{run.name}-{part}"] = partial(getattr(self, part), run)

    def result(self, stage: str) -> dict | None:
        path = self.root / self.results / f"{stage}.json"
        return read_json(path) if path.exists() else None

    def planned(self, stage: str) -> int:
        """Seconds, on two cores with the digits."""
        if self.scale.quick or not stage.endswith(("train", "draw")):
            return 10
        return 900 if "diffusion" in stage and stage.endswith("draw") else 150

    def run(self) -> None:
        """All stages that are not finished; what is left takes as much longer as what was done."""
        waiting = {k: self.planned(k) for k in self.stages if self.result(k) is None}
        for folder in (self.results, "logs"):
            (self.root / folder).mkdir(parents=True, exist_ok=True)
        began, done = time.monotonic(), 0
        for number, (name, planned) in enumerate(waiting.items(), 1):
            taken = time.monotonic() - began
            left = (sum(waiting.values()) - done) * (20 + taken) / (20 + done)
            clock = [timedelta(seconds=round(x)) for x in (taken, left)]
            progress = "{} so far, about {} left".format(*clock)
            print(f"{number}/{len(waiting)} {name}   {progress}", flush=True)
            self.log, done = self.root / "logs" / f"{name}.log", done + planned
            found = (self.stages[name]() or {}) | {"commit": git_revision()}
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
        step = float(np.quantile(each, 0.1))  # what else runs only slows them
        return {
            "epochs": epochs,
            "seconds": float(steps.sum() * step),  # without validation and saving
            "tflop": float(steps * each @ [line["speed/tflops_per_device"] for line in timed]),
            "step_seconds": step,
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
        trained = run.first if run.group == "sampling" else run.name
        model, flags = self.root / trained, DRAWN.get(run.head, ())
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
            if self.result(f"{trained}-train") is None:
                raise UserError(f"{run.name} comes after {trained}: --only heads")
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
        return found | classifier.figures(self.measure, images, labels)[0]

    def floor(self) -> dict:
        """What real images get that training does not know."""
        images, labels = classifier.labelled_images(self.root / "data" / "val")
        return classifier.figures(self.measure, images, labels)[0]

    @cached_property
    def measure(self) -> Measure:
        return classifier.load_measure(self.root, self.scale.size)


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
