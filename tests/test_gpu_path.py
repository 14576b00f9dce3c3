"""What a GPU would run, on tensors that claim to be on one: torch's FakeTensorMode, without CUDA.

A tensor that was left on the CPU, a value that the host would wait for (`.item()`, a boolean,
`nonzero`) and a shape that depends on data are errors there. What the host reads before the loop of
iterations, the labels' check and the mask ratio, stands aside here. Autograd refuses fake CUDA
tensors without a driver, so backward passes are checked on the meta device.
"""

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from models import masking, sampler
from models.config import HEADS
from models.sampler import sample_latents
from models.tokenbridge import TokenBridge
from models.tokenizers.kl16 import AutoencoderKL
from models.tokenizers.tokenizer import Tokenizer
from tests.conftest import tiny_model
from util.optim import build_averages

SETTINGS = {"diffusion": dict(diffloss_d=1, diffloss_w=32, num_sampling_steps=4)}
WAYS = {
    "plain": {},
    "without guidance": dict(cfg=1.0),
    "interval": dict(cfg_schedule="constant", cfg_interval=(0.2, 0.6), mask_schedule="exp"),
    "raster": dict(order="raster", cfg_schedule="cosine"),
    "confidence": dict(order="confidence"),
    "token cache": dict(token_cache=2),
}
CONTINUOUS = ("mixture", "diffusion")  # which have no probabilities to be confident of
PAIRS = [(h, w) for h in HEADS for w in WAYS if w != "confidence" or h not in CONTINUOUS]


@pytest.fixture(autouse=True)
def read_before(monkeypatch):
    monkeypatch.setattr(sampler, "check_labels", lambda labels, classes: None)
    monkeypatch.setattr(masking.MaskRatios, "draw", lambda ratios: 0.8)


def build(head: str) -> TokenBridge:
    return tiny_model(head=head, **SETTINGS.get(head, {}))


def on_gpu(model: nn.Module) -> nn.Module:
    """As model.to("cuda"), which cannot exchange fake parameters."""
    for module in model.modules():
        for name, tensor in module._parameters.items():
            if tensor is not None:
                moved = tensor.detach().to("cuda")
                module._parameters[name] = nn.Parameter(moved, requires_grad=False)
        for name, tensor in module._buffers.items():
            module._buffers[name] = None if tensor is None else tensor.to("cuda")
    return model


def batch(model: TokenBridge, device: str) -> tuple[Tensor, Tensor]:
    latents = torch.randn(2, *model.config.latent_shape, device=device)
    return latents, torch.zeros(2, dtype=torch.long, device=device)


@pytest.mark.parametrize(("head", "way"), PAIRS)
def test_sampling_stays_on_the_device(head, way):
    options = dict(num_iter=4, cfg=2.0) | WAYS[way]
    with FakeTensorMode(), torch.no_grad():
        model = on_gpu(build(head)).eval()
        latents, labels = batch(model, "cuda")
        found = sample_latents(model, labels, **options)
        assert (found.device.type, found.shape) == ("cuda", latents.shape)


@pytest.mark.parametrize("head", HEADS)
def test_a_step_stays_on_the_device(head):
    with FakeTensorMode(), torch.no_grad():
        model = on_gpu(build(head)).train()
        loss = model(*batch(model, "cuda"))
        assert (loss.device.type, loss.shape) == ("cuda", ())
        skipped = torch.zeros((), device="cuda")
        for average in build_averages(model.published_parameters(), [0.9, 0.99], True).values():
            average.update(skipped, step=3)


# A codebook's search switches autocast off, which torch has no meta device for.
@pytest.mark.parametrize("head", [head for head in HEADS if head != "codebook"])
def test_backward_knows_all_shapes_beforehand(head):
    model = build(head).to("meta").train()
    model(*batch(model, "meta")).backward()
    without = [name for name, p in model.named_parameters() if p.grad is None]
    assert len(without) < len(list(model.parameters())) / 4, without


def test_the_vae_stays_on_the_device():
    with FakeTensorMode(), torch.no_grad():
        vae = AutoencoderKL(embed_dim=4, ch_mult=(1, 1, 1), ch=32, num_res_blocks=1)
        tokenizer = on_gpu(Tokenizer(vae, 0.5, [0.0] * 4, [1.0] * 4))
        latents = tokenizer.encode(torch.randn(2, 3, 16, 16, device="cuda"))
        assert tokenizer.decode(latents).device.type == "cuda"


def test_what_a_gpu_would_wait_for_is_seen(monkeypatch):
    """The labels' check reads them; a buffer on the CPU is of another device."""
    monkeypatch.undo()
    with FakeTensorMode(), torch.no_grad():
        model = on_gpu(build("channel")).eval()
        _, labels = batch(model, "cuda")
        with pytest.raises(DataDependentOutputException):
            sample_latents(model, labels, num_iter=2)
        model.backbone.mask_token = nn.Parameter(model.backbone.mask_token.cpu(), False)
        with pytest.raises(RuntimeError, match="device"):
            sample_latents(model, None, batch_size=2, num_iter=2)
