"""The learning rate, a micro-batch's own random numbers, and averaged weights.

AdamW's groups and their order are the published ones: test_checkpoint.py, test_tokenbridge.py.
"""

import pytest
import torch

from tests.conftest import tiny_model
from util.optim import EMA, LRSchedule, seed_micro_batch


def test_rate_falls_by_half_a_cosine_or_is_constant_after_any_warm_up():
    """Warm-up and fall also of the golden training: test_tokenbridge.py."""
    settings = dict(lr=1.0, min_lr=0.2, warmup_epochs=10, epochs=100, steps_per_epoch=4)
    for epoch, expected in ((0, 0.0), (1, 0.1), (10, 1.0), (55, 0.6), (100, 0.2)):
        assert LRSchedule(**settings)(epoch * 4) == pytest.approx(expected, rel=1e-12)
        constant = LRSchedule(**settings, kind="constant")(epoch * 4)
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
