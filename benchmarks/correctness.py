"""What must hold on a device before its speed means anything: figures, each with its bound.

The golden files are those of tests/golden, whose README says how they came about; of them the
largest relative error |found - expected| / |expected| counts. Trainings run as processes of their
own; `python -m benchmarks.correctness FLAGS` is such a one.
"""

import importlib.util
import json
import math
import os
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from benchmarks import works
from models.backbone import patchify
from models.masking import split_mask
from models.sampler import SamplingOptions, sample_latents, sampling_steps
from models.tokenbridge import TokenBridge
from models.tokenizers.kl16 import AutoencoderKL
from util import ROOT
from util.device import accelerate, resolve_precision
from util.files import load_tensors
from util.optim import EMA, LRSchedule, build_optimizer, guarded_step, set_lr

GOLDEN = ROOT / "tests" / "golden"
CPU = torch.device("cpu")
STEPS, LONGEST = 24, 300.0  # of the small trainings; seconds that one may take


def formula_weight(name: str, shape: tuple[int, ...]) -> Tensor:
    """A parameter's golden value, by its published name (tests/golden/README.md)."""
    r = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
    if name.endswith(".bias"):
        r = 0.05 * r
    elif name.endswith(".weight") and len(shape) == 1:
        r = 1 + 0.1 * r
    elif name.endswith(".weight"):
        r = r / np.sqrt(np.prod(shape[1:]))
    else:
        r = 0.5 * r
    return torch.from_numpy(r.astype(np.float32))


def golden(name: str, device: torch.device = CPU) -> dict[str, Tensor]:
    """The arrays of tests/golden/NAME.npz."""
    with np.load(GOLDEN / f"{name}.npz") as file:
        return {key: torch.from_numpy(file[key]).to(device) for key in file.files}


def golden_json(name: str) -> dict:
    return json.loads((GOLDEN / f"{name}.json").read_text())


def golden_model(device: torch.device = CPU, **changes) -> TokenBridge:
    """The model of the golden files, its weights by formula, in evaluation mode."""
    model = TokenBridge(**golden_json("config")["config"] | changes)
    named = model.published_parameters()
    model.load_published({name: formula_weight(name, tuple(p.shape)) for name, p in named})
    return model.eval().to(device)


def golden_vae(device: torch.device = CPU) -> AutoencoderKL:
    with torch.device("meta"):
        network = AutoencoderKL()
    shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    network.to_empty(device="cpu")
    network.load_published({name: formula_weight(name, shapes[name]) for name in shapes})
    return network.eval().to(device)


def relative_error(found: Tensor, expected) -> float:
    expected = torch.as_tensor(expected, device=found.device)
    return ((found - expected).norm() / expected.norm()).item()


def largest_error(found: dict[str, Tensor], data: dict[str, Tensor]) -> float:
    """Not a number if one is, which Python's `max` would pass over."""
    return float(np.max([relative_error(x, data[name].float()) for name, x in found.items()]))


@torch.no_grad()
def stages(device: torch.device) -> float:
    """Of all that a model computes on the way to its loss; infinite if an index is another."""
    model, data = golden_model(device), golden("tokenbridge", device)
    inputs = data["latents"], data["labels"], data["mask"]
    tokens, (visible, _) = patchify(inputs[0], model.config.patch_size), split_mask(inputs[2])
    indices = model.quantizer.encode(tokens)
    if not torch.equal(indices, data["indices"].long()):
        return math.inf
    found = {"tokens_patchified": tokens, "values": model.quantizer.decode(indices)}
    classes = model.backbone.class_embedding(inputs[1], len(tokens))
    encoded = model.backbone.encode(found["values"], classes, visible)
    everywhere = torch.arange(tokens.shape[1], device=device).expand(len(tokens), -1)
    found["encoder_out"] = encoded
    found["decoder_out"] = model.backbone.decode(encoded, visible, everywhere)
    found |= {"logits": model.logits(*inputs)[:, model.head.order], "loss": model(*inputs)}
    return largest_error(found, data)


def training(device: torch.device) -> float:
    """Of losses, gradient norms, learning rates, weights and averages of twelve steps."""
    settings, data = golden_json("config")["trajectory"], golden("trajectory", device)
    model = golden_model(device).train()
    parameters = dict(model.published_parameters())
    optimizer = build_optimizer(parameters.items(), settings["lr"], settings["weight_decay"])
    ema = EMA(parameters.items(), settings["ema_rate"])
    names = ("lr", "min_lr", "warmup_epochs", "epochs", "steps_per_epoch")
    schedule, steps = LRSchedule(*(settings[name] for name in names)), []
    for step in range(settings["steps"]):
        set_lr(optimizer, schedule(step))
        count = int(torch.ceil(64 * data["mask_rates"][step]))
        mask = torch.zeros(3, 64, device=device).scatter(1, data["orders"][step][:, :count], 1.0)
        loss = model(data["latents"][step], data["labels"][step], mask)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), settings["grad_clip"])
        steps.append(torch.stack([loss.detach(), norm, torch.full_like(norm, schedule(step))]))
        guarded_step(optimizer, torch.zeros((), device=device))
        optimizer.zero_grad()
        ema.update()
    found = dict(zip(("losses", "grad_norms", "lrs"), torch.stack(steps, dim=1), strict=True))
    found |= {f"param:{name}": parameter.detach() for name, parameter in parameters.items()}
    found |= {f"ema:{name}": average for name, average in ema.state_dict().items()}
    return largest_error({name: found[name] for name in found if name in data}, data)


@torch.no_grad()
def vae(device: torch.device) -> float:
    """Of encoding and decoding."""
    network, data = golden_vae(device), golden("vae", device)
    posterior = network.encode(data["image"])
    found = {"moments": posterior.parameters, "mean": posterior.mean, "std": posterior.std}
    found |= {"kl": posterior.kl(), "decoded": network.decode(data["latent"])}
    return largest_error(found, data)


@torch.no_grad()
def loss_in_bf16(device: torch.device) -> float:
    """Relative to fp32."""
    model, data = golden_model(device), golden("tokenbridge", device)
    with resolve_precision("bf16", device).autocast(device):
        loss = model(data["latents"], data["labels"], data["mask"])
    return abs(loss.item() / data["loss"].item() - 1)


def waits(device: torch.device) -> float:
    """Whether the host waits for the device in the iterations of sampling, or in a step: 1 or 0.

    torch raises an error at the first time.
    """
    model, labels = golden_model(device), golden("tokenbridge", device)["labels"]
    steps = sampling_steps(model, labels, SamplingOptions(num_iter=8, cfg=2.0))
    step = works.training(works.Settings(model.config, len(labels), 8, device))
    next(steps)  # reads the labels
    step.run("bf16")  # allocates what libraries need
    torch.cuda.set_sync_debug_mode("error")
    try:
        step.run("bf16")
        model.config.mask_ratios.draw()  # the step above has a fixed one
        for _ in steps:
            pass
    except RuntimeError as reason:
        print(reason)
        return 1.0
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return 0.0


def differently(device: torch.device, compiled: bool = False, graphs: bool = False) -> float:
    """The share of latent values that are drawn otherwise than in the plain way."""
    plain, model = golden_model(device), golden_model(device)
    labels = golden("tokenbridge", device)["labels"]
    accelerate(model, device, compiled, graphs)
    options = dict(num_iter=8, cfg=2.0)
    expected, *found = (sample_latents(each, labels, **options) for each in (plain, model, model))
    return max((~torch.isclose(each, expected)).float().mean().item() for each in found)


# --- trainings in processes of their own


def train(folder: Path, device: str, *more: str, processes: int = 1) -> subprocess.Popen:
    """Of a tiny model on noise; the same on any number of processes."""
    data = folder.parent / "data"
    for number in range(0 if data.exists() else 16):
        pixels = np.random.default_rng(number).integers(0, 256, (32, 32, 3), np.uint8)
        (data / "train" / "noise").mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(data / "train" / "noise" / f"{number}.png")
    flags = f"""--device {device} --precision fp32 --model tokenbridge_tiny --img_size 32
        --class_num 1 --data_path {data} --vae_path demo/digits_vae.ckpt --latent_scale 1.0
        --channel_order 0,1,2,3,4,5,6,7 --num_workers 0 --global_batch 4 --batch_size 2
        --epochs {STEPS // 4} --warmup_epochs 0 --lr 1e-3 --ema_rate 0.9 --save_steps 1
        --keep_checkpoints {STEPS} --preview_freq 0 --val_freq 0 --output_dir {folder}"""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
    launcher += [f"--nproc_per_node={processes}"]
    launcher = launcher if processes > 1 else []
    command = [sys.executable, *launcher, "-m", "benchmarks.correctness", *flags.split(), *more]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)


def finish(training: subprocess.Popen) -> None:
    try:
        code = training.wait(LONGEST)
    finally:  # torchrun ends its processes where it is asked to
        training.terminate()
    if code:
        raise RuntimeError(f"a training ended with {code}: see above")


def apart(first: Path, second: Path) -> float:
    """The relative error of all weights of two trainings together: some have no gradient but
    rounding, and none of their own to compare."""
    saved = [load_tensors(path / "checkpoint-last.pth", "--output_dir") for path in (first, second)]
    floats = [name for name, tensor in saved[0]["model"].items() if tensor.is_floating_point()]
    expected, found = (torch.cat([s["model"][n].flatten() for n in floats]) for s in saved)
    return relative_error(found, expected)


def trainings(device: torch.device) -> float:
    """One that is killed and resumed, and one on two processes of the same device (by gloo, for
    NCCL refuses that), against one that nothing happened to: the larger error.
    """
    name = f"cuda:{device.index or 0}" if device.type == "cuda" else device.type
    with tempfile.TemporaryDirectory() as folder:
        whole, killed, two = (Path(folder) / part for part in ("whole", "killed", "two"))
        finish(train(whole, name))
        training = train(killed, name)
        while not list(killed.glob("checkpoint-step*.pth")):
            if training.poll() is not None:
                raise RuntimeError("the training was over before it could be killed")
            time.sleep(0.01)
        training.kill()
        training.wait()
        if (killed / f"checkpoint-step{STEPS:08d}.pth").exists():
            raise RuntimeError("the training was done before it was killed")
        finish(train(killed, name, "--resume", "auto"))
        finish(train(two, name, processes=2))
        return max(apart(whole, killed), apart(whole, two))


# The figure of each, the most that it may be, and whether it is of CUDA alone.
CHECKS: dict[str, tuple[Callable[[torch.device], float], float, bool]] = {
    "quantizer, encoder and logits, error against golden": (stages, 1e-4, False),
    "twelve training steps, error against golden": (training, 1e-3, False),
    "KL-16, error against golden": (vae, 1e-3, False),
    "loss in bf16, error against fp32": (loss_in_bf16, 0.02, False),
    "whether the host waits for the device in a step or in sampling": (waits, 0, True),
    "kill -9 and resume, two processes: error of the weights": (trainings, 1e-3, False),
    "share drawn otherwise, CUDA graphs": (partial(differently, graphs=True), 0, True),
    "share drawn otherwise, compiled": (partial(differently, compiled=True), 0.01, False),
}


if __name__ == "__main__":
    if importlib.util.find_spec("tensorboard") is None:  # on a machine that only computes
        sys.modules["torch.utils.tensorboard"] = MagicMock()
    torch.backends.cudnn.enabled = False  # whose choice of an algorithm differs by process
    import main_tokenbridge

    main_tokenbridge.cli()
