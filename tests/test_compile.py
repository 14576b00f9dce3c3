"""Compiled blocks: the same numbers, and a number of graphs that does not grow."""

import pytest
import setuptools  # noqa: F401 - on Python 3.11 it must come before a test that runs hf
import torch
from torch._dynamo.utils import counters

from models.sampler import sample_latents
from tests.conftest import tiny_model
from util.device import compile_model
from util.errors import UserError

LATENTS, LABELS = torch.randn(2, 6, 4, 4), torch.tensor([0, 1])


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def loss(model, masked: int) -> torch.Tensor:
    mask = torch.zeros(2, 16)
    mask[:, :masked] = 1
    return model(LATENTS, LABELS, mask)


def graphs() -> int:
    assert "recompile_limit" not in counters and not counters["graph_break"]
    return counters["stats"]["unique_graphs"]


def test_compiled_blocks_give_the_same_gradients_and_a_missing_compiler_is_named(monkeypatch):
    model = tiny_model().eval()
    loss(model, 11).backward()
    expected = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    compile_model(model, torch.device("cpu"))
    loss(model, 11).backward()
    for parameter, plain in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, plain, rtol=1e-4, atol=1e-6)
    assert graphs() == 3  # a block, one of some positions, the head's
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match="no-such-compiler"):
        compile_model(tiny_model(), torch.device("cpu"))


def test_masked_positions_iterations_and_channels_do_not_change_the_number_of_graphs():
    for chunk, also in ((4, 0), (0, 1)):  # the head's of one size, and one of any
        model, after = tiny_model().train(), []
        model.head.chunk = chunk
        model.compile_blocks(backend="aot_eager")
        for count in (11, 14, 16, 13):
            loss(model, count).backward()
            after.append(graphs())
        assert after == [3] + [3 + also] * 3
        torch._dynamo.reset()
        counters.clear()
    expected = sample_latents(tiny_model(), LABELS, num_iter=7, cfg=2.0, temperature=0)
    model, after = tiny_model(), []
    model.compile_blocks(backend="aot_eager")
    for num_iter in (16, 3, 5, 1, 7):
        found = sample_latents(model, LABELS, num_iter=num_iter, cfg=2.0, temperature=0)
        after.append(graphs())
    assert after[1] <= 8  # one position at a time, and several, each with its few kinds
    assert after[2:] == after[1:2] * 3
    assert torch.equal(found, expected)
