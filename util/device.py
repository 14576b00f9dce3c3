"""Which device and which arithmetic: one path for CUDA, MPS and the CPU.

And what is said of both, and of the code, beside the figures that were made with them.
"""

import importlib.util
import os
import platform
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from models.precision import Precision
from models.tokenbridge import TokenBridge
from util import ROOT
from util.errors import UserError, as_user_error

PACKAGES = ("torch", "torchvision", "torch-fidelity", "timm", "numpy")


def resolve_device(name: str, local_rank: int = 0, quiet: bool = False) -> torch.device:
    """The device of that name, or the best the machine has instead, which is said on stderr."""
    kind, _, index = name.partition(":")
    here = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    here["cpu"] = True
    if kind not in here:
        raise UserError(f"--device {name!r} is not one of cuda, mps, cpu")
    if not here[kind]:
        best = next(other for other in here if here[other])
        if not quiet:
            print(f"no {kind} device here: running on {best}", file=sys.stderr, flush=True)
        kind, index = best, ""
    if kind != "cuda":
        return torch.device(kind)
    count = torch.cuda.device_count()
    number = int(index) if index.isdigit() else local_rank
    if number >= count:
        raise UserError(f"process {number} of this node has no GPU: it has {count} of them")
    return torch.device(kind, number)


def resolve_precision(name: str, device: torch.device, tf32: bool = False) -> Precision:
    """tf32: whether CUDA's fp32 products are; its convolutions may be anyway, as torch has it."""
    torch.backends.cuda.matmul.allow_tf32 = tf32
    torch.backends.cudnn.benchmark = True  # the same few sizes come again and again
    with as_user_error("--precision"):
        precision = Precision.of(name, device)
    return replace(precision, name="tf32") if tf32 and precision.name == "fp32" else precision


def accelerate(model: TokenBridge, device: torch.device, compiled: bool, graphs: bool) -> None:
    """--compile and --cuda_graphs. Raises UserError where they cannot be."""
    if graphs and (device.type != "cuda" or model.config.head != "channel"):
        found = f"{model.config.head} on {device.type}"
        raise UserError(f"--cuda_graphs is of the channel head on cuda, not of {found}")
    if compiled:
        compile_model(model, device)
    if graphs:
        model.head.sample_rows = CapturedCalls(model.head.sample_rows)


def compile_model(model: TokenBridge, device: torch.device) -> None:
    """Raises UserError where what inductor needs is missing: it would end in a trace."""
    compiler = os.environ.get("CXX", "g++")
    if device.type == "cpu" and shutil.which(compiler) is None:
        raise UserError(f"--compile needs a C++ compiler; install {compiler}, or name one in CXX")
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        raise UserError("--compile needs triton on CUDA: pip install triton, or leave it out")
    model.compile_blocks()


class CapturedCalls:
    """A method of a module, of tensors and plain settings, as CUDA graphs: one launch for all.

    A graph is captured at the first call with certain sizes, settings and weights, works in
    buffers of its own, and is replayed from then on.
    """

    def __init__(self, method: Callable[..., Sequence[Tensor]]):
        self.method, self.graphs, self.pool = method, {}, None

    def __call__(self, *given, **settings) -> tuple[Tensor, ...]:
        tensors = [x for x in given if isinstance(x, Tensor)]
        plain = given[len(tensors) :]
        weights = next(self.method.__self__.parameters())  # an average's may take their place
        sizes = [(tuple(x.shape), x.dtype) for x in tensors]
        arithmetic = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
        key = *sizes, *plain, *sorted(settings.items()), arithmetic, weights.data_ptr()
        if key not in self.graphs:
            buffers = [x.clone() for x in tensors]
            call = partial(self.method, *buffers, *plain, **settings)
            self.graphs[key] = buffers, *self.capture(call)
        buffers, graph, results = self.graphs[key]
        for buffer, tensor in zip(buffers, tensors, strict=True):
            buffer.copy_(tensor)
        graph.replay()
        return tuple(x.clone() for x in results)  # the next replay overwrites them

    def capture(self, call: Callable[[], Sequence[Tensor]]) -> tuple:
        """The graph, and the tensors that it writes to."""
        torch.cuda.synchronize()
        with torch.cuda.stream(torch.cuda.Stream()):  # libraries allocate in a first call
            call()
        torch.cuda.synchronize()
        self.pool = self.pool or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # Autocast keeps the weights that it has cast: the graph casts its own, and nobody else's.
        torch.clear_autocast_cache()
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            results = call()
        torch.clear_autocast_cache()
        return graph, results


@contextmanager
def unchanged_randomness(device: torch.device) -> Iterator[None]:
    """Leave every global random generator as it was: a training goes on with them."""
    python, arrays = random.getstate(), np.random.get_state()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):  # and the CPU's
        yield
    random.setstate(python)
    np.random.set_state(arrays)


# --- where figures come from


def versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        found[name] = "absent"
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def processor() -> str:
    """Its maker's name for it where Linux knows it, else its architecture."""
    with suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(": ")[1] for line in lines if line.startswith("model name"))
    return platform.processor() or platform.machine()


def git_revision() -> str | None:
    """The commit of this code, "-dirty" after it if files differ; None outside a clone."""
    command = ["git", f"--git-dir={ROOT}/.git", f"--work-tree={ROOT}", "describe", "--always"]
    with suppress(OSError, subprocess.SubprocessError):
        result = subprocess.run(
            [*command, "--dirty", "--abbrev=40"], capture_output=True, text=True, timeout=20
        )
        return result.stdout.strip() or None
    return None


def environment(device: torch.device, precision: str, processes: int) -> dict[str, str]:
    """What a run was made with and on, in words, for people who read about it later."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {
        "device": name,
        "processes": str(processes),
        "precision": precision,
        "processor": f"{processor()}, {torch.get_num_threads()} threads",
        "system": platform.system(),
        "Python": platform.python_version(),
        **versions(),
        "git revision": git_revision() or "not a clone",
    }
