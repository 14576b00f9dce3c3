"""Which device and which arithmetic: one path for CUDA, MPS and the CPU."""

import importlib.util
import os
import random
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from models.generate import Precision
from models.tokenbridge import TokenBridge
from util.errors import UserError, as_user_error


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


def resolve_precision(name: str, device: torch.device) -> Precision:
    with as_user_error("--precision"):
        return Precision.of(name, device)


def compile_model(model: TokenBridge, device: torch.device) -> None:
    """--compile. Raises UserError where what inductor needs is missing: it would end in a trace."""
    compiler = os.environ.get("CXX", "g++")
    if device.type == "cpu" and shutil.which(compiler) is None:
        raise UserError(f"--compile needs a C++ compiler; install {compiler}, or name one in CXX")
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        raise UserError("--compile needs triton on CUDA: pip install triton, or leave it out")
    model.compile_blocks()


@contextmanager
def unchanged_randomness(device: torch.device) -> Iterator[None]:
    """Leave every global random generator as it was: a training goes on with them."""
    python, arrays = random.getstate(), np.random.get_state()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):  # and the CPU's
        yield
    random.setstate(python)
    np.random.set_state(arrays)
