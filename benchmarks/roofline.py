"""How long training and sampling take on devices that are not at hand: a small roofline model.

Products of matrices run at one rate, all other operations at the rate at which their operands pass
through memory, one after the other. A product with fewer rows than its weights are worth waits for
these to be read; a part that is over before its kernels are launched waits for the launches;
gradients are summed while the backbone's backward runs. FLOPs are those of util/flops.py. Bytes are
those kept for backward (util/memory.py) times how often they move, which tests/test_roofline.py
counts on the code, as it does the kernels. Left out: waiting for data, saving, evaluating, and that
a device lowers its clock under load.
Letters: T channels of a token, D width, a bytes of an activation.
"""

import math
from dataclasses import dataclass, fields

from models.config import TokenBridgeConfig
from models.masking import mask_schedule, masked_counts
from util import flops
from util.memory import (
    ACTIVATION,
    FULL,
    Parameters,
    backbone_bytes,
    chunk_positions,
    count_parameters,
    head_bytes,
)

# Bytes that operations other than products move for each byte kept: (backbone, head), eager torch.
MOVED_IN_TRAINING = {"bf16": (7.4, 6.5), "fp16": (7.4, 6.5), "fp32": (5.3, 5.2)}
MOVED_IN_SAMPLING = {"bf16": (1.9, 2.2), "fp16": (1.9, 2.2), "fp32": (1.3, 1.7)}
# Kernels, eager: of a block, and of all else around the blocks. The head's are of one chunk in
# training, of one channel in sampling.
BACKBONE_KERNELS = {"training": (52, 72), "sampling": (12, 27)}
HEAD_KERNELS = {"training": (94, 125), "sampling": (29, 22)}
# Numbers read or written for a parameter: AdamW 7, EMA 3, clipping 3.
UPDATE_BYTES = 13 * FULL
BACKWARD = 2 / 3  # share of a training step's products


@dataclass(frozen=True)
class Rates:
    """What a device does in a second, all shares of data sheets applied.

    matrix, convolution: FLOP/s, the latter of the VAE in fp32. memory: bytes. link: bytes to the
    other devices of its node, network: bytes that a node sends to the others. launch: seconds that
    a kernel costs at least. fusion: share of the bytes that still move; 1 is eager torch.
    """

    matrix: float
    convolution: float
    memory: float
    link: float = math.inf
    network: float = math.inf
    launch: float = 0.0
    fusion: float = 1.0


@dataclass(frozen=True)
class Seconds:
    """One after the other: products; operands of all else, and weights that products wait for;
    waiting for launches; waiting for the gradients of other devices."""

    matrix: float = 0.0
    memory: float = 0.0
    launch: float = 0.0
    exchange: float = 0.0

    @property
    def total(self) -> float:
        return sum(getattr(self, field.name) for field in fields(self))

    @property
    def bound(self) -> str:
        """The name of the largest."""
        return max((field.name for field in fields(self)), key=lambda name: getattr(self, name))

    def __add__(self, other: "Seconds") -> "Seconds":
        return Seconds(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def __rmul__(self, times: float) -> "Seconds":
        return Seconds(*(times * getattr(self, field.name) for field in fields(self)))


@dataclass(frozen=True)
class Roofline:
    """One device. precision: bf16, fp16 or fp32. vae: its settings. device_type: torch's name."""

    config: TokenBridgeConfig
    precision: str
    rates: Rates
    vae: dict
    device_type: str = "cuda"

    @property
    def parameters(self) -> Parameters:
        return count_parameters(self.config)

    @property
    def a(self) -> int:
        return ACTIVATION[self.precision]

    @property
    def masked(self) -> float:
        """Masked positions of an image in training, the mean."""
        return sum(m * p for m, p in masked_counts(self.config.seq_len, self.config.mask_ratio_min))

    # --- training

    def micro_batch(
        self, batch: int, grad_checkpointing: bool = False, masked: int | None = None
    ) -> dict[str, Seconds]:
        """Forward and backward of so many images: backbone and head. masked: None is the mean."""
        work = flops.training_step(self.config, masked, grad_checkpointing)
        masked = self.masked if masked is None else masked
        chunks = self._chunks(batch * masked)
        times = batch * self.rates.fusion * (4 / 3 if grad_checkpointing else 1)
        backbone, head = (times * moved for moved in MOVED_IN_TRAINING[self.precision])
        backbone *= backbone_bytes(self.config, masked, self.a)
        head *= masked * head_bytes(self.config, self.a)
        # A chunk's gradients of the weights are added to those of the chunks before.
        head += chunks * 3 * FULL * self.parameters.head
        products = batch * (work.encoder.total + work.decoder.total)
        return {
            "backbone": self._part(products, backbone, self.backbone_kernels("training")),
            "head": self._part(
                batch * work.head.total, head, chunks * self.head_kernels("training")
            ),
        }

    def update(self) -> Seconds:
        """Clipping, AdamW, EMA, and the copies of the weights that autocast makes."""
        parameters = self.parameters
        count = UPDATE_BYTES * parameters.total
        if self.a < FULL:
            count += (FULL + self.a) * parameters.multiplied
        return Seconds(memory=count / self.rates.memory)

    def exchange(self, devices: int, nodes: int, backbone: Seconds) -> Seconds:
        """What is left of summing fp32 gradients once the backbone's backward is over.

        devices: of a node. A ring through all of them: every device, and every node, sends almost
        twice what there is.
        """
        size = devices * nodes
        sent = 2 * (size - 1) / size * FULL * self.parameters.total
        speeds = [self.rates.link] if devices > 1 else []
        speeds += [self.rates.network] if nodes > 1 else []
        taken = sent / min(speeds) if speeds else 0.0
        return Seconds(exchange=max(0.0, taken - BACKWARD * backbone.total))

    def encode(self, images: float) -> Seconds:
        count = flops.vae_encode(self.vae, self.config.img_size)
        return Seconds(matrix=images * count / self.rates.convolution)

    # --- sampling

    def sampling(self, batch: int, num_iter: int, guided: bool) -> dict[str, Seconds]:
        """Of a batch of images: backbone, head and VAE."""
        found = {"backbone": Seconds(), "head": Seconds()}
        for before, after, _ in mask_schedule(self.config.seq_len, num_iter):
            if before > after:
                work = flops.sampling_iteration(self.config, before, after, guided)
                found["backbone"] += self.backbone(batch, before, work, 2 if guided else 1)
                found["head"] += self.head(batch * (before - after))
        decode = batch * flops.vae_decode(self.vae, self.config.img_size)
        return found | {"VAE": Seconds(matrix=decode / self.rates.convolution)}

    def backbone(self, batch: int, masked: int, work: flops.ModelFlops, passes: int) -> Seconds:
        """One pass. masked: before it."""
        kept = batch * passes * backbone_bytes(self.config, masked, self.a)
        moved = MOVED_IN_SAMPLING[self.precision][0] * kept
        weights = self.a * (self.parameters.backbone - self.parameters.backbone_tables)
        return self._part(
            batch * (work.encoder.total + work.decoder.total),
            moved * self.rates.fusion,
            self.backbone_kernels("sampling"),
            weights,
        )

    def head(self, positions: int) -> Seconds:
        """All channels of so many positions, in T short steps, each of which reads the weights."""
        config, chunks = self.config, self._chunks(positions)
        width, steps = config.channel_embed_dim, config.token_dim
        joined = (6 * config.channel_depth + 2) * width**2  # one product, of weights put together
        weights = steps * self.a * (self.parameters.head - self.parameters.head_tables - joined)
        weights += joined * (3 * FULL + 2 * self.a)
        caches = config.channel_depth * steps * (2 * steps * width * self.a)  # keys and values
        moved = MOVED_IN_SAMPLING[self.precision][1] * head_bytes(config, self.a)
        return self._part(
            flops.head_sampling(config, positions).total,
            positions * (moved * self.rates.fusion + caches),
            chunks * steps * self.head_kernels("sampling"),
            chunks * weights,
        )

    # --- both

    def _part(self, operations: float, moved: float, kernels: float, weights: float = 0) -> Seconds:
        products = operations / self.rates.matrix
        waiting = max(0.0, weights / self.rates.memory - products)
        found = Seconds(matrix=products, memory=waiting + moved / self.rates.memory)
        return found + Seconds(launch=max(0.0, kernels * self.rates.launch - found.total))

    def _chunks(self, positions: float) -> int:
        return math.ceil(positions / chunk_positions(self.config, None, self.device_type))

    def backbone_kernels(self, use: str) -> int:
        block, rest = BACKBONE_KERNELS[use]
        return (self.config.encoder_depth + self.config.decoder_depth) * block + rest

    def head_kernels(self, use: str) -> int:
        block, rest = HEAD_KERNELS[use]
        return self.config.channel_depth * block + rest
