"""AdamW's groups, the learning rate, and randomness that belongs to a micro-batch."""

import math

import pytest
import torch

from tests.conftest import tiny_model
from util.optim import LRSchedule, build_optimizer, seed_micro_batch, set_lr


def test_no_weight_decay_on_vectors_and_biases():
    model = tiny_model()
    names = {parameter: name for name, parameter in model.published_parameters()}
    plain, decayed = build_optimizer(model.published_parameters(), 1e-3, 0.02).param_groups
    assert (plain["weight_decay"], decayed["weight_decay"]) == (0.0, 0.02)
    assert plain["betas"] == decayed["betas"] == (0.9, 0.95)
    for parameter in plain["params"]:
        assert parameter.ndim == 1 or names[parameter].endswith(".bias")
    for parameter in decayed["params"]:
        assert parameter.ndim > 1 and not names[parameter].endswith(".bias")
    assert len(plain["params"]) + len(decayed["params"]) == len(names)
    found = {names[parameter] for parameter in decayed["params"]}
    assert {"class_emb.weight", "mask_token", "fake_latent", "encoder_pos_embed_learned"} <= found
    assert {"z_proj_ln.weight", "z_proj.bias"} <= {names[p] for p in plain["params"]}


def test_bias_of_any_shape_is_not_decayed():
    named = [(f"a.{name}", torch.nn.Parameter(torch.ones(2, 2))) for name in ("bias", "weight")]
    plain, decayed = build_optimizer(named, 1e-3, 0.02).param_groups
    assert plain["params"][0] is named[0][1] and decayed["params"][0] is named[1][1]


def test_groups_keep_the_published_order():
    """It numbers the optimizer's state in a checkpoint."""
    model = tiny_model()
    order = {parameter: i for i, (_, parameter) in enumerate(model.published_parameters())}
    for group in build_optimizer(model.published_parameters(), 1e-3, 0.02).param_groups:
        positions = [order[parameter] for parameter in group["params"]]
        assert positions == sorted(positions)


def test_update_is_adamw_by_hand():
    """One step from g: m/(1-b1) = g, v/(1-b2) = g^2, so w <- w (1 - lr wd) - lr sign(g)."""
    weight, bias = torch.nn.Parameter(torch.full((2, 2), 3.0)), torch.nn.Parameter(torch.ones(2))
    optimizer = build_optimizer([("a.weight", weight), ("a.bias", bias)], 1.0, 0.5)
    set_lr(optimizer, 0.1)
    weight.grad, bias.grad = torch.full((2, 2), -2.0), torch.full((2,), 4.0)
    optimizer.step()
    torch.testing.assert_close(weight.data, torch.full((2, 2), 3 * 0.95 + 0.1))
    torch.testing.assert_close(bias.data, torch.full((2,), 0.9))


@pytest.mark.parametrize(
    ("epoch", "expected"),
    [
        (0, 0.0),
        (1, 0.1),
        (9.5, 0.95),
        (10, 1.0),  # the end of the warm-up
        (20, 0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi / 9))),
        (55, 0.6),  # half-way down
        (100, 0.2),
    ],
)
def test_rate_warms_up_linearly_and_falls_by_half_a_cosine(epoch, expected):
    settings = dict(lr=1.0, min_lr=0.2, warmup_epochs=10, epochs=100, steps_per_epoch=4)
    assert LRSchedule(**settings)(round(epoch * 4)) == pytest.approx(expected, rel=1e-12)
    constant = LRSchedule(**settings, kind="constant")(round(epoch * 4))
    assert constant == pytest.approx(min(epoch / 10, 1.0))


@pytest.mark.parametrize(("warmup", "expected"), [(0, [1.0, 0.5]), (2, [0.0, 0.5]), (5, [0, 0.2])])
def test_warm_up_may_be_none_or_all_or_longer_than_the_run(warmup, expected):
    schedule = LRSchedule(1.0, 0.0, warmup, epochs=2, steps_per_epoch=1)
    assert [schedule(step) for step in (0, 1)] == pytest.approx(expected)


def test_every_micro_batch_has_its_own_random_numbers():
    def draw(*key: int) -> float:
        seed_micro_batch(*key)
        return torch.rand(()).item()

    keys = [(s, t, j) for s in range(3) for t in range(20) for j in range(4)]
    drawn = {key: draw(*key) for key in keys}
    assert len(set(drawn.values())) == len(keys)
    assert all(draw(*key) == drawn[key] for key in reversed(keys))
