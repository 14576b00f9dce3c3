"""A training step whose numbers went wrong, kept to look into: written by training, replayed by
--debug_dump FILE.

The file holds the weights, and of each micro-batch what it held, its loss by channel, the gradient
norms by module and the first module whose output was not finite. Replaying needs nothing else.
"""

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from models.config import TokenBridgeConfig
from models.tokenbridge import TokenBridge
from models.tokenizers.kl16 import Posterior
from models.tokenizers.tokenizer import Tokenizer
from util import dist
from util.data.images import Key
from util.device import Precision, resolve_precision
from util.errors import as_user_error
from util.files import atomic_write, load_tensors
from util.optim import seed_micro_batch

# (step, micro-batch) -> what it holds: keys, batch, labels
Reload = Callable[[int, int], tuple[list[Key], Tensor, Tensor]]


def examine(
    model: TokenBridge,
    tokenizer: Tokenizer,
    moments: Tensor,
    labels: Tensor,
    seeds: tuple[int, int, int],
    precision: Precision,
) -> dict:
    """Run one micro-batch as training does, and say where its numbers leave the finite.

    moments: [B, 2C, h, w]. labels: [B]. seeds: (seed, step, micro-batch).
    """
    device = labels.device
    model.zero_grad(set_to_none=True)
    seed_micro_batch(*seeds)
    latents = tokenizer.from_moments(moments)
    with first_non_finite(model) as found, precision.autocast(device):
        losses = model.channel_losses(latents, labels)
    losses.mean().backward()
    return {
        "latents_finite": bool(latents.isfinite().all()),
        "loss_by_channel": losses.detach().float().cpu(),
        "gradient_norms": gradient_norms(model),
        "first_non_finite": found[0] if found else "",
    }


class first_non_finite:
    """Context: a list whose first entry is the first module with an output that is not finite."""

    def __init__(self, model: nn.Module):
        self.leaves = [(name, m) for name, m in model.named_modules() if not list(m.children())]
        self.found: list[str] = []

    def __enter__(self) -> list[str]:
        self.hooks = [
            module.register_forward_hook(lambda _m, _i, out, name=name: self._look(name, out))
            for name, module in self.leaves
        ]
        return self.found

    def _look(self, name: str, output) -> None:
        if not self.found and isinstance(output, Tensor) and not output.isfinite().all():
            self.found.append(name)

    def __exit__(self, *_) -> None:
        for hook in self.hooks:
            hook.remove()


def gradient_norms(model: nn.Module) -> dict[str, float]:
    """The norm of the gradient of each module: a block as a whole, and what is in no block."""
    squares: dict[str, Tensor] = defaultdict(float)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            squares[module_of(name)] += parameter.grad.double().square().sum()
    return {name: float(square) ** 0.5 for name, square in squares.items()}


def module_of(name: str) -> str:
    """backbone.encoder_blocks.3.attn.qkv.weight -> backbone.encoder_blocks.3"""
    parts = name.split(".")
    return ".".join(parts[:3] if len(parts) > 2 and parts[2].isdigit() else parts[:2])


def write_dump(
    path: Path,
    model: TokenBridge,
    tokenizer: Tokenizer,
    precision: Precision,
    reload: Reload,
    seed: int,
    step: int,
    mine: range,
    cached: bool,
) -> Path:
    """Examine this process's micro-batches of a step again; the main process writes the file."""
    device = next(model.parameters()).device
    records = []
    for j in mine:
        keys, batch, labels = reload(step, j)
        batch, labels = batch.to(device), labels.to(device)
        moments = batch if cached else tokenizer.posterior(batch).parameters
        record = examine(model, tokenizer, moments, labels, (seed, step, j), precision)
        held = {"keys": [list(key) for key in keys], "moments": moments.cpu()}
        records.append({"micro_batch": j, "labels": labels.cpu()} | held | record)
    gathered = dist.gather_to_main(records)
    if gathered is not None:
        dump = {
            "config": model.config.to_dict(),
            "model": model.published_state_dict(),
            "seed": seed,
            "step": step,
            "precision": precision.name,
            "micro_batches": [record for part in gathered for record in part],
        }
        with as_user_error(f"cannot write {path}", (OSError,)):
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(path) as file:
                torch.save(dump, file)
    dist.barrier()
    return path


def replay(path: str, device: torch.device) -> bool:
    """Print what a dump holds and what happens here; true if all losses are as recorded."""
    dump = load_tensors(path, "--debug_dump")
    damaged = (ValueError, LookupError, TypeError, AttributeError, RuntimeError)
    with as_user_error(f"--debug_dump {path}", damaged):
        config = TokenBridgeConfig.from_dict(dump["config"])
        model = TokenBridge(**config.to_dict()).to(device).train()
        model.load_published(dump["model"], config.head_input)
        precision = resolve_precision(dump["precision"], device)
        tokenizer = Tokenizer(None, config.latent_scale)
        print(f"{path}: step {dump['step']}, seed {dump['seed']}, {precision.name}, {device.type}")
        same = []
        for record in dump["micro_batches"]:
            moments = Posterior(record["moments"]).parameters.to(device)
            seeds = (dump["seed"], dump["step"], record["micro_batch"])
            labels = record["labels"].to(device)
            found = examine(model, tokenizer, moments, labels, seeds, precision)
            same.append(describe(record, found))
    print("reproduced" if all(same) else "not reproduced: another device rounds differently")
    return all(same)


def describe(record: dict, found: dict) -> bool:
    """Print one micro-batch as recorded and as found here; whether the losses agree."""
    samples = " ".join(f"{i}{'f' if flip else ''}" for i, flip in record["keys"])
    print(f"\nmicro-batch {record['micro_batch']}: samples {samples} (f: flipped)")
    if not found["latents_finite"]:
        print("  its latents are not finite: look at these samples")
    if found["first_non_finite"]:
        print(f"  first output that is not finite: {found['first_non_finite']}")
    then, now = record["loss_by_channel"], found["loss_by_channel"]
    print("  loss by channel  " + " ".join(f"{value:.4g}" for value in now.tolist()))
    for name, norm in found["gradient_norms"].items():
        print(f"  gradient norm    {norm:<12.4g} {name}")
    return torch.allclose(then, now, rtol=1e-4, equal_nan=True)
