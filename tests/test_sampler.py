"""Sampling: the golden runs, and what must hold for any model."""

from dataclasses import replace

import pytest
import torch

from models.backbone import patchify, unpatchify
from models.layers import take
from models.masking import Mask
from models.sampler import (
    ORDERS,
    SamplingOptions,
    SamplingStep,
    guidance_scale,
    sample_latents,
    sampling_steps,
)
from tests.conftest import golden, golden_json, golden_model, relative_error, tiny_model

RUNS = golden_json("config")["sampling_runs"]


@pytest.mark.parametrize("number", range(len(RUNS)))
def test_golden_runs_in_the_published_mode(number):
    run, data = dict(RUNS[number]), golden("tokenbridge")
    name = run.pop("name", f"sample{number}")
    labels = data["labels"] if "labels" not in run else run.pop("labels")
    model = golden_model()
    latents = sample_latents(model, labels, orders=data["orders"], batch_size=3, **run)
    assert relative_error(latents, data[f"{name}_latents"]) < 1e-5
    if f"{name}_indices" in data:
        indices = model.quantizer.encode(patchify(latents, 1))
        assert torch.equal(indices, data[f"{name}_indices"].long())


@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_an_image_is_the_same_in_any_batch(cfg):
    model = tiny_model()
    labels = torch.tensor([0, 1, 2, 0, 1])
    together = sample_latents(model, labels, num_iter=6, cfg=cfg, seed=5)
    alone = [
        sample_latents(model, labels[i : i + 1], num_iter=6, cfg=cfg, seed=5, image_ids=[i])
        for i in range(5)
    ]
    assert torch.equal(together, torch.cat(alone))
    other = sample_latents(model, labels, num_iter=6, cfg=cfg, seed=6)
    assert not torch.equal(together, other)


def test_guidance_equals_two_separate_passes():
    """Batched guidance against the formula on decoder outputs, one iteration at temperature 0."""
    model, labels = tiny_model(), torch.tensor([1, 2])
    orders = torch.stack([torch.randperm(16), torch.randperm(16)])
    found = sample_latents(
        model, labels, num_iter=1, cfg=3.0, cfg_schedule="linear", temperature=0, orders=orders
    )
    with torch.no_grad():
        mask, values = Mask.from_orders(orders, 16), torch.zeros(2, 16, 6)
        cond, uncond = (
            model.backbone(values, model.backbone.class_embedding(choice, 2), mask, mask.masked)
            for choice in (labels, None)
        )
        # One iteration: m = max(1, floor(16 cos(pi/2))) = 1, so g = 1 + 2 * 15/16.
        z = uncond + (1 + 2 * 15 / 16) * (cond - uncond)
        indices, _ = model.head.sample(z.flatten(0, 1), torch.zeros(32, 6), 0)
    expected = model.quantizer.decode(indices).unflatten(0, (2, 16))
    assert torch.equal(patchify(found, 1), expected)


def test_impossible_requests_are_refused():
    wrong = dict(num_iter=0, cfg_schedule="cosine", temperature=float("nan"), cfg=float("inf"))
    wrong |= dict(seed=-1, labels=torch.tensor([3]), head_input="other", image_ids=[1, 2])
    for name, value in (*wrong.items(), ("labels", None)):
        arguments = {"labels": torch.tensor([0]), "num_iter": 1} | {name: value}
        with pytest.raises(ValueError, match=name):
            sample_latents(tiny_model(), arguments.pop("labels"), **arguments)


def test_guidance_scale_grows_linearly_or_stays_and_no_class_ignores_it():
    assert guidance_scale(3.0, "linear", 256, 256) == 1.0
    assert guidance_scale(3.0, "linear", 256, 128) == 2.0
    assert guidance_scale(3.0, "constant", 256, 128) == 3.0
    model = tiny_model()
    plain = sample_latents(model, None, batch_size=2, num_iter=4)
    assert torch.equal(plain, sample_latents(model, None, batch_size=2, num_iter=4, cfg=4.0))


def test_sampling_log_probabilities_equal_teacher_forced_ones():
    """In the last iteration the head sees what training would show it for the same tokens."""
    model, labels = tiny_model(), torch.tensor([1])
    step = run(model, labels, num_iter=16, seed=2)[-1]
    mask = torch.zeros(1, 16).scatter(1, step.positions, 1.0)
    latents = unpatchify(step.values, 1, 4)
    with torch.no_grad():
        expected = model.logits(latents, labels, mask).log_softmax(dim=-1)  # [M, C, K]
    indices = take(model.quantizer.encode(step.values), step.positions)[0]
    expected = expected.gather(-1, indices[..., None])[..., 0]
    assert torch.allclose(step.log_probs[0], expected, atol=1e-5)


def run(model, labels, **options) -> list[SamplingStep]:
    return [
        replace(step, values=step.values.clone())
        for step in sampling_steps(model, labels, SamplingOptions(**options))
    ]


@pytest.mark.parametrize("num_iter", [1, 5, 40])
@pytest.mark.parametrize("order", ORDERS)
def test_steps_fill_every_position_once_and_keep_what_was_filled(order, num_iter):
    model, labels = tiny_model(), torch.tensor([0, 1])
    steps = run(model, labels, num_iter=num_iter, cfg=2.0, order=order)
    filled = torch.cat([step.positions for step in steps], dim=1)
    assert torch.equal(filled.sort(dim=1).values, torch.arange(16).expand(2, -1))
    for before, after in zip(steps, steps[1:], strict=False):
        assert torch.equal(after.values[~before.masked], before.values[~before.masked])
        assert not after.masked[~before.masked].any()
    assert not steps[-1].masked.any()
    latents = sample_latents(model, labels, num_iter=num_iter, cfg=2.0, order=order)
    assert torch.equal(patchify(latents, 1), steps[-1].values)
    if order == "raster":
        rows = [step.positions[0].sort().values for step in steps]
        assert torch.equal(torch.cat(rows), torch.arange(16))


def test_confidence_order_keeps_the_most_likely_of_all_that_it_drew(monkeypatch):
    model, drawn = tiny_model(), []
    plain = model.head.sample

    def sample(*arguments, **how):
        drawn.append(plain(*arguments, **how)[1].sum(dim=-1))
        return plain(*arguments, **how)

    monkeypatch.setattr(model.head, "sample", sample)
    steps = run(model, torch.tensor([2]), num_iter=4, order="confidence")
    for log_probs, step in zip(drawn, steps, strict=True):
        kept = step.log_probs.sum(dim=-1)[0]
        best = log_probs.topk(len(kept)).values
        assert torch.allclose(kept.sort(descending=True).values, best, atol=1e-6)
    assert [len(log_probs) for log_probs in drawn] == [16, 14, 11, 6]


@pytest.mark.parametrize(("cfg", "order"), [(1.0, "random"), (2.0, "confidence"), (2.0, "raster")])
def test_a_token_cache_renewed_every_iteration_changes_nothing(cfg, order):
    model, labels = tiny_model(), torch.tensor([0, 1])
    options = dict(num_iter=6, cfg=cfg, order=order, temperature=0)
    plain = run(model, labels, **options)
    cached = run(model, labels, **options, token_cache=1)
    for expected, found in zip(plain, cached, strict=True):
        assert torch.equal(found.values, expected.values)
        assert torch.allclose(found.log_probs, expected.log_probs, atol=1e-5)


def test_a_token_cache_computes_only_what_was_filled_and_what_is_predicted():
    model, rows = tiny_model(), []
    parts = (model.backbone.encoder_blocks[0], model.backbone.decoder_blocks[0])
    for block in parts:
        block.register_forward_pre_hook(lambda _, args: rows.append(args[0].shape[1]))
    steps = run(model, torch.tensor([1]), num_iter=6, token_cache=3)
    n, slots = [step.positions.shape[1] for step in steps], model.config.buffer_size
    visible = slots + sum(n[:3])
    expected = [slots, slots + 16, n[0], n[0] + n[1], n[1], n[1] + n[2]]
    expected += [visible, slots + 16, n[3], n[3] + n[4], n[4], n[4] + n[5]]
    assert rows == expected
