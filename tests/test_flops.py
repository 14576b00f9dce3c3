"""Operations are those of torch's counter on the modules; memory is that of real steps."""

import math
from collections import Counter

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.cost import training_memory
from benchmarks.works import vae_operations
from models.config import TokenBridgeConfig, preset
from models.masking import Mask, random_orders
from models.sampler import sample_latents
from models.tokenbridge import TokenBridge
from models.tokenizers.kl16 import KL16, AutoencoderKL
from tests.conftest import tiny_model
from util import flops

VARIANTS = {
    "patches": dict(img_size=32, vae_embed_dim=2, patch_size=2, channel_order=(1, 0)),
    "other sizes": {
        **dict(decoder_embed_dim=24, channel_embed_dim=8, encoder_depth=2, mlp_ratio=3.0),
        **dict(decoder_depth=3, channel_depth=1, quant_levels=16, buffer_size=5, img_size=24),
    },
}


def counted(compute) -> int:
    """Attention written out: the CPU's fused kernel has no formula."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        compute()
    return counter.get_total_flops()


@pytest.fixture(params=VARIANTS)
def model(request) -> TokenBridge:
    return tiny_model(**VARIANTS[request.param])


def test_backbone_and_head(model):
    config, batch, masked, predicted = model.config, 2, 11, 5
    values = torch.randn(batch, config.seq_len, config.token_dim)
    classes = model.backbone.class_embedding(torch.zeros(batch, dtype=torch.long), batch)
    mask = Mask.from_orders(random_orders(batch, config.seq_len, "cpu"), masked)
    found = counted(lambda: model.backbone(values, classes, mask, mask.masked[:, :predicted]))
    assert found == batch * flops.backbone(config, config.seq_len - masked, predicted)
    z = torch.randn(masked, config.decoder_embed_dim)
    uniforms = torch.rand(masked, config.token_dim)
    found = counted(lambda: model.head.sample(z, uniforms))
    assert found == masked * flops.head(config, sampled=True)


@pytest.mark.parametrize("head_chunk", [0, 7])
def test_training_step(model, head_chunk):
    config = dict(model.config.to_dict(), attn_dropout=0.0)  # a CPU then attends a second time
    model = TokenBridge(**config, head_chunk=head_chunk)
    batch, length = 3, model.config.seq_len
    mask = (torch.arange(length) < 12).expand(batch, -1)
    latents, labels = torch.randn(batch, *model.config.latent_shape), torch.zeros(batch).long()
    found = counted(lambda: model(latents, labels, mask).backward())
    assert found == batch * flops.training_step(model.config, 12)


@pytest.mark.parametrize(("num_iter", "cfg"), [(1, 1.0), (40, 2.0)])
def test_sampling_passes_over_iterations_without_positions(model, num_iter, cfg):
    labels = torch.tensor([0, 1])
    found = counted(lambda: sample_latents(model, labels, num_iter=num_iter, cfg=cfg))
    assert found == 2 * flops.sampling(model.config, num_iter, guided=cfg != 1)


def test_vae_without_memory_is_counted_as_a_real_one():
    vae = KL16 | {"ch": 32}
    model, expected = AutoencoderKL(**vae).eval(), vae_operations(32, **vae)
    with torch.no_grad():
        latents = model.encode(torch.randn(2, 3, 32, 32)).mean
        assert counted(lambda: model.decode(latents)) == 2 * expected["decode"]
        assert counted(lambda: model.encode(torch.randn(2, 3, 32, 32))) == 2 * expected["encode"]


def test_mean_step_is_the_mean_over_the_draws_of_the_mask():
    config, draws = tiny_model().config, 20_000
    length, ratios = config.seq_len, config.mask_ratios
    counts = ratios.counts(length)
    drawn = Counter(math.ceil(length * ratios.draw()) for _ in range(draws))
    assert set(drawn) == {m for m, _ in counts} and sum(p for _, p in counts) == pytest.approx(1)
    for m, p in counts:
        assert drawn[m] / draws == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / draws))
    mean = sum(p * flops.training_step(config, m) for m, p in counts)
    assert flops.training_step(config) == pytest.approx(mean)
    large = TokenBridgeConfig(**preset("tokenbridge_large"))
    state = torch.get_rng_state()
    assert flops.training_step(large) == pytest.approx(2183265669243.0432, rel=1e-12)
    assert flops.sampling(large, 256, guided=True) == 107508182024192
    assert torch.equal(torch.get_rng_state(), state)  # which counting leaves as it is


# Wide enough that activations, not small change, fill the memory. Without dropout: the CPU's masks
# have four bytes, and there attention with dropout is not fused.
WIDE = {
    **dict(img_size=128, vae_stride=16, class_num=10, buffer_size=16, quant_levels=64),
    **dict(encoder_embed_dim=128, encoder_depth=3, encoder_num_heads=4),
    **dict(decoder_embed_dim=128, decoder_depth=4, decoder_num_heads=4),
    **dict(channel_embed_dim=128, channel_depth=2, channel_heads=2),
    **dict(attn_dropout=0.0, proj_dropout=0.0),
}


class Alive(TorchDispatchMode):
    """The most bytes alive at once, of all storages that operations make but the known ones."""

    def __init__(self, known: list[Tensor]):
        super().__init__()
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self.bound = self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in ("mm", "addmm", "bmm", "baddbmm"):
            a, b = args[-2:]  # zeros will do: bf16 takes a CPU long, and what is counted are bytes
            result = a.new_zeros(*a.shape[:-1], b.shape[-1])
        else:
            result = func(*args, **kwargs or {})
        for tensor in tree_leaves(result):
            storage = tensor.untyped_storage() if isinstance(tensor, Tensor) else None
            if storage is not None and storage.data_ptr() not in self.known:
                held = self.storages.get(storage.data_ptr())
                if held is None or held[0].expired():
                    self.bound += storage.nbytes()
                self.storages[storage.data_ptr()] = StorageWeakRef(storage), storage.nbytes()
        if self.bound > self.most:  # perhaps: leave out what has died meanwhile
            held = self.storages.items()
            self.storages = {place: x for place, x in held if not x[0].expired()}
            self.bound = sum(size for _, size in self.storages.values())
            self.most = max(self.most, self.bound)
        return result


def most_alive(model: TokenBridge, batch: int, precision: str, ratio: float) -> int:
    """Of a step beside parameters and gradients, which a step before has already made."""
    config, parameters = model.config, list(model.parameters())
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    mask = torch.arange(config.seq_len) < math.ceil(ratio * config.seq_len)
    latents, labels = torch.randn(batch, *config.latent_shape), torch.zeros(batch).long()
    with Alive([*parameters, *(p.grad for p in parameters)]) as alive:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
            loss = model(latents, labels, mask.expand(batch, -1))
        loss.backward()
    return alive.most


@pytest.mark.parametrize("grad_checkpointing", [False, True])
@pytest.mark.parametrize(("precision", "head_chunk"), [("fp32", 64), ("bf16", 64), ("bf16", 1000)])
def test_estimate_is_close_to_what_is_alive(precision, head_chunk, grad_checkpointing):
    """The states exactly: weights, gradients, both moments, averages."""
    settings = dict(grad_checkpointing=grad_checkpointing, head_chunk=head_chunk)
    model = TokenBridge(**WIDE, **settings).train()
    found = max(most_alive(model, 4, precision, ratio) for ratio in (0.7, 1.0))
    memory = training_memory(model, 4, precision)
    assert 0.9 < (sum(memory.values()) - memory["states"]) / found < 1.2
    assert memory["states"] == 5 * sum(p.nbytes for p in model.parameters())
