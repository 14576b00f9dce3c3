"""The quantizer against the golden data and against brute force."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from models.quantizer import GaussianQuantizer
from tests.conftest import golden, relative_error

CASES = [(4, -5, 5), (5, -5, 5), (6, -5, 5), (8, -5, 5), (6, -3, 3)]


@pytest.mark.parametrize("bits,low,high", CASES)
def test_golden_indices_values_and_codebook(bits, low, high):
    data, prefix = golden("quantizer"), f"b{bits}_{low}_{high}_"
    quantizer = GaussianQuantizer(2**bits, low, high)
    assert torch.equal(quantizer.boundaries, data[prefix + "boundaries"])
    levels = data[prefix + "reconstruction_values"]
    assert torch.allclose(quantizer.reconstruction_values, levels, atol=2e-5, rtol=0)
    indices = quantizer.encode(data["x"])
    assert torch.equal(indices, data[prefix + "indices"].long())
    assert relative_error(quantizer.decode(indices), data[prefix + "values"]) < 1e-5


@pytest.mark.parametrize("levels", [2, 3, 7, 64, 512])
def test_encode_picks_the_nearest_level(levels):
    quantizer = GaussianQuantizer(levels, -4.0, 4.0)
    x = torch.randn(5, 300) * 2
    values = quantizer.decode(torch.arange(levels))
    distance = (x.clamp(-4, 4)[..., None].double() - values.double()).abs()
    chosen = distance.gather(-1, quantizer.encode(x)[..., None])[..., 0]
    assert (chosen - distance.min(dim=-1).values).max() < 1e-5


def test_a_tie_goes_to_the_lower_index():
    quantizer = GaussianQuantizer(2, -3.0, 3.0)
    assert quantizer.midpoints.item() == pytest.approx(0, abs=1e-7)
    middle = (quantizer.midpoints + 3) / 6 * 6 - 3
    assert quantizer.encode(middle).item() == 0
    assert quantizer.encode(middle + 1e-5).item() == 1


@pytest.mark.parametrize("levels", [4, 64, 512])
def test_every_level_is_its_own_nearest(levels):
    quantizer = GaussianQuantizer(levels)
    indices = torch.arange(levels)
    assert torch.equal(quantizer.encode(quantizer.decode(indices)), indices)


def test_levels_are_equally_likely_under_the_normal():
    quantizer = GaussianQuantizer(16, -3.0, 3.0)
    counts = torch.bincount(quantizer.encode(torch.randn(400_000)), minlength=16)
    inner = counts[1:-1] / counts.sum()
    assert (inner - 1 / 16).abs().max() < 0.01


def test_values_outside_the_range_are_clamped():
    quantizer = GaussianQuantizer(64, -5.0, 5.0)
    assert quantizer.encode(torch.tensor([-1e9, 1e9])).tolist() == [0, 63]


def test_half_precision_input_is_computed_in_fp32():
    quantizer = GaussianQuantizer(64)
    x = torch.randn(1000).bfloat16()
    assert torch.equal(quantizer.encode(x), quantizer.encode(x.float()))


def test_no_tensor_is_larger_than_the_input():
    """Binary search: nothing of the shape [..., K] is ever made."""
    x = torch.randn(4, 16, 16)
    sizes = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.append(out.numel() if isinstance(out, torch.Tensor) else 0)
            return out

    quantizer = GaussianQuantizer(64)
    with Record():
        quantizer.decode(quantizer.encode(x))
    assert sizes and max(sizes) == x.numel()


@pytest.mark.parametrize("wrong", [{"levels": 1}, {"levels": 513}, {"low": 2.0, "high": 2.0}])
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(ValueError):
        GaussianQuantizer(**wrong)


def test_integers_are_refused():
    with pytest.raises(ValueError, match="int64"):
        GaussianQuantizer().encode(torch.zeros(3, dtype=torch.int64))
