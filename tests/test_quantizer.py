"""The quantizer against the golden data and against brute force."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from models.backbone import patchify
from models.quantizer import CalibratedQuantizer, GaussianQuantizer
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


@pytest.mark.parametrize("levels", [2, 5, 64, 512])
def test_the_table_finds_what_a_search_finds(levels):
    """Also on the borders themselves and one float beside them; NaN takes some level."""
    quantizer = GaussianQuantizer(levels, -3.0, 3.0)
    borders = quantizer.midpoints
    x = torch.cat([borders, borders.nextafter(borders + 1), borders.nextafter(borders - 1)])
    unit = (x - -3.0) / 6.0 * 6 - 3
    assert torch.equal(quantizer.encode(x), torch.bucketize(unit, borders))
    assert 0 <= quantizer.encode(torch.tensor([torch.nan])).item() < levels


def test_levels_of_a_file_have_a_table_of_their_own():
    """Also where many borders share a cell."""
    quantizer = GaussianQuantizer(64)
    state = quantizer.state_dict()
    state["reconstruction_values"] = torch.linspace(0.001, 0.002, 64)
    quantizer.load_state_dict(state)
    x = torch.linspace(-0.01, 0.01, 1001)
    distances = (((x + 5) / 10 * 6 - 3)[:, None] - state["reconstruction_values"]).abs()
    chosen = distances.gather(1, quantizer.encode(x)[:, None])[:, 0]
    assert (chosen - distances.min(dim=1).values).max() < 1e-6


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


def test_outside_is_beyond_the_range():
    quantizer = GaussianQuantizer(4, -2.0, 3.0)
    x = torch.tensor([-2.5, -2.0, 0.0, 3.0, 3.5])
    assert quantizer.outside(x).tolist() == [True, False, False, False, True]


# --- calibrated: a codebook for each channel


def calibrated(channels: int = 3, levels: int = 8) -> CalibratedQuantizer:
    """Levels at random, other ones for each channel."""
    quantizer = CalibratedQuantizer(levels, channels)
    values = torch.randn(channels, levels).sort(dim=1).values
    inner = (values[:, 1:] + values[:, :-1]) / 2
    ends = torch.full((channels, 1), 4.0)
    quantizer.set_levels(torch.cat([-ends, inner, ends], dim=1), values)
    return quantizer


def brute_force(quantizer: CalibratedQuantizer, x: torch.Tensor) -> torch.Tensor:
    """x: [..., C] -> index of the nearest value by distance."""
    return (x[..., None] - quantizer.reconstruction_values).abs().argmin(dim=-1)


@pytest.mark.parametrize("shape", [(3,), (7, 3), (2, 5, 3), (2, 0, 3)])
def test_each_channel_takes_the_nearest_of_its_own_levels(shape):
    quantizer = calibrated()
    x = torch.randn(shape)
    indices = quantizer.encode(x)
    assert torch.equal(indices, brute_force(quantizer, x))
    expected = torch.stack(
        [quantizer.reconstruction_values[c, indices[..., c]] for c in range(3)], dim=-1
    )
    assert torch.equal(quantizer.decode(indices), expected)
    assert torch.equal(quantizer.encode(expected), indices)


def test_patches_hold_each_channels_scalars_next_to_each_other():
    """p = 2: a scalar's codebook is its channel's, wherever it lies in the patch."""
    quantizer, latents = calibrated(), torch.randn(2, 3, 4, 6)
    whole = quantizer.encode(latents.movedim(1, -1)).movedim(-1, 1)
    tokens = patchify(latents, 2)
    assert torch.equal(quantizer.encode(tokens), patchify(whole, 2))
    values = quantizer.decode(whole.movedim(1, -1)).movedim(-1, 1)
    assert torch.equal(quantizer.decode(patchify(whole, 2)), patchify(values, 2))
    assert torch.equal(quantizer.outside(tokens * 3), (tokens * 3).abs() > 4)


def test_ends_of_the_data_are_each_channels_own():
    quantizer = calibrated(channels=2, levels=2)
    boundaries = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 3.0]])
    quantizer.set_levels(boundaries, torch.tensor([[-0.5, 0.5], [-1.0, 1.0]]))
    x = torch.tensor([[-1.5, -1.5], [1.0, 2.9], [1.1, 3.1]])
    assert quantizer.outside(x).tolist() == [[True, False], [False, False], [True, True]]
    assert quantizer.encode(torch.tensor([0.0, 0.0])).tolist() == [0, 0]  # ties go down


def test_calibrated_search_makes_nothing_as_large_as_all_distances():
    x, sizes = torch.randn(4, 16, 3), []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.append(out.numel() if isinstance(out, torch.Tensor) else 0)
            return out

    quantizer = calibrated(levels=64)
    tables = quantizer.boundaries.numel()
    with Record():
        quantizer.decode(quantizer.encode(x))
    assert max(sizes) <= max(x.numel(), tables)


def test_without_levels_nothing_is_quantized():
    quantizer = CalibratedQuantizer(8, 3)
    for use in (quantizer.encode, quantizer.outside):
        with pytest.raises(ValueError, match="no levels"):
            use(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="no levels"):
        quantizer.decode(torch.zeros(2, 3, dtype=torch.int64))
    quantizer.load_state_dict(quantizer.state_dict())  # its empty tables are still none
    assert not quantizer.fitted


def test_a_state_dict_carries_the_levels():
    quantizer, other = calibrated(), CalibratedQuantizer(8, 3)
    other.load_state_dict(quantizer.state_dict())
    x = torch.randn(10, 3)
    assert torch.equal(other.encode(x), quantizer.encode(x))


def test_what_are_no_levels_is_refused():
    quantizer = CalibratedQuantizer(2, 1)
    boundaries, values = torch.tensor([[-1.0, 0.0, 1.0]]), torch.tensor([[-0.5, 0.5]])
    for wrong in ((boundaries[0], values), (boundaries, values[:, :1])):
        with pytest.raises(ValueError, match="shapes"):
            quantizer.set_levels(*wrong)
    with pytest.raises(ValueError, match="ascending"):
        quantizer.set_levels(boundaries, values.flip(1))
    quantizer.set_levels(boundaries, values)
    with pytest.raises(ValueError, match="int64"):
        quantizer.encode(torch.zeros(1, dtype=torch.int64))
    with pytest.raises(ValueError, match="513"):
        CalibratedQuantizer(513, 1)
    with pytest.raises(ValueError, match="3 scalars a token are no multiple of 2"):
        calibrated(channels=2).encode(torch.zeros(3))
