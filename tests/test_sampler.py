"""Sampling: the golden runs, and what must hold for any model."""

import math
from dataclasses import replace

import pytest
import torch
from scipy.stats import ks_2samp, kstest, truncnorm

from models.backbone import patchify, unpatchify
from models.layers import take
from models.masking import MaskRatios, mask_schedule, split_mask, training_mask
from models.sampler import (
    CFG_SCHEDULES,
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


def test_impossible_requests_are_refused():
    wrong = dict(num_iter=0, cfg_schedule="sine", temperature=float("nan"), cfg=float("inf"))
    wrong |= dict(seed=-1, labels=torch.tensor([3]), head_input="other", image_ids=[1, 2])
    wrong |= dict(cfg_interval=(0.5, 0.2), cfg_power=2.0, mask_schedule="linear")
    wrong |= dict(known=torch.zeros(1, 6, 4, 4), known_mask=torch.ones(1, 4, 4))
    more = [("labels", None), ("cfg_interval", 0.5), ("cfg_interval", (0.1, 0.2, 0.3))]
    for name, value in (*wrong.items(), *more):
        arguments = {"labels": torch.tensor([0]), "num_iter": 1} | {name: value}
        with pytest.raises(ValueError, match=name):
            sample_latents(tiny_model(), arguments.pop("labels"), **arguments)


def test_guidance_follows_its_schedule_inside_its_interval_and_no_class_ignores_it():
    linear, constant, cosine = (SamplingOptions(cfg=3.0, cfg_schedule=s) for s in CFG_SCHEDULES)
    assert guidance_scale(linear, 256, 256) == 1.0 and guidance_scale(linear, 256, 128) == 2.0
    assert guidance_scale(constant, 256, 128) == 3.0
    assert [guidance_scale(cosine, 256, 0, done) for done in (0, 0.5, 1)] == [1.0, 2.0, 3.0]
    steep = replace(cosine, cfg_power=2.0)
    assert guidance_scale(steep, 256, 0, 0.5) == pytest.approx(2 - math.cos(math.pi / 4))
    early = replace(constant, cfg_interval=(0.25, 0.5))
    scales = [guidance_scale(early, 256, 0, done) for done in (0, 0.25, 0.5, 0.75)]
    assert scales == [1.0, 3.0, 3.0, 1.0]
    model = tiny_model()
    plain = sample_latents(model, None, batch_size=2, num_iter=4)
    assert torch.equal(plain, sample_latents(model, None, batch_size=2, num_iter=4, cfg=4.0))


@pytest.mark.parametrize("options", [{}, {"token_cache": 3}, {"order": "confidence"}])
def test_an_interval_of_all_iterations_is_none_and_outside_nothing_is_doubled(options):
    model, labels = tiny_model(), torch.tensor([0, 1])
    options = dict(num_iter=6, cfg=3.0, cfg_schedule="constant", seed=4) | options
    whole = sample_latents(model, labels, **options)
    assert torch.equal(sample_latents(model, labels, cfg_interval=(0, 1), **options), whole)
    batches = []
    model.backbone.encoder_norm.register_forward_hook(
        lambda _, args, __: batches.append(len(args[0]))
    )
    parts = sample_latents(model, labels, cfg_interval=(0.3, 0.7), **options)
    assert batches == [2, 2, 4, 4, 4, 2] and not torch.equal(parts, whole)
    with pytest.raises(ValueError, match="cfg_interval"):  # between two iterations
        sample_latents(model, labels, cfg_interval=(0.9, 0.95), **options)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("count", [0, 5, 15, 16])
def test_known_positions_stay_and_all_others_are_drawn(order, count):
    model, labels = tiny_model(), torch.tensor([0, 1, 2])
    options = dict(num_iter=4, cfg=2.0, order=order, seed=7)
    places = torch.stack([torch.randperm(16) for _ in labels])[:, :count]
    mask = torch.zeros(3, 16, dtype=torch.bool).scatter(1, places, True).view(-1, 4, 4)
    given = {"known": torch.randn(3, 6, 4, 4), "known_mask": mask}
    found = sample_latents(model, labels, **given, **options)
    quantized = model.quantizer.decode(model.quantizer.encode(given["known"]))
    known = mask[:, None].expand_as(found)
    assert torch.equal(found[known], quantized[known])
    if count == 0:
        assert torch.equal(found, sample_latents(model, labels, **options))
    one = {name: tensor[1:2] for name, tensor in given.items()}
    alone = sample_latents(model, labels[1:2], image_ids=[1], **one, **options)
    assert torch.equal(alone, found[1:2])


def test_known_positions_are_what_the_others_are_drawn_from():
    """The last iteration of a run, of what the others have left, draws the same again."""
    model, labels = tiny_model(), torch.tensor([0, 1])
    *_, before, last = run(model, labels, num_iter=8, seed=3)
    left = before.masked.view(2, 4, 4)
    known = unpatchify(before.values, 1, 4)
    again = sample_latents(model, labels, num_iter=1, seed=3, known=known, known_mask=~left)
    assert torch.equal(patchify(again, 1), last.values)
    ragged = left.clone()
    ragged[0] = False
    with pytest.raises(ValueError, match="known positions: draw them apart"):
        sample_latents(model, labels, known=known, known_mask=~ragged)


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


# --- masks

PUBLISHED = MaskRatios("normal", 0.7)
SHARES = {"cosine": lambda t: math.cos(math.pi / 2 * t), "exp": lambda t: 1 - math.exp(5 * t - 5)}


def test_positions_of_the_loss_are_uniform_and_a_boolean_mask_is_split_into_ascending_ones():
    orders = torch.rand(4, 20).argsort(dim=1)
    visible, masked = split_mask(torch.zeros(4, 20).scatter(1, orders[:, :13], 1.0))
    assert torch.equal(masked, orders[:, :13].sort(dim=1).values)
    assert torch.equal(visible, orders[:, 13:].sort(dim=1).values)
    with pytest.raises(ValueError, match=r"\[2, 1\]"):
        split_mask(torch.tensor([[1, 1, 0], [1, 0, 0]]))
    _, positions = training_mask(6000, 6, MaskRatios("normal", 1.0), 1 / 6, "cpu")
    first = torch.bincount(positions[:, 0], minlength=6) / 6000
    assert (first - 1 / 6).abs().max() < 0.025


def test_mask_ratio_follows_the_truncated_normal_or_an_exponential_of_uniform_draws():
    """Kolmogorov-Smirnov against scipy's normal(1.0, 0.25) truncated to [0.7, 1.0].

    Of the exponential a fifth is the least, and as often as all draws below it.
    """
    ratios = [PUBLISHED.draw() for _ in range(3000)]
    expected = truncnorm((0.7 - 1.0) / 0.25, 0, loc=1.0, scale=0.25)
    assert min(ratios) >= 0.7 and max(ratios) <= 1.0
    assert kstest(ratios, expected.cdf).pvalue > 1e-4
    assert MaskRatios("normal", 1.0).draw() == 1.0
    masked = {training_mask(2, 16, PUBLISHED, 1.0, "cpu")[1].shape[1] for _ in range(50)}
    assert masked == set(range(math.ceil(16 * 0.7), 17))
    ratios = MaskRatios("exp", 0.2)
    drawn = torch.tensor([ratios.draw() for _ in range(3000)])
    expected = (1 - torch.exp(-5 * torch.rand(3000))).clamp(min=0.2)
    assert ks_2samp(drawn.numpy(), expected.numpy()).pvalue > 1e-4


@pytest.mark.parametrize("name", SHARES)
@pytest.mark.parametrize("length,num_iter", [(16, 1), (16, 5), (16, 16), (16, 50), (256, 64)])
def test_schedule_follows_its_curve_and_uncovers_every_position_once(length, num_iter, name):
    schedule = mask_schedule(length, num_iter, name)
    assert len(schedule) == num_iter
    assert schedule[0][0] == length and schedule[-1][1] == 0
    for (before, after, _), (next_before, _, _) in zip(schedule, schedule[1:], strict=False):
        assert next_before == after <= before
    assert sum(before - after for before, after, _ in schedule) == length
    for step, (before, after, m) in enumerate(schedule[:-1]):
        left = math.floor(length * SHARES[name]((step + 1) / num_iter))
        assert after == m == max(1, min(before - 1, left))
