"""What the roofline model supposes of the code: bytes that move, and kernels, counted on it."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.roofline import Rates, Roofline
from models import layers
from models.config import TokenBridgeConfig
from models.masking import Mask, random_orders
from models.tokenbridge import TokenBridge
from models.tokenizers.kl16 import KL16
from tests.test_memory import PRODUCTS, SETTINGS, result_of
from util import flops

USES = ("training", "sampling")
NO_KERNEL = ("detach", "empty", "empty_like", "new_empty", "empty_strided", "_unsafe_view")
CLOSE = (0.85, 1.15)  # times what is counted
# One FLOP/s too many to notice, one byte a second: seconds are bytes.
BYTES = Rates(matrix=1e30, convolution=1e30, memory=1.0)
POSITIONS = 20  # that the head draws, of an image


class Moved(TorchDispatchMode):
    """Kernels, and the bytes of the operands and results of all but the products."""

    def __init__(self):
        super().__init__()
        self.bytes = self.kernels = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = result_of(func, args, kwargs)
        name = func.name().split("::")[1].split(".")[0]
        if func.is_view or name in NO_KERNEL:
            return result
        self.kernels += 1
        if name == "index_copy_":  # a slice of the tensor
            self.bytes += 2 * args[3].nbytes
        elif name not in PRODUCTS:
            tensors = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, Tensor)]
            self.bytes += sum(size(tensor) for tensor in tensors)
        return result


def size(tensor: Tensor) -> int:
    """Bytes; of an expanded tensor those that there are."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


@pytest.fixture(autouse=True)
def fused_attention(monkeypatch):
    """As on a GPU: a CPU computes short attention by its definition."""
    monkeypatch.setattr(layers, "_plain_is_faster", lambda q, drop: False)

    def attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None) -> Tensor:
        mask = None if seen is None else seen[None]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=seen is None)

    monkeypatch.setattr(layers, "short_attention", attend)


def count(config: TokenBridgeConfig, batch: int, precision: str) -> dict[str, Moved]:
    """Of backbone and head: a training step, a pass for sampling."""
    torch.manual_seed(0)
    model = TokenBridge(**config.to_dict(), head_chunk=0).train()
    backbone, head = model.backbone, model.head
    mask = Mask.from_orders(random_orders(batch, config.seq_len, "cpu"), masked(config))
    indices = torch.randint(64, (batch, config.seq_len, config.token_dim))
    inputs = model.quantizer.decode(indices), torch.randn(batch, config.encoder_embed_dim), mask
    rows = torch.randn(batch * masked(config), config.decoder_embed_dim, requires_grad=True)
    drawn = torch.randn(batch * POSITIONS, config.decoder_embed_dim)
    found = {f"{part} {use}": Moved() for part in ("backbone", "head") for use in USES}
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
        with found["backbone training"]:
            z = backbone(*inputs, mask.masked)
        gradient = torch.randn_like(z)
        with found["backbone training"]:
            z.backward(gradient)
        with found["head training"]:
            head.loss(rows, indices[:, : masked(config)].flatten(0, 1)).backward()
        with torch.no_grad(), found["backbone sampling"]:
            model.eval().backbone(*inputs, mask.masked[:, :6])
        with found["head sampling"]:
            head.sample(drawn, torch.rand(len(drawn), config.token_dim))
    return found


def masked(config: TokenBridgeConfig) -> int:
    return math.ceil(0.87 * config.seq_len)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize(
    "changes",
    [{}, dict(encoder_depth=5, buffer_size=32), dict(channel_depth=3, vae_embed_dim=32)],
    ids=["square", "deep backbone", "long head"],
)
def test_bytes_that_move_are_close_to_those_of_the_operations(changes, precision):
    """Of so many images more: the weights, which tiny batches are small beside, fall out."""
    config = TokenBridgeConfig(**SETTINGS | changes)
    few, many = (count(config, batch, precision) for batch in (8, 16))
    roofline = Roofline(config, precision, BYTES, KL16)
    expected = {f"{k} training": v for k, v in moving(roofline, "training").items()}
    expected |= {f"{k} sampling": v for k, v in moving(roofline, "sampling").items()}
    for name, bytes_more in expected.items():
        found = many[name].bytes - few[name].bytes
        assert CLOSE[0] < bytes_more / found < CLOSE[1], (name, bytes_more, found)


def moving(roofline: Roofline, use: str) -> dict[str, float]:
    """Bytes of 8 images more."""
    config = roofline.config
    m = masked(config)
    if use == "training":
        few, many = (roofline.micro_batch(batch, masked=m) for batch in (8, 16))
        return {name: many[name].memory - few[name].memory for name in many}
    work = flops.sampling_iteration(config, m, m - 6, guided=False)
    backbone = [roofline.backbone(batch, m, work, passes=1).memory for batch in (8, 16)]
    head = [roofline.head(batch * POSITIONS).memory for batch in (8, 16)]
    return {"backbone": backbone[1] - backbone[0], "head": head[1] - head[0]}


@pytest.mark.parametrize("changes", [{}, dict(encoder_depth=5), dict(channel_depth=4)])
def test_kernels_are_close_to_those_launched(changes):
    config = TokenBridgeConfig(**SETTINGS | changes)
    found = count(config, 2, "bf16")
    roofline = Roofline(config, "bf16", BYTES, KL16)
    for use in USES:
        expected = roofline.backbone_kernels(use)
        assert CLOSE[0] < expected / found[f"backbone {use}"].kernels < CLOSE[1]
        steps = config.token_dim if use == "sampling" else 1
        expected = steps * roofline.head_kernels(use)
        assert CLOSE[0] < expected / found[f"head {use}"].kernels < CLOSE[1]
