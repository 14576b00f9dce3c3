"""Where a figure comes from: digests of tensors, machine, versions, git revision."""

import hashlib
import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "torchvision", "torch-fidelity", "numpy")


def digest(network: nn.Module) -> str:
    """SHA-256 of a network's tensors: their names, types, shapes and bytes."""
    found = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        found.update(memoryview(flat.view(torch.uint8).numpy()))
    return found.hexdigest()


def versions() -> dict[str, str]:
    return {name: version(name) for name in PACKAGES}


def processor() -> str:
    """Its maker's name for it where Linux knows it, else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def cores() -> int:
    """Those that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def git_revision() -> str | None:
    """The commit of this code, "-dirty" after it if files differ; None outside a clone."""
    if not (ROOT / ".git").exists():
        return None
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None


def environment(device: torch.device, precision: str, processes: int) -> dict[str, str]:
    """What a run was made with and on, in words, for people who read about it later."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {
        "device": name,
        "processes": str(processes),
        "precision": precision,
        "processor": f"{processor()}, {cores()} cores",
        "system": platform.system(),
        "Python": platform.python_version(),
        **versions(),
        "git revision": git_revision() or "not a clone",
    }
