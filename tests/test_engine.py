"""One optimizer step, piece by piece."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from engine_tokenbridge import Run, TrainSettings, train_step
from models.tokenizer import Tokenizer
from tests.conftest import tiny_model
from util.device import Precision, resolve_precision
from util.ema import EMA
from util.optim import build_optimizer, seed_micro_batch

CPU = torch.device("cpu")
FP32 = resolve_precision("fp32", CPU)


def new_run(precision: Precision = FP32, **changes) -> Run:
    model = tiny_model(**changes).train()
    return Run(
        model=model,
        ema=EMA(model.published_parameters(), 0.5),
        optimizer=build_optimizer(model.published_parameters(), 1e-2, 0.02),
        scaler=torch.amp.GradScaler("cpu", enabled=precision.needs_scaler),
        tokenizer=Tokenizer(None, latent_scale=2.0),
        device=CPU,
        precision=precision,
    )


def settings(**changes) -> TrainSettings:
    values = dict(first_step=0, epochs=1, steps_per_epoch=1, accum_iter=1, grad_clip=3.0, seed=1)
    values |= dict(cached=True, save_last_freq=1, eval_freq=1, output_dir=Path(), extras={})
    return TrainSettings(**values | changes)


def micro_batches(count: int) -> list[list[torch.Tensor]]:
    return [[torch.randn(2, 12, 4, 4), torch.tensor([0, 2])] for _ in range(count)]


def step(run: Run, batches: Iterator, **changes) -> tuple[torch.Tensor, torch.Tensor, float]:
    return train_step(run, run.model, batches, 4, settings(**changes))


def test_accumulated_gradient_is_the_mean_of_the_micro_batches(monkeypatch):
    batches = micro_batches(3)
    run, reference = new_run(), new_run()
    losses = []
    for j, (moments, labels) in enumerate(batches):
        seed_micro_batch(1, 4, j)
        loss = reference.model(reference.tokenizer.from_moments(moments), labels)
        (loss / 3).backward()
        losses.append(loss.detach())
    expected = [p.grad for p in reference.model.parameters()]
    norm = torch.stack([g.norm() for g in expected]).norm()

    seen = []
    monkeypatch.setattr(
        run.optimizer, "step", lambda: seen.extend(p.grad for p in run.model.parameters())
    )
    loss, found_norm, waited = step(run, iter(batches), accum_iter=3, grad_clip=1e9)
    torch.testing.assert_close(loss, torch.stack(losses).mean())
    torch.testing.assert_close(found_norm, norm)
    for gradient, other in zip(seen, expected, strict=True):
        torch.testing.assert_close(gradient, other)
    assert waited >= 0


def test_gradients_are_clipped_after_their_norm_is_taken(monkeypatch):
    run = new_run()
    seen = []
    monkeypatch.setattr(
        run.optimizer, "step", lambda: seen.extend(p.grad.clone() for p in run.model.parameters())
    )
    _, norm, _ = step(run, iter(micro_batches(1)), grad_clip=0.01)
    assert norm > 0.02
    assert torch.stack([g.norm() for g in seen]).norm() == pytest.approx(0.01, rel=1e-3)


def test_step_moves_weights_and_average_and_forgets_gradients():
    run = new_run()
    before = [p.detach().clone() for p in run.ema.parameters]
    step(run, iter(micro_batches(1)))
    for old, parameter, average in zip(before, run.ema.parameters, run.ema.averages, strict=True):
        assert not torch.equal(old, parameter) and parameter.grad is None
        torch.testing.assert_close(average, (old + parameter) / 2)


def test_overflow_in_fp16_skips_the_step_and_lowers_the_scale():
    run = new_run(resolve_precision("fp16", CPU))
    run.scaler.load_state_dict(run.scaler.state_dict() | {"scale": 2.0**120})
    before = [p.detach().clone() for p in run.model.parameters()]
    loss, norm, _ = step(run, iter(micro_batches(1)))
    assert loss.isfinite() and norm == 0
    assert all(map(torch.equal, before, run.model.parameters()))
    assert run.scaler.get_scale() == 2.0**119


@pytest.mark.parametrize("name", ["bf16", "fp16", "fp32"])
def test_loss_in_lower_precision_is_close(name):
    batches = micro_batches(1)
    exact, exact_norm, _ = step(new_run(), iter(batches))
    loss, norm, _ = step(new_run(resolve_precision(name, CPU)), iter(batches))
    assert loss == pytest.approx(exact.item(), rel=0.02)
    assert norm == pytest.approx(exact_norm.item(), rel=0.05)  # of gradients without the scale
    assert loss.dtype == torch.float32
