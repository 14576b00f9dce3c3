"""One optimizer step, piece by piece; and what is said where its numbers are not finite."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import main_tokenbridge
from engine_tokenbridge import Run, SkipVote, train_step
from models.heads.channel import ChannelHead
from tests.conftest import new_run, tiny_model
from tests.runs import CLASSES, IMAGES, TRAIN_FLAGS, flags, refused, train_on
from util.data.batches import MicroBatchSampler
from util.logging import StepResult
from util.optim import seed_micro_batch


def training(precision: str = "fp32") -> Run:
    return new_run(tiny_model().train(), 0.5, precision)


def random_micro_batches(count: int) -> list[list[torch.Tensor]]:
    return [[torch.randn(2, 12, 4, 4), torch.tensor([0, 2])] for _ in range(count)]


def step(run: Run, micro_batches: list, grad_clip: float = 3.0) -> StepResult:
    run.batches = replace(run.batches, micro_batches=len(micro_batches))
    run.sampler = MicroBatchSampler(run.batches, range(1), rank=0, world_size=1)
    run.micro_batches, run.grad_clip = iter(micro_batches), grad_clip
    return train_step(run, 4)


def gradients_of(run: Run) -> list[torch.Tensor]:
    """What the optimizer will be given in the place of its step."""
    given = []
    run.optimizer.step = lambda: given.extend(p.grad.clone() for p in run.model.parameters())
    return given


def test_accumulated_gradient_is_the_mean_of_the_micro_batches_and_is_clipped():
    micro_batches = random_micro_batches(3)
    run, reference, losses = training(), training(), []
    for j, (moments, labels) in enumerate(micro_batches):
        seed_micro_batch(1, 4, j)
        loss = reference.model(reference.tokenizer.from_moments(moments), labels)
        (loss / 3).backward()
        losses.append(loss.detach())
    expected = [p.grad for p in reference.model.parameters()]
    norm = torch.stack([g.norm() for g in expected]).norm()
    gradients = gradients_of(run)
    result = step(run, micro_batches, grad_clip=1e9)
    found = [*gradients, result.loss, result.grad_norm]
    torch.testing.assert_close(found, [*expected, torch.stack(losses).mean(), norm])
    assert result.waited >= 0 and not result.skipped
    clipped = gradients_of(run := training())
    assert step(run, random_micro_batches(1), grad_clip=0.01).grad_norm > 0.02  # before it is
    assert torch.stack([g.norm() for g in clipped]).norm() == pytest.approx(0.01, rel=1e-3)


def test_step_moves_weights_and_average_and_forgets_gradients():
    run = training()
    before = [p.detach().clone() for p in run.ema.parameters]
    step(run, random_micro_batches(1))
    for old, parameter, average in zip(before, run.ema.parameters, run.ema.averages, strict=True):
        assert not torch.equal(old, parameter) and parameter.grad is None
        torch.testing.assert_close(average, (old + parameter) / 2)


def test_overflow_in_fp16_skips_the_step_which_is_counted_and_lowers_the_scale():
    run = training("fp16")
    run.scaler.load_state_dict(run.scaler.state_dict() | {"scale": 2.0**120})
    before = [p.detach().clone() for p in run.model.parameters()]
    result = step(run, random_micro_batches(1))
    assert result.skipped and result.loss.isfinite() and not result.grad_norm.isfinite()
    assert all(map(torch.equal, before, run.model.parameters()))
    assert run.scaler.get_scale() == 2.0**119
    vote, counts = SkipVote(run.device, skipped=5), []  # they are counted in all and in a row
    for skipped in (True, True, False, True):
        vote(torch.tensor(True))
        counts.append((vote.conclude(torch.tensor(skipped)), vote.skipped()))
    assert counts == [((False, 1), 6), ((False, 2), 7), ((False, 0), 7), ((False, 1), 8)]


@pytest.mark.parametrize("name", ["fp32", "fp16"])
@pytest.mark.parametrize("spoiled", ["sample", "weight"])
def test_step_with_numbers_that_are_not_finite_changes_nothing(name, spoiled):
    run = training(name)
    step(run, random_micro_batches(1))  # so that the optimizer has moments to lose
    micro_batches = random_micro_batches(2)
    if spoiled == "sample":  # the quantizer clamps infinities, so the loss alone would not tell
        micro_batches[1][0][0, 0, 0, 0] = torch.inf
    else:
        run.model.head.condition_proj.weight.data.fill_(3e38)  # finite, its products are not
    moments = [t for s in run.optimizer.state_dict()["state"].values() for t in s.values()]
    tensors = [*run.ema.parameters, *run.ema.averages, *moments]
    before = [tensor.detach().clone() for tensor in tensors]
    result = step(run, micro_batches)
    assert result.skipped and run.skip_vote.conclude(result.skipped) == (False, 1)
    assert run.skip_vote.skipped() == 1
    assert all(torch.equal(t.detach(), old) for t, old in zip(tensors, before, strict=True))


# --- where it began


BROKEN = dict(blr=1e30, grad_clip=1e30, max_skipped=2)


def last_word(capsys, inputs: Path, output: Path, **changes) -> str:
    """The line with which a training gives up."""
    argv = flags(inputs, TRAIN_FLAGS, BROKEN, output_dir=output, **changes)
    return refused(capsys, main_tokenbridge.main, *argv)


def test_many_skipped_steps_name_the_first_module(inputs, tmp_path, capsys, monkeypatch):
    line = last_word(capsys, inputs, tmp_path / "out")
    assert "2 steps in a row was not finite, up to step 4" in line and "--blr" in line
    assert not list((tmp_path / "out").glob("checkpoint-*"))
    assert "in micro-batch 0 (samples " in line and "first in backbone." in line
    # No module gives the logits: the last weights of the head are applied in one product.
    logits = ChannelHead.logits
    monkeypatch.setattr(ChannelHead, "logits", lambda *args: logits(*args) * torch.nan)
    assert "first in the logits" in last_word(capsys, inputs, tmp_path / "logits")


def test_samples_that_are_not_finite_are_named(inputs, tmp_path, capsys):
    """In a published cache, without checksums; the loss does not tell, as levels are finite."""
    cache, values = tmp_path / "cache", np.full((8, 4, 4), np.inf, np.float32)
    for name in CLASSES:
        (cache / name).mkdir(parents=True)
        for i in range(IMAGES):
            np.savez(cache / name / f"{i}.png.npz", moments=values, moments_flip=values)
    settings = dict(latent_scale=1, channel_order="0,1,2,3", vae_embed_dim=4, vae_stride=4)
    settings |= dict(blr=1e-4, cached_path=cache, max_skipped=3)
    line = last_word(capsys, inputs, tmp_path / "out", **settings)
    assert "up to step 3" in line and line.count("first in its latents") == 2


def test_two_processes_give_up_together(inputs, tmp_path):
    result = train_on(2, inputs, tmp_path / "out", **BROKEN, code=2)
    assert "in micro-batch 1 " in result.stderr
