"""The averaged weights: their formula, and lending them to the model without a copy."""

import pytest
import torch

from tests.conftest import tiny_model
from util.ema import EMA


def test_average_follows_its_formula():
    parameter = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    ema = EMA([("w", parameter)], rate=0.9)
    expected = parameter.detach().clone()
    for value in (3.0, -1.0, 0.5):
        parameter.data.fill_(value)
        ema.update()
        expected = 0.9 * expected + 0.1 * value
    torch.testing.assert_close(ema.state_dict()["w"], expected)


@pytest.mark.parametrize(("rate", "expected"), [(0.0, 5.0), (1.0, 1.0)])
def test_extreme_rates_keep_the_new_or_the_old(rate, expected):
    parameter = torch.nn.Parameter(torch.ones(1))
    ema = EMA([("w", parameter)], rate)
    parameter.data.fill_(5.0)
    ema.update()
    assert ema.state_dict()["w"].item() == expected


def test_swap_lends_the_averages_without_a_copy():
    model = tiny_model()
    ema = EMA(model.published_parameters(), 0.5)
    for parameter in model.parameters():
        parameter.data.add_(1.0)
    ema.update()
    own = {name: (p.data_ptr(), p.detach().clone()) for name, p in model.published_parameters()}
    averages = {name: (t.data_ptr(), t.clone()) for name, t in ema.state_dict().items()}
    with ema.swapped_in():
        for name, parameter in model.published_parameters():
            assert parameter.data_ptr() == averages[name][0]
            assert torch.equal(parameter, averages[name][1])
            assert not torch.equal(parameter, own[name][1])
    for name, parameter in model.published_parameters():
        assert parameter.data_ptr() == own[name][0] and torch.equal(parameter, own[name][1])
        assert torch.equal(ema.state_dict()[name], averages[name][1])


def test_model_gets_its_weights_back_after_an_error():
    parameter = torch.nn.Parameter(torch.ones(1))
    ema = EMA([("w", parameter)], 0.5)
    parameter.data.fill_(2.0)
    with pytest.raises(RuntimeError), ema.swapped_in():
        assert parameter.item() == 1.0
        raise RuntimeError
    assert parameter.item() == 2.0


def test_averages_hold_parameters_alone_and_survive_a_dict():
    model = tiny_model()
    ema, other = (EMA(model.published_parameters(), 0.5) for _ in range(2))
    names = [name for name, _ in model.published_parameters()]
    assert list(ema.state_dict()) == names and "boundaries" not in names
    for average in ema.averages:
        average.mul_(2.0)
    other.load_state_dict(ema.state_dict())
    for average, copy in zip(ema.averages, other.averages, strict=True):
        assert torch.equal(average, copy) and average.data_ptr() != copy.data_ptr()


@pytest.mark.parametrize(
    "state", [{}, {"w": torch.ones(1)}, {"w": torch.ones(2), "v": torch.ones(2)}]
)
def test_other_averages_are_refused(state):
    ema = EMA([("w", torch.nn.Parameter(torch.zeros(2)))], 0.5)
    with pytest.raises(ValueError, match="[wv]"):
        ema.load_state_dict(state)
    assert ema.state_dict()["w"].tolist() == [0.0, 0.0]
