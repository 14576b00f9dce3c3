"""Small inputs for the scripts, and the ways to call them: in this process or as processes."""

import functools
import multiprocessing
import os
import runpy
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

import main_cache
import main_tokenbridge
from models.tokenizers.kl16 import AutoencoderKL
from tests.conftest import ROOT, environment
from util.dist import run
from util.errors import EXIT_USER_ERROR
from util.vae import save_vae

SIZE, CHANNELS, STRIDE = 16, 4, 4
OFTEN_IMPORTED = ("reconstruction", "torch.utils.tensorboard", "torchmetrics.functional.image")
CLASSES = ("ant", "bee", "cat")
IMAGES = 8  # of each class


def make_inputs(folder: Path) -> Path:
    """data/train/CLASS/0.png ..., vae.ckpt and cache/, of which every caller has a copy."""
    return Path(shutil.copytree(_inputs_once().name, folder, dirs_exist_ok=True))


@functools.cache
def _inputs_once() -> TemporaryDirectory:
    made = TemporaryDirectory(prefix="inputs-")
    folder = Path(made.name)
    make_images(folder / "data", SIZE)
    with torch.random.fork_rng():  # whichever test is the first
        torch.manual_seed(0)
        vae = AutoencoderKL(embed_dim=CHANNELS, ch_mult=(1, 1, 1), ch=32, num_res_blocks=1)
        save_vae(folder / "vae.ckpt", vae)
        call(main_cache.main, *flags(folder, CACHE_FLAGS, cached_path=folder / "cache"))
    return made


def make_images(folder: Path, size: int, part: str = "train") -> None:
    """FOLDER/PART/CLASS/0.png ...: noise, the brighter the later the class."""
    rng = np.random.default_rng(0)
    for label, name in enumerate(CLASSES):
        (folder / part / name).mkdir(parents=True)
        for i in range(IMAGES):
            pixels = rng.integers(60 * label, 60 * label + 130, (size, size + i, 3), np.uint8)
            Image.fromarray(pixels).save(folder / part / name / f"{i}.png")


COMMON = {"img_size": SIZE, "device": "cpu", "num_workers": 0}
CACHE_FLAGS = {**COMMON, "vae_path": "vae.ckpt", "data_path": "data", "shard_size": 9}
TRAIN_FLAGS = {
    **COMMON,
    **dict(model="tokenbridge_tiny", class_num=3, buffer_size=4),
    **dict(use_cached=True, cached_path="cache", batch_size=4, accum_iter=2),
    **dict(epochs=2, warmup_epochs=1, blr=1e-2, ema_rate=0.9, preview_freq=0),
}
EVALUATE_FLAGS = {
    **{k: v for k, v in COMMON.items() if k != "img_size"},
    **dict(evaluate=True, vae_path="vae.ckpt", num_images=12, eval_bsz=5, num_iter=4, cfg=2),
}
INPUTS = ("vae_path", "data_path", "cached_path", "image_dir")


def flags(inputs: Path, *groups: dict, **changes) -> list[str]:
    """A command line. True is a flag without a value; None and False leave it out.

    Relative paths of inputs are those of `inputs`.
    """
    argv = []
    for name, value in {k: v for g in (*groups, changes) for k, v in g.items()}.items():
        if value is None or value is False:
            continue
        values = value if isinstance(value, list) else [] if value is True else [value]
        values = [inputs / v if name in INPUTS else v for v in values]
        argv += [f"--{name}", *map(str, values)]
    return argv


def call(main: Callable[[], None], *argv: str) -> None:
    """Run a script's main in this process, without the seconds that a new one takes."""
    with mock.patch.object(sys, "argv", [f"{main.__module__}.py", *argv]):
        main()


def refused(capsys, main: Callable[[], None], *argv: str) -> str:
    """Run a script as its file does and return the one line with which it refuses."""
    capsys.readouterr()
    script = f"{main.__module__}.py"
    with mock.patch.object(sys, "argv", [script, *argv]), pytest.raises(SystemExit) as stop:
        run(main)
    assert stop.value.code == EXIT_USER_ERROR
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith(f"{script}: error: "), lines
    return lines[0]


def train(inputs: Path, output: Path, **changes) -> dict:
    """Train in this process; the checkpoint it leaves."""
    call(main_tokenbridge.main, *flags(inputs, TRAIN_FLAGS, output_dir=output, **changes))
    return load(output)


def evaluate(inputs: Path, output: Path, resume: Path, **changes) -> dict[str, bytes]:
    """Evaluate in this process; the images it writes, by name."""
    argv = flags(inputs, EVALUATE_FLAGS, output_dir=output, resume=resume, **changes)
    call(main_tokenbridge.main, *argv)
    return images(output)


def images(output: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(output.glob("*/images/*.png"))}


def load(folder: Path) -> dict:
    return torch.load(folder / "checkpoint-last.pth", weights_only=True)


def tensors(value, name: str = "") -> dict[str, torch.Tensor]:
    """All tensors in a checkpoint, however deep they are."""
    if isinstance(value, torch.Tensor):
        return {name: value}
    items = value.items() if isinstance(value, dict) else enumerate(value)
    nested = [(k, v) for k, v in items if isinstance(v, dict | list | tuple | torch.Tensor)]
    return {n: t for k, v in nested for n, t in tensors(v, f"{name}/{k}").items()}


def assert_same_training(found: dict, expected: dict) -> None:
    """Parameters, EMA and optimizer state are the same to the bit."""
    found, expected = tensors(found), tensors(expected)
    assert list(found) == list(expected)
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def ranks(size: int) -> list[dict]:
    """The environments in which so many processes of this machine find each other."""
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": size}
    return [meeting | {"RANK": rank, "LOCAL_RANK": rank} for rank in range(size)]


def on_processes(size: int, *command, timeout: int = 120) -> subprocess.CompletedProcess:
    """What torchrun starts, without torchrun: its highest return code, all that it prints."""
    results = fork_together(*[command] * size, env=ranks(size), timeout=timeout)
    codes, *printed = zip(*results, strict=True)
    return subprocess.CompletedProcess(command, max(codes, key=abs), *map("".join, printed))


def fork_together(*commands, env: list[dict] | None = None, timeout: int = 120):
    """`run_together` for scripts and modules of ours, by `start_fork`."""
    with TemporaryDirectory() as folder:
        logs = [Path(folder) / str(number) for number in range(len(commands))]
        env = env or [{}] * len(commands)
        started = [start_fork(c, log, **e) for c, log, e in zip(commands, logs, env, strict=True)]
        deadline = time.monotonic() + timeout
        for process in started:
            process.join(max(0, deadline - time.monotonic()))
            process.kill()
            process.join()
        texts = [[log.with_suffix(end).read_text() for end in (".1", ".2")] for log in logs]
    return [(process.exitcode, *text) for process, text in zip(started, texts, strict=True)]


def start_fork(command, log: Path, **env) -> multiprocessing.Process:
    """A process that runs a script or a module of ours, without the seconds of importing torch.

    It is forked from a server that has imported the scripts and has done nothing else. What it
    prints goes to the files LOG.1 and LOG.2, by the numbers of the streams.
    """
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["tests.runs", *OFTEN_IMPORTED])
    arguments = ([*map(str, command)], environment(**env), log)
    process = server.Process(target=_in_fork, args=arguments)
    process.start()
    return process


def _in_fork(command: list[str], env: dict[str, str], log: Path) -> None:
    for number in (1, 2):
        os.dup2(os.open(log.with_suffix(f".{number}"), os.O_WRONLY | os.O_CREAT), number)
    os.chdir(ROOT)
    os.environ.clear()
    os.environ.update(env)
    torch.set_num_threads(1)
    is_module = command[0] == "-m"
    sys.argv = command[is_module:]
    try:
        if is_module:
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(str(ROOT / sys.argv[0]), run_name="__main__")
    finally:
        for worker in multiprocessing.active_children():
            worker.kill()  # as at the end of an interpreter: they do not end when asked to


def run_together(*commands: list[str], env: list[dict] | None = None, timeout: int = 120):
    """Start processes at once, wait for all; their (return code, stdout, stderr)."""
    started = [
        subprocess.Popen(
            [sys.executable, *map(str, command)],
            cwd=ROOT,
            env=environment(**own),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for command, own in zip(commands, env or [{}] * len(commands), strict=True)
    ]
    try:
        outputs = [process.communicate(timeout=timeout) for process in started]
    finally:
        for process in started:
            process.kill()
    return [(p.returncode, *output) for p, output in zip(started, outputs, strict=True)]
