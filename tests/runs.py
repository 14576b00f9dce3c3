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
import reconstruction
from benchmarks.correctness import ROOT
from models.tokenizers.kl16 import AutoencoderKL
from util.dist import run
from util.errors import EXIT_USER_ERROR
from util.vae import save_vae

SIZE, CHANNELS, STRIDE = 16, 4, 4
OFTEN_IMPORTED = ("torch.utils.tensorboard", "torchmetrics.functional.image")
CLASSES = ("ant", "bee", "cat")
IMAGES = 8  # of each class


def make_inputs(folder: Path) -> Path:
    """data/train/CLASS/0.png ..., vae.ckpt, cache/ and model/, of which every caller has a copy.

    model/ holds a checkpoint of random weights.
    """
    return Path(shutil.copytree(_inputs_once().name, folder, dirs_exist_ok=True))


@functools.cache
def _inputs_once() -> TemporaryDirectory:
    from tests.measures import save_model  # which needs this module

    made = TemporaryDirectory(prefix="inputs-")
    folder = Path(made.name)
    make_images(folder / "data", SIZE)
    with torch.random.fork_rng():  # whichever test is the first
        torch.manual_seed(0)
        vae = AutoencoderKL(embed_dim=CHANNELS, ch_mult=(1, 1, 1), ch=32, num_res_blocks=1)
        save_vae(folder / "vae.ckpt", vae)
        use("cache", folder, cached_path="cache")
        save_model(folder / "model")
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
    **dict(device="cpu", num_workers=0, evaluate=True),
    **dict(vae_path="vae.ckpt", num_images=12, eval_bsz=5, num_iter=4, cfg=2),
}
IMAGE_FLAGS = dict(use_cached=False, cached_path=None, data_path="data", vae_path="vae.ckpt")
IMAGE_FLAGS |= dict(latent_scale=1.0, channel_order="0,1,2,3")
RECONSTRUCTION_FLAGS = {
    **COMMON,
    **dict(image_dir="data", vae_path="vae.ckpt", latent_scale=1.0, no_metrics=True),
}
# Of each use: its script, its flags and the flag of what it writes.
USES = {
    "train": (main_tokenbridge.main, TRAIN_FLAGS, "output_dir"),
    "images": (main_tokenbridge.main, TRAIN_FLAGS | IMAGE_FLAGS, "output_dir"),
    "evaluate": (main_tokenbridge.main, EVALUATE_FLAGS, "output_dir"),
    "reconstruct": (reconstruction.main, RECONSTRUCTION_FLAGS, "output_dir"),
    "cache": (main_cache.main, CACHE_FLAGS, "cached_path"),
}
INPUTS = ("vae_path", "data_path", "cached_path", "image_dir", "resume")


def flags(inputs: Path, *groups: dict, **changes) -> list[str]:
    """A command line. True is a flag without a value; None and False leave it out.

    Relative paths of inputs are those of `inputs`.
    """
    argv = []
    for name, value in {k: v for g in (*groups, changes) for k, v in g.items()}.items():
        if value is None or value is False:
            continue
        values = value if isinstance(value, list) else [] if value is True else [value]
        values = [inputs / v if name in INPUTS and v != "auto" else v for v in values]
        argv += [f"--{name}", *map(str, values)]
    return argv


def call(main: Callable[[], None], *argv: str) -> None:
    """Run a script's main in this process, without the seconds that a new one takes."""
    with mock.patch.object(sys, "argv", [f"{main.__module__}.py", *argv]):
        main()


def use(name: str, inputs: Path, **changes) -> None:
    """Run one of USES in this process, with changes of its flags."""
    main, own_flags, _ = USES[name]
    call(main, *flags(inputs, own_flags, changes))


def command(name: str, inputs: Path, **changes) -> list[str]:
    """The same for a process of its own: the script and its arguments."""
    main, own_flags, _ = USES[name]
    return [f"{main.__module__}.py", *flags(inputs, own_flags, changes)]


def refused(capsys, main: Callable[[], None], *argv: str, alone: bool = True) -> str:
    """Run a script as its file does and return the one line with which it refuses.

    alone: nothing else may stand there; else it is the last one.
    """
    capsys.readouterr()
    script = f"{main.__module__}.py"
    with mock.patch.object(sys, "argv", [script, *argv]), pytest.raises(SystemExit) as stop:
        run(main)
    assert stop.value.code == EXIT_USER_ERROR
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith(f"{script}: error: ") and (len(lines) == 1 or not alone), lines
    return lines[-1]


def train(inputs: Path, output: Path, **changes) -> dict:
    """Train in this process; the checkpoint it leaves."""
    use("train", inputs, output_dir=output, **changes)
    return load(output)


def evaluate(inputs: Path, output: Path, resume: Path, **changes) -> dict[str, bytes]:
    """Evaluate in this process; the images it writes, by name."""
    use("evaluate", inputs, output_dir=output, resume=resume, **changes)
    return images(output)


def images(output: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(output.glob("*/images/*.png"))}


def contents(folder: Path, but: tuple[str, ...] = ()) -> dict[str, bytes]:
    """Of all files in a folder but those of such names."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in but)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def events_of(folder: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # slow

    return EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0}).Reload()


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """(step, value) of every TensorBoard scalar."""
    events = events_of(folder)
    names = events.Tags()["scalars"]
    return {name: [(e.step, e.value) for e in events.Scalars(name)] for name in names}


def load(folder: Path) -> dict:
    return torch.load(folder / "checkpoint-last.pth", weights_only=True)


def save_published(folder: Path, path: Path) -> dict:
    """A training's checkpoint as the published code leaves it; the flags that say its settings."""
    saved = load(folder)
    torch.save({key: saved[key] for key in ("model", "model_ema", "optimizer", "epoch")}, path)
    sizes = dict(img_size=SIZE, vae_stride=STRIDE, vae_embed_dim=CHANNELS, buffer_size=4)
    return {"model": "tokenbridge_tiny", "class_num": saved["config"]["class_num"]} | sizes


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


def environment(alone: bool = False, **env) -> dict[str, str]:
    """Of a command as a user starts it: this process's, without PYTHONPATH.

    alone: without what small processes have, which share the cores with others, too.
    """
    shared = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    hidden = ("PYTHONPATH", *shared)
    found = {name: value for name, value in os.environ.items() if name not in hidden}
    return found | ({} if alone else shared) | {name: str(value) for name, value in env.items()}


def stand_in(folder: Path, name: str, body: str) -> None:
    """A bash script in the place of a program, in a folder that comes first in PATH."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
    (folder / name).chmod(0o755)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def ranks(size: int) -> list[dict]:
    """The environments in which so many processes of this machine find each other."""
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": size}
    return [meeting | {"RANK": rank, "LOCAL_RANK": rank} for rank in range(size)]


def on_processes(size: int, *command, code: int = 0) -> subprocess.CompletedProcess:
    """What torchrun starts, without torchrun; all that it prints. code: the highest of theirs."""
    results = fork_together(*[command] * size, env=ranks(size))
    codes, *printed = zip(*results, strict=True)
    result = subprocess.CompletedProcess(command, max(codes, key=abs), *map("".join, printed))
    assert result.returncode == code, result.stderr
    return result


def train_on(size: int, inputs: Path, output: Path, code: int = 0, **changes):
    """`train` on so many processes, of one micro-batch a step each."""
    asked = command("train", inputs, output_dir=output, **{"accum_iter": 1} | changes)
    return on_processes(size, *asked, code=code)


def fork_together(*commands, env: list[dict] | None = None, timeout: int = 120):
    """Start scripts or modules of ours at once, wait for all; their (code, stdout, stderr)."""
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
    """A process that runs a script or a module, without the seconds of importing torch.

    It is forked from a server that has imported the scripts and has done nothing else. What it
    prints is added to LOG.1 and LOG.2, by the numbers of the streams.
    """
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["tests.runs", *OFTEN_IMPORTED])
    files = [log.with_suffix(f".{number}") for number in (1, 2)]
    arguments = ([*map(str, command)], environment(**env), files)
    process = server.Process(target=_in_fork, args=arguments)
    process.start()
    return process


def kill_when(condition: Callable[[], object], *processes: multiprocessing.Process) -> None:
    """kill -9 of all of them as soon as the condition holds, before which none may end."""
    deadline = time.monotonic() + 200
    while not condition():
        assert all(p.is_alive() for p in processes) and time.monotonic() < deadline
        time.sleep(0.01)
    for process in processes:
        process.kill()
        process.join()


def _in_fork(command: list[str], env: dict[str, str], files: list[Path]) -> None:
    for number, file in enumerate(files, 1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
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
