"""What training and sampling cost on GPUs: from sizes and rates to hours.

The arithmetic is counted (util/flops.py), the memory traffic estimated (benchmarks/roofline.py);
both are divided by rates, of which each says where it comes from.
"""

import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median

from benchmarks.render import read
from benchmarks.roofline import Rates, Roofline, Seconds
from models.config import TokenBridgeConfig, preset
from models.tokenizers.kl16 import KL16
from util import flops
from util.errors import UserError, as_user_error
from util.hardware import HARDWARE, find_hardware, readable
from util.memory import training_memory
from util.vae import diffusers_folder

PUBLISHED_EPOCHS = {"tokenbridge_huge": 800}  # all others 400
BATCH = 64  # images of a device at once, if they fit
USABLE = 0.9  # of a device's memory: the rest is the context's and the allocator's
MATRIX_SHARE, MEMORY_SHARE = 0.6, 0.8
BOUNDS = {
    "matrix": "matrix arithmetic",
    "memory": "memory bandwidth",
    "launch": "launch latency",
    "exchange": "gradient exchange",
}


@dataclass(frozen=True)
class Setup:
    """All that a cost depends on: the flags of benchmarks/cost.py.

    None: chosen by the model, by what fits (`batch_of`), or by where the rates come from.
    """

    model: str = "tokenbridge_large"
    img_size: int = 256
    vae_stride: int = 16
    vae_embed_dim: int = 16
    vae_path: Path | None = None
    quant_bits: int = 6
    epochs: int | None = None
    images: int = 1_281_167
    global_batch: int = 2048
    batch_size: int | None = None
    grad_checkpointing: bool = False
    encode: bool = False
    num_images: int = 50_000
    num_iter: int = 256
    cfg: float = 3.1
    eval_bsz: int = 256
    hardware: str = "H100"
    devices: int = 8
    nodes: int = 1
    network: float = 400.0
    precision: str = "bf16"
    matrix_share: float | None = None
    memory_share: float | None = None
    link_share: float = 0.8
    launch: float = 5.0
    fusion: float = 1.0
    rates: Path | None = None

    @property
    def processes(self) -> int:
        return self.devices * self.nodes

    @property
    def trained_epochs(self) -> int:
        return self.epochs or PUBLISHED_EPOCHS.get(self.model, 400)

    @property
    def config(self) -> TokenBridgeConfig:
        """Raises UserError if the sizes do not fit together."""
        names = ("img_size", "vae_stride", "vae_embed_dim")
        sizes = {name: getattr(self, name) for name in names}
        with as_user_error():
            return TokenBridgeConfig(**preset(self.model), **sizes, quant_levels=2**self.quant_bits)

    @property
    def vae(self) -> dict:
        """The settings of --vae_path, which decides stride and channels; or KL-16's form.

        KL-16 with so many channels, and with more or fewer levels for another stride.
        """
        if self.vae_path is not None:
            return diffusers_settings(self.vae_path)
        last = int(math.log2(self.vae_stride))
        if 2**last != self.vae_stride:
            raise UserError(f"--vae_stride {self.vae_stride} is not a power of two")
        widths = (KL16["ch_mult"] + KL16["ch_mult"][-1:] * last)[: last + 1]
        return KL16 | {"embed_dim": self.vae_embed_dim, "ch_mult": widths}

    def of_vae(self) -> "Setup":
        """With the stride and the channels of its VAE. Raises UserError on no such VAE."""
        vae = self.vae
        with as_user_error(f"--vae_path {self.vae_path}"):
            shape = flops.VaeShape.of(vae)
        return replace(self, vae_stride=2 ** (len(shape.widths) - 1), vae_embed_dim=shape.channels)


def diffusers_settings(folder: Path) -> dict:
    """Of an AutoencoderKL that diffusers saved. Raises UserError on anything else."""
    if not folder.is_dir():
        raise UserError(
            f"--vae_path {folder} is no folder of a diffusers VAE; for KL-16, leave it out"
        )
    config = diffusers_folder(folder).config
    return {name: value for name, value in config.items() if not name.startswith("_")}


def peak(setup: Setup) -> float:
    """FLOP/s of the data sheet. Raises UserError if the device has no such arithmetic."""
    tera = getattr(HARDWARE[setup.hardware], setup.precision)
    if tera is None:
        raise UserError(f"--hardware {setup.hardware} has no {setup.precision}; see --precision")
    return tera * 1e12


def rates_of(setup: Setup) -> tuple[Rates, dict[str, str]]:
    """And where each comes from, by its name."""
    device = HARDWARE[setup.hardware]
    sheet = {"matrix": peak(setup), "memory": device.bandwidth * 1e9}
    source = "the data sheet's"
    shares = {
        "matrix": setup.matrix_share or MATRIX_SHARE,
        "memory": setup.memory_share or MEMORY_SHARE,
    }
    kind = "assumed"
    if setup.rates is not None:
        sheet, kind, source = measured_rates(setup), "measured", f"{setup.rates.name}'s"
        shares = {"matrix": setup.matrix_share or 1.0, "memory": setup.memory_share or 1.0}
    units = {"matrix": "FLOP/s", "memory": "B/s", "link": "B/s", "network": "B/s"}
    top = sheet | {"link": device.link * 1e9, "network": setup.network * 1e9}
    shares |= {"link": setup.link_share, "network": setup.link_share}
    values = {name: top[name] * shares[name] for name in units}
    origins = {
        name: f"{kind if name in sheet else 'assumed'}: {shares[name]:g} of "
        f"{source if name in sheet else 'the nominal'} {readable(top[name], unit)}"
        for name, unit in units.items()
    }
    convolution = (device.tf32 or device.fp32) * 1e12 * MATRIX_SHARE
    origins["convolution"] = f"assumed: {MATRIX_SHARE:g} of the data sheet's TF32, or fp32"
    origins["launch"] = "assumed, for each kernel"
    origins["fusion"] = "assumed: share of the traffic that is left; 1 is eager torch"
    rates = Rates(
        **values, convolution=convolution, launch=setup.launch * 1e-6, fusion=setup.fusion
    )
    return rates, origins


def measured_rates(setup: Setup) -> dict[str, float]:
    """Of a file of benchmarks.run. Raises UserError unless it is of that device."""
    result = read(setup.rates, "--rates")
    name = result["machine"].get("gpu")
    if name is None or find_hardware(name) is not HARDWARE[setup.hardware]:
        found = name or "a machine without a GPU"
        raise UserError(
            f"--rates {setup.rates} was measured on {found}, not on --hardware {setup.hardware}"
        )
    products = [r for row in result["rows"] for r in row["matrix_rates"].get(setup.precision, [])]
    if not products:
        raise UserError(f"--rates {setup.rates} has no product in --precision {setup.precision}")
    return {"matrix": median(products), "memory": median(result["copy_rates"])}


def memory_of(setup: Setup, batch: int) -> int:
    """Bytes on a device."""
    return training_memory(setup.config, batch, setup.precision, setup.grad_checkpointing).total


def batch_of(setup: Setup) -> int:
    """Images of a device at once: --batch_size, or as many of 64 as fit.

    Raises UserError if they do not fit, or cannot be shared as training shares them.
    """
    usable = USABLE * HARDWARE[setup.hardware].memory * 1e9
    batch = setup.batch_size
    if batch is None:
        batch = min(BATCH, max(1, setup.global_batch // setup.processes))
        while batch > 1 and memory_of(setup, batch) > usable:
            batch //= 2
    if memory_of(setup, batch) > usable:
        raise UserError(
            f"{batch} images take about {memory_of(setup, batch) / 1e9:.0f} GB, of which a device "
            f"has {usable / 1e9:.0f}; lower --batch_size, or pass --grad_checkpointing"
        )
    if setup.global_batch % batch or setup.processes > setup.global_batch // batch:
        raise UserError(
            f"--global_batch {setup.global_batch} cannot be shared by {setup.processes} devices "
            f"in micro-batches of {batch}; see --batch_size and --nodes"
        )
    return batch


def training(setup: Setup, roofline: Roofline) -> dict:
    """Of a whole training. Parts: seconds of one optimizer step, on every device."""
    batch, config = batch_of(setup), setup.config
    micro_batches = math.ceil(setup.global_batch // batch / setup.processes)
    once = roofline.micro_batch(batch, setup.grad_checkpointing)
    parts = {name: micro_batches * seconds for name, seconds in once.items()}
    if setup.encode:
        parts["VAE"] = micro_batches * roofline.encode(batch)
    parts["update"] = roofline.update()
    parts["exchange"] = roofline.exchange(setup.devices, setup.nodes, once["backbone"])
    step = sum(parts.values(), Seconds())
    work = flops.training_step(config)
    steps = setup.trained_epochs * (setup.images // setup.global_batch)
    if steps == 0:
        raise UserError(f"--images {setup.images} do not make one step of {setup.global_batch}")
    hours = steps * step.total / 3600
    images = setup.global_batch / step.total / setup.processes
    return {
        "epochs": setup.trained_epochs,
        "batch_size": batch,
        "micro_batches": micro_batches,
        "steps": steps,
        "bytes_per_device": memory_of(setup, batch),
        "flops_per_image": work.total,
        "shares": {
            name: getattr(work, name).total / work.total for name in ("encoder", "decoder", "head")
        },
        "images_per_second_per_device": images,
        "share_of_peak": work.total * images / peak(setup),
        "floor_device_hours": steps * setup.global_batch * work.total / peak(setup) / 3600,
        "caching_device_hours": 2 * setup.images * roofline.encode(1).total / 3600,
        **time_of(setup, hours, parts),
    }


def sampling(setup: Setup, roofline: Roofline) -> dict:
    """Of --num_images. Parts: seconds of one batch of --eval_bsz, on one device."""
    guided = setup.cfg != 1
    parts = roofline.sampling(setup.eval_bsz, setup.num_iter, guided)
    batches = setup.num_images / setup.eval_bsz
    rounds = math.ceil(math.ceil(batches) / setup.processes)
    batch = sum(parts.values(), Seconds())
    work = flops.sampling(setup.config, setup.num_iter, guided).total
    return {
        "images": setup.num_images,
        "flops_per_image": work,
        "images_per_second_per_device": setup.eval_bsz / batch.total,
        "share_of_peak": work * setup.eval_bsz / batch.total / peak(setup),
        "floor_device_hours": setup.num_images * work / peak(setup) / 3600,
        **time_of(setup, rounds * batch.total / 3600, parts),
    }


def time_of(setup: Setup, hours: float, parts: dict[str, Seconds]) -> dict:
    whole = sum(parts.values(), Seconds())
    return {
        "hours": hours,
        "device_hours": hours * setup.processes,
        "bound": BOUNDS[whole.bound],
        "parts": {
            name: asdict(part) | {"total": part.total, "bound": bound_of(part)}
            for name, part in parts.items()
        },
    }


def bound_of(part: Seconds) -> str:
    return BOUNDS[part.bound] if part.total else "nothing"


def cost(setup: Setup) -> dict:
    """All figures, as plain values. Raises UserError, in one line, on what cannot be."""
    setup = setup.of_vae()
    rates, origins = rates_of(setup)
    roofline = Roofline(setup.config, setup.precision, rates, setup.vae)
    values = asdict(rates)
    return {
        "setup": {k: str(v) if isinstance(v, Path) else v for k, v in asdict(setup).items()},
        "parameters": roofline.parameters.total,
        "rates": {name: {"value": values[name], "from": origins[name]} for name in origins},
        "training": training(setup, roofline),
        "sampling": sampling(setup, roofline),
    }
