"""KL-16 against the golden data, and the family's invariants."""

import math

import pytest
import torch
from torchvision.transforms.functional import to_tensor

from benchmarks import correctness
from models.tokenizers import kl16 as vae_module
from models.tokenizers.kl16 import AutoencoderKL, Posterior
from models.tokenizers.tokenizer import Tokenizer, from_uint8
from tests.conftest import relative_error


def small_vae(**changes):
    torch.manual_seed(0)
    return AutoencoderKL(**dict(embed_dim=4, ch_mult=(1, 1), ch=32, num_res_blocks=1) | changes)


@torch.no_grad()
def test_encoding_and_decoding_match_golden_and_samples_have_their_mean_and_std():
    assert correctness.vae(torch.device("cpu")) < 1e-5
    parameters = torch.tensor([3.0, -2.0]).view(1, 2, 1, 1).expand(1, 2, 64, 64)
    sample = Posterior(parameters).sample(torch.Generator().manual_seed(0))
    assert sample.mean() == pytest.approx(3.0, abs=0.03)
    assert sample.std() == pytest.approx(math.exp(-1.0), rel=0.03)
    assert Posterior(torch.full((1, 2, 1, 1), 1e4)).std.item() == pytest.approx(math.exp(10.0))


@torch.no_grad()
def test_a_small_vae_has_another_stride_and_what_does_not_fit_is_refused():
    vae = small_vae(ch_mult=(1, 2, 2, 2))
    assert vae.stride == 8 and not vae.is_kl16
    posterior = vae.encode(torch.randn(2, 3, 32, 24))
    assert posterior.mean.shape == (2, 4, 4, 3)
    assert vae.decode(posterior.mean).shape == (2, 3, 32, 24)
    with pytest.raises(ValueError, match="stride 8"):
        vae.encode(torch.randn(2, 3, 30, 24))
    state = vae.state_dict()
    state.pop("quant_conv.bias")
    with pytest.raises(ValueError, match=r"quant_conv\.bias"):
        vae.load_published(state)
    for name, value in (("ch", 48), ("wings", 2)):
        with pytest.raises(ValueError, match=name):
            small_vae(**{name: value})


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_neither_layout_nor_overwriting_changes_what_comes_out(monkeypatch, layout):
    vae = small_vae(ch_mult=(1, 2), num_res_blocks=2).eval()
    images = torch.randn(2, 3, 16, 24)
    kept = images.clone()
    with torch.no_grad():
        posterior = vae.encode(images.contiguous(memory_format=layout))
        decoded = vae.decode(posterior.mean)
    assert posterior.parameters.is_contiguous() and decoded.is_contiguous()
    assert torch.equal(images, kept)
    with_gradients = vae.encode(images)
    assert relative_error(with_gradients.parameters.detach(), posterior.parameters) < 1e-5
    assert relative_error(vae.decode(with_gradients.mean).detach(), decoded) < 1e-5
    monkeypatch.setattr(vae_module, "fastest_layout", lambda x: x)
    assert relative_error(vae.encode(images).parameters.detach(), posterior.parameters) < 1e-5
    assert relative_error(vae.decode(posterior.mean).detach(), decoded) < 1e-5


@torch.no_grad()
def test_a_frozen_tokenizer_scales_latents_and_takes_bytes_as_torchvision_does():
    values = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(2, 3, -1, -1)
    expected = torch.stack([to_tensor(v.permute(1, 2, 0).numpy()) for v in values]) * 2 - 1
    assert torch.equal(from_uint8(values), expected)
    tokenizer, generator = Tokenizer(small_vae(), 0.25).train(), torch.Generator()
    found, posterior = (tokenizer.posterior(x) for x in (values, expected))
    assert torch.equal(found.parameters, posterior.parameters)
    latents = posterior.sample(generator.manual_seed(1)) * 0.25
    assert torch.equal(tokenizer.encode(values, generator.manual_seed(1)), latents)
    again = tokenizer.from_moments(found.parameters, generator.manual_seed(1))
    assert torch.equal(again, latents)
    decoded = tokenizer.vae.decode(latents / 0.25).clamp(-1, 1)
    assert torch.equal(tokenizer.decode(latents), decoded)
    assert not tokenizer.vae.training
    assert not any(p.requires_grad for p in tokenizer.parameters())
