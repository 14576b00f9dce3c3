"""AdamW's groups, the learning rate, averaged weights, and a micro-batch's own random numbers."""

import math

import pytest
import torch

from tests.conftest import tiny_model
from util.optim import EMA, LRSchedule, build_optimizer, seed_micro_batch


def test_no_weight_decay_on_vectors_and_biases_and_the_published_order():
    """The order numbers the optimizer's state in a checkpoint."""
    model = tiny_model()
    names = {parameter: name for name, parameter in model.published_parameters()}
    order = {parameter: i for i, parameter in enumerate(names)}
    plain, decayed = build_optimizer(model.published_parameters(), 1e-3, 0.02).param_groups
    assert (plain["weight_decay"], decayed["weight_decay"]) == (0.0, 0.02)
    assert plain["betas"] == decayed["betas"] == (0.9, 0.95)
    assert all(p.ndim == 1 or names[p].endswith(".bias") for p in plain["params"])
    assert all(p.ndim > 1 and not names[p].endswith(".bias") for p in decayed["params"])
    assert len(plain["params"]) + len(decayed["params"]) == len(names)
    for group in (plain, decayed):
        positions = [order[parameter] for parameter in group["params"]]
        assert positions == sorted(positions)


def test_rate_warms_up_linearly_and_falls_by_half_a_cosine():
    for epoch, expected in (
        (0, 0.0),
        (1, 0.1),
        (10, 1.0),  # the end of the warm-up
        (20, 0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi / 9))),
        (55, 0.6),  # half-way down
        (100, 0.2),
    ):
        settings = dict(lr=1.0, min_lr=0.2, warmup_epochs=10, epochs=100, steps_per_epoch=4)
        assert LRSchedule(**settings)(round(epoch * 4)) == pytest.approx(expected, rel=1e-12)
        constant = LRSchedule(**settings, kind="constant")(round(epoch * 4))
        assert constant == pytest.approx(min(epoch / 10, 1.0))
    for warmup, expected in ((0, [1.0, 0.5]), (2, [0.0, 0.5]), (5, [0, 0.2])):  # none, all, more
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


def test_swap_lends_the_averages_without_a_copy_and_gives_the_weights_back_after_an_error():
    model = tiny_model()
    ema = EMA(model.published_parameters(), 0.5)
    for parameter in model.parameters():
        parameter.data.add_(1.0)
    ema.update()
    own = {name: (p.data_ptr(), p.detach().clone()) for name, p in model.published_parameters()}
    averages = {name: (t.data_ptr(), t.clone()) for name, t in ema.state_dict().items()}
    assert list(averages) == list(own)
    with pytest.raises(RuntimeError), ema.swapped_in():
        for name, parameter in model.published_parameters():
            assert parameter.data_ptr() == averages[name][0]
            assert torch.equal(parameter, averages[name][1])
        raise RuntimeError
    for name, parameter in model.published_parameters():
        assert parameter.data_ptr() == own[name][0] and torch.equal(parameter, own[name][1])
        assert torch.equal(ema.state_dict()[name], averages[name][1])
