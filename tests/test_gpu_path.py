"""What a GPU would run, on tensors that claim to be on one: torch's FakeTensorMode, without CUDA.

A tensor that was left on the CPU, a value that the host would wait for (`.item()`, a boolean,
`nonzero`) and a shape that depends on data are errors there. What the host reads before the loop of
iterations, the labels' check and the mask ratio, stands aside here. Autograd refuses fake CUDA
tensors without a driver, so backward passes are checked on the meta device.
"""

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from models import masking, sampler
from models.config import HEADS
from models.sampler import sample_latents
from models.tokenbridge import TokenBridge
from models.tokenizers.kl16 import AutoencoderKL
from models.tokenizers.tokenizer import Tokenizer
from tests.conftest import tiny_model
from util.device import CapturedCalls, accelerate, resolve_precision
from util.errors import UserError
from util.optim import EMA, build_averages
from util.validation import read_latents

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
        for held in (module._parameters, module._buffers):
            held |= {name: x.to("cuda") for name, x in held.items() if x is not None}
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
        cached = [(torch.zeros(8, 4, 4), 1)]
        latents, _ = read_latents(cached, [0], tokenizer, torch.device("cuda"))
        assert latents.device.type == "cpu"  # as validation keeps them


def test_what_a_gpu_would_wait_for_is_seen(monkeypatch):
    """The labels' check reads them; a buffer on the CPU is of another device."""
    monkeypatch.undo()
    with FakeTensorMode(), torch.no_grad():
        model = on_gpu(build("channel")).eval()
        _, labels = batch(model, "cuda")
        with pytest.raises(DataDependentOutputException):
            sample_latents(model, labels, num_iter=2)
        model.backbone._parameters["mask_token"] = model.backbone.mask_token.cpu()
        with pytest.raises(RuntimeError, match="device"):
            sample_latents(model, None, batch_size=2, num_iter=2)


class Recorded(TorchDispatchMode):
    """Stands in for a CUDA graph: repeats the operations that it saw, into the same tensors."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        for func, args, kwargs, out in self.calls:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                old.copy_(new)


def test_captured_calls_draw_as_the_plain_ones(monkeypatch):
    """For every size and for averaged weights anew, and never from what another call was given."""
    stand_ins = {
        **dict(CUDAGraph=Recorded, graph=lambda graph, **how: graph, Stream=lambda: None),
        **dict(stream=nullcontext, synchronize=lambda: None, graph_pool_handle=lambda: (0, 0)),
    }
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    head, found = build("channel").head.eval(), []
    plain, captured = head.sample_rows, CapturedCalls(head.sample_rows)
    given = [(torch.randn(m, 16), torch.rand(m, head.draws)) for m in (5, 5, 3, 5)]
    with torch.no_grad():
        for z, uniforms in given:
            found.append(captured(z, uniforms, 0.7, head_input="trained"))
            assert all(map(torch.equal, found[-1], plain(z, uniforms, 0.7)))
        assert len(captured.graphs) == 2 and not torch.equal(found[0][0], found[1][0])
        EMA(head.named_parameters(), 0.5)._swap()
        for parameter in head.parameters():
            parameter.mul_(1.5)
        drawn, _ = captured(*given[0], 0.7, head_input="trained")
        assert len(captured.graphs) == 3 and torch.equal(drawn, plain(*given[0], 0.7)[0])


def test_what_only_cuda_has_is_refused_elsewhere_and_tf32_is_named():
    cpu = torch.device("cpu")
    with pytest.raises(UserError, match="--cuda_graphs is of the channel head on cuda, not of"):
        accelerate(build("channel"), cpu, compiled=False, graphs=True)
    assert resolve_precision("fp32", cpu, tf32=True).name == "tf32"
    assert torch.backends.cuda.matmul.allow_tf32 and torch.backends.cudnn.benchmark
    assert resolve_precision("bf16", cpu, tf32=True).name == "bf16"
    assert resolve_precision("fp32", cpu).name == "fp32"
    assert not torch.backends.cuda.matmul.allow_tf32


def test_averages_are_the_same_by_few_launches_as_one_by_one():
    model = tiny_model()
    one_by_one, few = (EMA(model.named_parameters(), 0.9) for _ in range(2))
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter))
    one_by_one.update()
    few.change(torch.tensor(1 - 0.9))
    torch.testing.assert_close(few.averages, one_by_one.averages)
