"""One optimizer step, piece by piece."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from engine_tokenbridge import train_step
from models.tokenizers.tokenizer import Tokenizer
from tests.conftest import tiny_model
from util.agreement import Agreement
from util.device import Precision, resolve_precision
from util.ema import EMA
from util.log import StepResult
from util.optim import build_optimizer, seed_micro_batch
from util.plan import Plan, Run, Schedule, TrainSettings

CPU = torch.device("cpu")
FP32 = resolve_precision("fp32", CPU)


def new_run(precision: Precision = FP32, **changes) -> Run:
    model = tiny_model(**changes).train()
    return Run(
        model=model,
        ema=EMA(model.published_parameters(), 0.5),
        optimizer=build_optimizer(model.published_parameters(), 1e-2, 0.02),
        scaler=torch.amp.GradScaler("cpu", enabled=precision.needs_scaler),
        agreement=Agreement(CPU),
        tokenizer=Tokenizer(None, latent_scale=2.0),
        device=CPU,
        precision=precision,
    )


def settings(micro_batches: int = 1, **changes) -> TrainSettings:
    schedule = Schedule(batch_size=2, micro_batches=micro_batches, images=100, seed=1)
    values = dict(plan=Plan(schedule, 0), epochs=1, grad_clip=3.0, max_skipped=3)
    values |= dict(cached=True, eval_freq=1, output_dir=Path(), extras={})
    return TrainSettings(**values | changes)


def micro_batches(count: int) -> list[list[torch.Tensor]]:
    return [[torch.randn(2, 12, 4, 4), torch.tensor([0, 2])] for _ in range(count)]


def step(run: Run, batches: Iterator, **changes) -> StepResult:
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
    found = step(run, iter(batches), micro_batches=3, grad_clip=1e9)
    torch.testing.assert_close(found.loss, torch.stack(losses).mean())
    torch.testing.assert_close(found.grad_norm, norm)
    for gradient, other in zip(seen, expected, strict=True):
        torch.testing.assert_close(gradient, other)
    assert found.waited >= 0 and not found.skipped


def test_gradients_are_clipped_after_their_norm_is_taken(monkeypatch):
    run = new_run()
    seen = []
    monkeypatch.setattr(
        run.optimizer, "step", lambda: seen.extend(p.grad.clone() for p in run.model.parameters())
    )
    norm = step(run, iter(micro_batches(1)), grad_clip=0.01).grad_norm
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
    found = step(run, iter(micro_batches(1)))
    assert found.skipped and found.loss.isfinite() and not found.grad_norm.isfinite()
    assert all(map(torch.equal, before, run.model.parameters()))
    assert run.scaler.get_scale() == 2.0**119


@pytest.mark.parametrize("name", ["bf16", "fp16", "fp32"])
def test_loss_in_lower_precision_is_close(name):
    batches = micro_batches(1)
    exact = step(new_run(), iter(batches))
    found = step(new_run(resolve_precision(name, CPU)), iter(batches))
    assert found.loss == pytest.approx(exact.loss.item(), rel=0.02)
    # of gradients without the scale
    assert found.grad_norm == pytest.approx(exact.grad_norm.item(), rel=0.05)
    assert found.loss.dtype == torch.float32


@pytest.mark.parametrize("name", ["fp32", "fp16"])
@pytest.mark.parametrize("spoiled", ["sample", "weight"])
def test_step_with_numbers_that_are_not_finite_changes_nothing(name, spoiled):
    run = new_run(resolve_precision(name, CPU))
    step(run, iter(micro_batches(1)))  # so that the optimizer has moments to lose
    batches = micro_batches(2)
    if spoiled == "sample":  # the quantizer clamps infinities, so the loss alone would not tell
        batches[1][0][0, 0, 0, 0] = torch.inf
    else:
        run.model.head.condition_proj.weight.data.fill_(3e38)  # finite, its products are not
    state = run.optimizer.state_dict()["state"]
    held = [
        *run.ema.parameters,
        *run.ema.averages,
        *(t for s in state.values() for t in s.values()),
    ]
    before = [tensor.detach().clone() for tensor in held]
    result = step(run, iter(batches), micro_batches=2)
    status = run.agreement.conclude(result.skipped)
    assert result.skipped and (status.skipped, status.in_a_row) == (1, 1)
    for tensor, old in zip(held, before, strict=True):
        torch.testing.assert_close(tensor.detach(), old, rtol=0, atol=0)


def test_skipped_steps_are_counted_in_all_and_in_a_row():
    agreement = Agreement(CPU, skipped=5)
    found = []
    for skipped in (True, True, False, True):
        agreement.vote(torch.tensor(True))
        status = agreement.conclude(torch.tensor(skipped))
        found.append((status.skipped, status.in_a_row))
    assert found == [(6, 1), (7, 2), (7, 0), (8, 1)]
    assert agreement.skipped() == 8
