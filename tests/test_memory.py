"""The memory of a training step: exact where it is counted, close where it is estimated."""

import math

import pytest
import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from models.config import TokenBridgeConfig, preset
from models.tokenbridge import TokenBridge
from tests.conftest import golden_json
from util.ema import EMA
from util.memory import FULL, count_parameters, training_memory
from util.optim import build_optimizer

# Wide enough that activations, not small change, fill the memory. Without dropout: the CPU's masks
# have four bytes, and there attention with dropout is not fused.
SETTINGS = {
    **dict(img_size=128, vae_stride=16, class_num=10, buffer_size=16, quant_levels=64),
    **dict(encoder_embed_dim=128, encoder_depth=3, encoder_num_heads=4),
    **dict(decoder_embed_dim=128, decoder_depth=4, decoder_num_heads=4),
    **dict(channel_embed_dim=128, channel_depth=2, channel_heads=2),
    **dict(attn_dropout=0.0, proj_dropout=0.0),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CLOSE = (0.9, 1.2)  # times what is measured


PRODUCTS = ("mm", "addmm", "bmm", "baddbmm")


def result_of(func: OpOverload, args: tuple, kwargs: dict | None):
    """Of a matrix product zeros: bf16 takes a CPU long, and what is counted are bytes."""
    if func.overloadpacket.__name__ not in PRODUCTS:
        return func(*args, **kwargs or {})
    a, b = args[-2:]
    return a.new_zeros(*a.shape[:-1], b.shape[-1])


class Alive(TorchDispatchMode):
    """The most bytes alive at once, of all storages that operations make but the known ones."""

    def __init__(self, known: list[Tensor]):
        super().__init__()
        self.known = {self.place(tensor) for tensor in known}
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self.bound = self.most = 0

    @staticmethod
    def place(tensor: Tensor) -> int:
        return tensor.untyped_storage().data_ptr()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = result_of(func, args, kwargs)
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and self.place(tensor) not in self.known:
                storage = tensor.untyped_storage()
                held = self.storages.get(storage.data_ptr())
                if held is None or held[0].expired():
                    self.bound += storage.nbytes()
                self.storages[storage.data_ptr()] = StorageWeakRef(storage), storage.nbytes()
        if self.bound > self.most:  # perhaps: leave out what has died meanwhile
            found = self.storages.items()
            self.storages = {place: held for place, held in found if not held[0].expired()}
            self.bound = sum(size for _, size in self.storages.values())
            self.most = max(self.most, self.bound)
        return result


def most_alive(
    config: TokenBridgeConfig, batch: int, precision: str, ratio: float, **settings
) -> int:
    """Of a step beside parameters and gradients, which a step before has already made."""
    model = TokenBridge(**config.to_dict(), **settings).train()
    parameters = list(model.parameters())
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    latents = torch.randn(batch, *config.latent_shape)
    mask = torch.ones(batch, config.seq_len, dtype=torch.bool)
    mask[:, math.ceil(ratio * config.seq_len) :] = False
    alive = Alive([*parameters, *(p.grad for p in parameters)])
    dtype = DTYPES[precision]
    with alive:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = model(latents, torch.zeros(batch).long(), mask)
        loss.backward()
    return alive.most


@pytest.mark.parametrize("grad_checkpointing", [False, True])
@pytest.mark.parametrize("head_chunk", [64, 1000])
@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize(
    "changes",
    [{}, dict(encoder_depth=5, buffer_size=32), dict(channel_depth=3, channel_embed_dim=160)],
    ids=["square", "deep backbone", "wide head"],
)
def test_estimate_is_close_to_what_is_alive(changes, precision, head_chunk, grad_checkpointing):
    config = TokenBridgeConfig(**SETTINGS | changes)
    kept = dict(grad_checkpointing=grad_checkpointing, head_chunk=head_chunk)
    found = max(most_alive(config, 4, precision, ratio, **kept) for ratio in (0.7, 1.0))
    expected = training_memory(config, 4, precision, **kept)
    estimate = expected.casts + expected.backbone + expected.head
    assert CLOSE[0] < estimate / found < CLOSE[1], (estimate, found)


@pytest.mark.parametrize("name", ["tokenbridge_base", "tokenbridge_large", "tokenbridge_huge"])
def test_published_sizes_have_their_parameters(name):
    expected = {"base": 218_024_704, "large": 486_889_472, "huge": 910_040_576}
    config = TokenBridgeConfig(**preset(name))
    assert count_parameters(config).total == expected[name.split("_")[1]]


def test_weights_optimizer_and_ema_are_exact():
    model = TokenBridge(**golden_json("config")["config"])
    optimizer = build_optimizer(model.published_parameters(), 1e-3, 0.02)
    ema = EMA(model.published_parameters(), 0.9)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    found = training_memory(model.config, 1, "fp32")
    parameters = list(model.parameters())
    assert found.parameters == found.gradients == sum(p.nbytes for p in parameters)
    assert found.ema == sum(average.nbytes for average in ema.averages)
    moments = [
        state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")
    ]
    assert found.optimizer == sum(moment.nbytes for moment in moments)
    assert found.casts == 0 and found.total > 5 * FULL * count_parameters(model.config).total


def test_chunks_bound_the_heads_part():
    """Which is by far the largest part without them."""
    config = TokenBridgeConfig(**preset("tokenbridge_large"))
    chunked, whole = (training_memory(config, 64, head_chunk=chunk) for chunk in (None, 0))
    assert training_memory(config, 128).head == chunked.head
    assert whole.head > 10 * chunked.head and whole.backbone == chunked.backbone


def test_checkpointing_keeps_less():
    config = TokenBridgeConfig(**preset("tokenbridge_base"))
    plain = training_memory(config, 8)
    checkpointed = training_memory(config, 8, grad_checkpointing=True)
    assert checkpointed.backbone < plain.backbone / 3 and checkpointed.head < plain.head
