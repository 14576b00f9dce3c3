"""One to four processes train the same model.

Run as a script, this file is one of several processes: see `main`.
"""

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine_tokenbridge import train_step
from tests.conftest import new_run, tiny_model
from tests.runs import load, on_processes, tensors, train, train_on
from tests.test_engine import gradients_of
from util import dist
from util.data.batches import Batches, MicroBatchSampler

MICRO_BATCHES = 4
WORLDS = (2, 3, 4)  # three processes share four micro-batches as 2, 1 and 1
BATCH, IMAGES = 2, 8


def one_step() -> dict:
    """The first training step of this process with dropout: losses and gradients."""
    model = tiny_model(attn_dropout=0.1, proj_dropout=0.1, label_drop_prob=0.5).train()
    losses = []
    model.register_forward_hook(lambda _module, _inputs, loss: losses.append(loss.item()))
    parts: dict[str, list[Tensor]] = {}  # the gradient of each micro-batch, before they are summed
    for name, parameter in model.named_parameters():
        parts[name] = []
        parameter.register_hook(parts[name].append)
    run = new_run(model, 0.9)
    run.batches = Batches(BATCH, MICRO_BATCHES, IMAGES, seed=1)
    run.steps, run.grad_clip = range(1), 1e9
    run.sampler = MicroBatchSampler(run.batches, run.steps, dist.rank(), dist.world_size())
    moments = torch.randn(IMAGES, 12, 4, 4, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(IMAGES) % 3
    numbers = (torch.tensor([index for index, _ in keys]) for keys in run.sampler)
    run.tokenizer.latent_scale = 1.0
    gradients = gradients_of(run)
    run.wrapped = dist.wrap(model, run.device)
    run.micro_batches = ((moments[i], labels[i]) for i in numbers)
    found = train_step(run, 0)
    return {
        "losses": losses,
        "loss": found.loss,
        "norm": found.grad_norm,
        "gradients": gradients,
        "parts": parts,
    }


def main(folder: Path) -> None:
    dist.init("cpu")
    torch.save(one_step(), folder / f"{dist.rank()}.pt")
    dist.cleanup()


@pytest.mark.parametrize("size", WORLDS)
def test_loss_and_gradient_of_each_micro_batch_are_the_same_to_the_bit(tmp_path, size):
    on_processes(size, "-m", "tests.test_elastic", tmp_path)
    steps = [torch.load(path, weights_only=True) for path in sorted(tmp_path.glob("*.pt"))]
    alone = one_step()
    assert len(steps) == size and len(set(alone["losses"])) == MICRO_BATCHES
    assert sum(map(bool, alone["parts"].values())) > 50  # some parameters have no part in a step
    for rank, found in enumerate(steps):
        assert found["losses"] == alone["losses"][rank::size]
        for name, gradients in alone["parts"].items():
            parts, expected = found["parts"][name], gradients[rank::size]
            assert len(parts) == len(expected) and all(map(torch.equal, parts, expected)), name
        whole = [*alone["gradients"], alone["norm"]]  # in which the order of a sum counts
        tolerance = dict(rtol=1e-5, atol=1e-7)
        torch.testing.assert_close([*found["gradients"], found["norm"]], whole, **tolerance)
    mean = sum(found["loss"] for found in steps)
    torch.testing.assert_close(mean, alone["loss"], rtol=1e-6, atol=0)


def test_run_begun_on_two_processes_goes_on_with_three(inputs, tmp_path):
    """Dropout on; what remains of the difference is the order of sums, which AdamW enlarges."""
    settings = dict(batch_size=2, accum_iter=None, global_batch=8, save_last_freq=1)
    settings |= dict(lr_schedule="constant")  # so that one epoch is the beginning of two
    train_on(2, inputs, tmp_path / "elastic", **settings, epochs=1)
    train_on(3, inputs, tmp_path / "elastic", **settings, resume="auto")
    found, expected = load(tmp_path / "elastic"), train(inputs, tmp_path / "alone", **settings)
    assert (found["step"], found["schedule"]) == (expected["step"], expected["schedule"])
    found, expected = tensors(found["model"]), tensors(expected["model"])
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-4)


def test_processes_agree_where_a_save_by_steps_meets_the_end_of_an_epoch(inputs, tmp_path):
    """The main process alone knows of that save; what all do there must not depend on it."""
    settings = dict(save_steps=3, save_last_freq=5, dist_timeout=20)  # 3 an epoch
    result = train_on(2, inputs, tmp_path / "out", **settings)
    assert "saved checkpoint-step00000003.pth" in result.stdout


if __name__ == "__main__":
    main(Path(sys.argv[1]))
