"""VQ-16 against the golden data, and what makes it a tokenizer as any other."""

import pytest
import torch
from torch.nn import functional as F

from models.tokenizers import vq
from models.tokenizers.vq import VQModel
from tests.conftest import GOLDEN, complaint, formula_weight, golden, relative_error
from util.vae import load_vae, save_vae


def small_vq(**changes) -> VQModel:
    torch.manual_seed(0)
    sizes = dict(codebook_size=40, embed_dim=4, z_channels=6, ch_mult=(1, 2), ch=32)
    return VQModel(**sizes | dict(num_res_blocks=1) | changes).eval()


@pytest.fixture(scope="module", params=sorted(path.stem for path in GOLDEN.glob("vq*.npz")))
def published(request) -> tuple[VQModel, dict]:
    """The tokenizer of a golden file, its weights by formula, and the file's arrays."""
    data = golden(request.param)
    model = VQModel(codebook_size=int(data["codebook_size"]))
    named = model.named_parameters()
    model.load_published({name: formula_weight(name, tuple(p.shape)) for name, p in named})
    return model.eval(), data


@torch.no_grad()
def test_encode_and_decode_match_golden(published):
    model, data = published
    z = model.before_quantizer(data["image"])
    assert relative_error(z, data["before_quantizer"]) < 1e-5
    indices, expected = model.indices(data["image"]), data["indices"]
    normalised = F.normalize(data["before_quantizer"], dim=1).movedim(1, -1)
    both = (model.codebook[i] for i in (indices, expected))
    found, best = ((normalised - code).square().sum(-1) for code in both)
    assert indices.dtype == torch.int64 and ((indices == expected) | (found - best < 1e-5)).all()
    same = (indices == expected)[:, None].expand_as(data["quantized"])
    assert same.float().mean() > 0.9
    assert relative_error(model.codes(indices)[same], data["quantized"][same]) < 1e-5
    codes = data["codes"].view(data["indices"].shape)
    assert relative_error(model.decode(model.codes(codes)), data["decoded"]) < 1e-4


@torch.no_grad()
def test_its_posterior_is_the_code_and_any_latents_are_decoded():
    model, images = small_vq(), torch.randn(2, 3, 8, 12)
    assert model.stride == 2 and not model.is_kl16
    codes = model.codes(model.indices(images))
    posterior = model.encode(images)
    assert codes.shape == (2, 4, 4, 6) and torch.equal(posterior.mean, codes)
    assert (posterior.sample() - codes).abs().max() < 2e-6
    assert torch.allclose(model.codebook.norm(dim=1), torch.ones(40))
    assert model.decode(torch.randn(2, 4, 4, 6)).shape == images.shape
    for name, value in (("ch", 48), ("wings", 2)):
        with pytest.raises(ValueError, match=name):
            small_vq(**{name: value})


def test_the_nearest_code_is_that_of_brute_force_and_the_gradient_passes_through(monkeypatch):
    """Also where distances are computed in pieces; the codes themselves get no gradient."""
    monkeypatch.setattr(vq, "ROWS", 7)
    z, codebook = torch.randn(2, 5, 3, 4), torch.randn(11, 4)
    distances = (z[..., None, :] - codebook).square().sum(-1)
    assert torch.equal(vq.nearest(z, codebook), distances.argmin(-1))
    model, z = small_vq(), torch.randn(1, 4, 3, 3, requires_grad=True)
    codes, indices = model.quantize(z)
    weights = torch.randn_like(codes)
    (codes * weights).sum().backward()
    (expected,) = torch.autograd.grad((F.normalize(z, dim=1) * weights).sum(), z)
    assert torch.equal(codes.detach(), model.codes(indices).detach())
    assert torch.allclose(z.grad, expected)
    assert model.quantize.embedding.weight.grad is None


@torch.no_grad()
@pytest.mark.parametrize("form", ["own", "half", "published"])
def test_a_file_is_read_by_its_names(tmp_path, form):
    model, path = small_vq(), tmp_path / "vq.ckpt"
    if form == "published":  # without settings, or the record of the codes that were used
        torch.save({"model": dict(model.named_parameters()), "steps": 3}, path)
    else:
        save_vae(path, model.half() if form == "half" else model)
    found, images = load_vae(path, 4).eval(), torch.rand(1, 3, 8, 8)
    assert isinstance(found, VQModel) and found.config == model.config
    assert torch.equal(found.indices(images), model.float().indices(images))


def test_a_damaged_file_is_one_line(tmp_path):
    for damage, message in (
        (lambda s: s.pop("quant_conv.weight"), "it has no tensor quant_conv.weight"),
        (lambda s: s.pop("decoder.mid.1.q.bias"), "missing (first: decoder.mid.1.q.bias)"),
        (lambda s: s.update({vq.EMBEDDING: torch.zeros(5)}), "weight is (5,), not (5, 4)"),
        (lambda s: s.update({"encoder.conv_in.weight": torch.zeros(48, 3, 3, 3)}), "ch 48"),
        (
            lambda s: s.update({"quantize.more": torch.zeros(1)}),
            "unexpected (first: quantize.more)",
        ),
    ):
        path = tmp_path / "vq.ckpt"
        damage(state := small_vq().state_dict())
        torch.save({"model": state}, path)
        line = complaint(load_vae, path)
        assert line.startswith(f"--vae_path {path}: ") and message in line
