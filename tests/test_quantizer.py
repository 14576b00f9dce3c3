"""The quantizers against the golden data and against brute force."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from models.backbone import patchify, unpatchify
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
    """Of half-precision numbers too; outside the range the outermost; NaN takes some level."""
    quantizer = GaussianQuantizer(levels, -4.0, 4.0)
    values = quantizer.decode(torch.arange(levels))
    assert torch.equal(quantizer.encode(values), torch.arange(levels))
    for x in (torch.randn(5, 300) * 2, torch.randn(300).bfloat16()):
        distance = (x.clamp(-4, 4)[..., None].double() - values.double()).abs()
        chosen = distance.gather(-1, quantizer.encode(x)[..., None])[..., 0]
        assert (chosen - distance.min(dim=-1).values).max() < 1e-5
    assert quantizer.encode(torch.tensor([-1e9, 1e9])).tolist() == [0, levels - 1]
    assert 0 <= quantizer.encode(torch.tensor([torch.nan])).item() < levels


def calibrated(channels: int = 3, levels: int = 8) -> CalibratedQuantizer:
    """Levels at random, other ones for each channel."""
    quantizer = CalibratedQuantizer(levels, channels)
    values = torch.randn(channels, levels).sort(dim=1).values
    inner = (values[:, 1:] + values[:, :-1]) / 2
    ends = torch.full((channels, 1), 4.0)
    quantizer.set_levels(torch.cat([-ends, inner, ends], dim=1), values)
    return quantizer


@pytest.mark.parametrize("quantizer", [GaussianQuantizer(64), calibrated(levels=64)])
def test_no_tensor_is_as_large_as_all_distances_and_integers_are_refused(quantizer):
    x, sizes = torch.randn(40, 16, 3), []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.append(out.numel() if isinstance(out, torch.Tensor) else 0)
            return out

    with Record():
        quantizer.decode(quantizer.encode(x))
    assert sizes and max(sizes) == x.numel()
    with pytest.raises(ValueError, match="int64"):
        quantizer.encode(x.long())


@pytest.mark.parametrize("shape", [(3,), (7, 3), (2, 5, 3), (2, 0, 3)])
def test_each_channel_takes_the_nearest_of_its_own_levels(shape):
    quantizer, x = calibrated(), torch.randn(shape)
    indices = quantizer.encode(x)
    nearest = (x[..., None] - quantizer.reconstruction_values).abs().argmin(dim=-1)
    assert torch.equal(indices, nearest)
    levels = [quantizer.reconstruction_values[c, indices[..., c]] for c in range(3)]
    assert torch.equal(quantizer.decode(indices), torch.stack(levels, dim=-1))


def test_outside_is_beyond_the_range_or_each_channels_own_data():
    x = torch.tensor([-2.5, -2.0, 0.0, 3.0, 3.5])
    assert GaussianQuantizer(4, -2.0, 3.0).outside(x).tolist() == [True, *[False] * 3, True]
    assert GaussianQuantizer(2, -3.0, 3.0).encode(x).tolist() == [0, 0, 0, 1, 1]  # ties go down
    quantizer = CalibratedQuantizer(2, 2)
    boundaries = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 3.0]])
    quantizer.set_levels(boundaries, torch.tensor([[-0.5, 0.5], [-1.0, 1.0]]))
    x = torch.tensor([[-1.5, -1.5], [1.0, 2.9], [1.1, 3.1]])
    assert quantizer.outside(x).tolist() == [[True, False], [False, False], [True, True]]
    assert quantizer.encode(torch.zeros(2)).tolist() == [0, 0]


def test_impossible_settings_and_missing_or_wrong_levels_are_refused():
    for wrong in ({"levels": 1}, {"levels": 513}, {"low": 2.0, "high": 2.0}):
        with pytest.raises(ValueError, match=str(next(iter(wrong.values())))):
            GaussianQuantizer(**wrong)
    quantizer = CalibratedQuantizer(2, 1)
    boundaries, values = torch.tensor([[-1.0, 0.0, 1.0]]), torch.tensor([[-0.5, 0.5]])
    for wrong in ((boundaries[0], values), (boundaries, values[:, :1])):
        with pytest.raises(ValueError, match="shape"):
            quantizer.set_levels(*wrong)
    with pytest.raises(ValueError, match="ascending"):
        quantizer.set_levels(boundaries, values.flip(1))
    quantizer, x = CalibratedQuantizer(8, 3), torch.randn(10, 3)
    quantizer.load_state_dict(quantizer.state_dict())  # its empty tables are still none
    for use, of in ((quantizer.encode, x), (quantizer.outside, x), (quantizer.decode, x.long())):
        with pytest.raises(ValueError, match="no levels"):
            use(of)


def test_a_token_holds_its_patch_channel_by_channel_and_so_do_levels():
    """p = 2: a scalar's codebook is its channel's, wherever it lies in the patch."""
    latents = torch.arange(2 * 3 * 4 * 4).reshape(2, 3, 4, 4)
    tokens = patchify(latents, 2)
    assert tokens.shape == (2, 4, 12)
    for row, column in ((0, 0), (0, 1), (1, 0), (1, 1)):
        patch = latents[1, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
        assert torch.equal(tokens[1, 2 * row + column], patch.flatten())
    for patch_size in (1, 2, 4):
        tokens = patchify(latents, patch_size)
        assert torch.equal(unpatchify(tokens, patch_size, 4 // patch_size), latents)

    quantizer, latents = calibrated(), torch.randn(2, 3, 4, 6)
    whole = quantizer.encode(latents.movedim(1, -1)).movedim(-1, 1)
    tokens = patchify(latents, 2)
    assert torch.equal(quantizer.encode(tokens), patchify(whole, 2))
    values = quantizer.decode(whole.movedim(1, -1)).movedim(-1, 1)
    assert torch.equal(quantizer.decode(patchify(whole, 2)), patchify(values, 2))
    assert torch.equal(quantizer.outside(tokens * 3), (tokens * 3).abs() > 4)
