"""Runs a shell block of the documentation as bash does, in a small world of its own.

The world is a folder that looks like the project's, with tiny images, weights and caches where the
blocks expect them, and the variables that they name. bash runs the block as it is written; only
the programs are stand-ins: `python` and `torchrun` hand their arguments to this process, which
runs the script, so that torch is imported once. What is changed on the way:

- torchrun's own flags are read by torchrun's parser, then one process is started;
- flags that a script knows get the values of `SMALL`;
- a run or a cache that is only read is there already; one that is made begins with nothing;
- `sbatch` and `srun` start what they are given.
"""

import importlib
import io
import os
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
import traceback
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from multiprocessing.connection import Listener
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch.distributed.run import get_args_parser

import main_cache
import main_tokenbridge
from models.config import preset
from models.tokenbridge import TokenBridge
from models.tokenizers.kl16 import AutoencoderKL
from tests.conftest import ROOT, environment
from tests.measures import PIXELS
from tests.runs import call, free_port, make_images
from util import fid_stats
from util.vae import save_vae

SMALL = {
    **dict(model="tokenbridge_tiny", img_size=64, class_num=3, buffer_size=4, device="cpu"),
    **dict(num_workers=0, batch_size=4, global_batch=8, epochs=1, warmup_epochs=0, preview_iter=2),
    **dict(num_images=12, eval_bsz=12, num_iter=2, temperature=0.9, images_per_class=2),
    **dict(feature_extractor=PIXELS),
}
# Of commands with a model of MAR's, in the place of its size.
MAR = dict(head="diffusion", diffloss_d=1, diffloss_w=32, num_sampling_steps=2)
READS_A_RUN = r"(util\.(report|export)|(--evaluate|app\.py) --resume) .*\$\{OUTPUT_DIR\}"
WRITES_A_CACHE = r"main_cache\.py .*--cached_path"
DOWNLOADS = r"util\.download|hf download"
# What is asked for, its arguments and surroundings; the answer is what to print and the exit code.
STAND_IN = """#!{python} -ISE
import os, sys
from multiprocessing.connection import Client
with Client({address!r}) as line:
    line.send(({name!r}, sys.argv[1:], os.getcwd(), dict(os.environ)))
    out, err, code = line.recv()
sys.stdout.write(out)
sys.stderr.write(err)
sys.exit(code)
"""
NOT_RUN = '#!/bin/bash\necho "$0: mark the block as not run" >&2; exit 1\n'
PROGRAMS = {
    "sbatch": '#!/bin/bash\nSLURM_JOB_ID=1 SLURM_SUBMIT_DIR="$PWD" exec bash "$@"\n',
    "srun": '#!/bin/bash\nshift; exec "$@"\n',
    **dict.fromkeys(("make", "conda", "pip", "tensorboard"), NOT_RUN),
}
HERE = ("python", "torchrun", "hf")  # run in this process
END = "all-is-done"
PAGE = "gradio.Blocks.block_thread"  # where the demo's page, which is served, waits for visitors


@dataclass(frozen=True)
class Block:
    """Of a page. reason: why it is not run, from the comment above it."""

    page: Path
    line: int
    text: str
    reason: str | None

    @property
    def name(self) -> str:
        return f"{self.page.name}-{self.line}"


def find_blocks(page: Path, language: str = "bash") -> list[Block]:
    """The page's blocks marked as of that language, with `<!-- not run: REASON -->` before them."""
    text = page.read_text()
    pattern = rf"^(?:<!-- not run: ([^>]+?) -->\n)?```{language}\n(.*?)^```"
    return [
        Block(page, text.count("\n", 0, found.start(2)), found[2], found[1])
        for found in re.finditer(pattern, text, flags=re.MULTILINE | re.DOTALL)
    ]


# --- the world


def make_world(folder: Path) -> Path:
    """What the blocks read; to be copied by `settle`, not to be changed."""
    make_images(folder / "imagenet", 64)
    for part in ("train", "val"):
        make_images(folder / "photos", 64, part)
    torch.manual_seed(0)
    vae = AutoencoderKL(embed_dim=16, ch_mult=(1, 1, 1, 1, 1), ch=32, num_res_blocks=1)
    weights = folder / "pretrained_models"
    (weights / "vae").mkdir(parents=True)
    save_vae(weights / "vae" / "kl16.ckpt", vae)
    words = ["--vae_path", weights / "vae" / "kl16.ckpt", "--data_path", folder / "imagenet"]
    words += ["--cached_path", folder / "cache"]
    call(main_cache.main, *smaller("main_cache", words))
    published = [*words, "--cached_path", folder / "published_cache", "--format", "npz"]
    call(main_cache.main, *smaller("main_cache", published))
    for path in [*(folder / "published_cache").glob("*.json")]:
        path.unlink()
    train = [*words, "--use_cached", "--output_dir", folder / "run", "--preview_freq", "0"]
    call(main_tokenbridge.main, *smaller("main_tokenbridge", train))
    for size in ("large", "huge"):
        place = weights / "tokenbridge" / f"tokenbridge_{size}"
        place.mkdir(parents=True)
        shutil.copy(folder / "run" / "checkpoint-last.pth", place)
    mar = [*train, "--model", "mar_base", "--output_dir", weights / "mar" / "mar_base"]
    call(main_tokenbridge.main, *smaller("main_tokenbridge", mar))
    demo = folder / "output" / "demo"
    shutil.copytree(folder / "run", demo / "model")
    shutil.copy(weights / "vae" / "kl16.ckpt", demo / "vae.ckpt")
    inception, adm = folder / "pt_inception.pth", folder / "fid_stats" / "adm_in256_stats.npz"
    torch.save({}, inception)
    words = ["--image_dir", folder / "imagenet" / "train", "--inception_weights", inception]
    call(fid_stats.main, *smaller("util.fid_stats", [*words, "--output", adm]))
    settings = preset("tokenbridge_tiny") | {"img_size": 64, "buffer_size": 4}
    TokenBridge(**settings).save_pretrained(folder / "exported")
    return folder


def settle(world: Path, folder: Path, text: str) -> dict[str, str]:
    """Make the folder the project's, with a copy of the world. The variables of the block."""
    folder.mkdir(exist_ok=True)
    for path in ROOT.iterdir():
        if path.name not in (".git", "data", "docs", "output", "pretrained_models", "fid_stats"):
            (folder / path.name).symlink_to(path)
    shutil.copytree(ROOT / "docs", folder / "docs")
    shutil.copytree(world, folder, dirs_exist_ok=True)
    if "--split val" in text:
        make_images(folder / "imagenet", 64, "val")
    (folder / "data").mkdir()
    (folder / "data" / "imagenet").symlink_to(folder / "imagenet")
    if re.search(DOWNLOADS, text):
        shutil.rmtree(folder / "pretrained_models")
    text = text.replace("\\\n", " ")
    first = next((line for line in text.splitlines() if "${OUTPUT_DIR}" in line), "")
    run = "run" if re.search(READS_A_RUN, first) else "new-run"
    cache = "new-cache" if re.search(WRITES_A_CACHE, text) else "cache"
    paths = {"IMAGENET_PATH": "imagenet", "CACHED_PATH": cache, "OUTPUT_DIR": run}
    return {name: str(folder / path) for name, path in paths.items()} | {
        **dict(NODE_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="29500", GPUS="1"),
        **dict(HF_HUB_DISABLE_PROGRESS_BARS="1"),
    }


# --- running


def smaller(module: str, words: list) -> list[str]:
    """The arguments of a script with values for a laptop, which come last and so count."""
    words = [str(word) for word in words]
    known = importlib.import_module(module).make_parser()._option_string_actions
    more = SMALL | {"port": free_port()}  # the one of the page may be taken
    more |= MAR if any(word.startswith("mar_") for word in words) else {}
    if "--cached_path" not in words:  # the VAE is not KL-16, whose scale and order are built in
        more["cached_path"] = "cache"
    for name, value in more.items():
        words += [f"--{name}", str(value)] if f"--{name}" in known else []
    return words


def run_here(program: str, words: list[str]) -> None:
    """Run what a stand-in was asked for, as the interpreter does. Raises SystemExit."""
    if program == "hf":
        return run_module("huggingface_hub.cli.hf", words)
    if words[:2] == ["-m", "torch.distributed.run"]:
        program, words = "torchrun", words[2:]
    if program == "torchrun":
        asked = get_args_parser().parse_args(words)
        script = [asked.training_script, *asked.training_script_args]
        words = ["-m", *script] if asked.module else script
    if words[0] == "-m":
        return run_module(words[1], words[2:])
    script = Path(words[0]).resolve().relative_to(ROOT).with_suffix("")
    return run_module(".".join(script.parts), words[1:])


def run_module(module: str, words: list[str]) -> None:
    argv = [module, *smaller_if_it_can_be(module, words)]
    with mock.patch.object(sys, "argv", argv), mock.patch(PAGE, lambda page: page.close(False)):
        runpy.run_module(module, run_name="__main__", alter_sys=True)


def smaller_if_it_can_be(module: str, words: list[str]) -> list[str]:
    """Of a script of ours; of the benchmarks only what calculates is run, as it is."""
    if module.startswith("benchmarks.") and module != "benchmarks.cost":
        sys.exit(f"{module} takes minutes: mark the block as not run")
    ours = (ROOT / module.replace(".", "/")).with_suffix(".py").exists()
    known = ours and hasattr(importlib.import_module(module), "make_parser")
    return smaller(module, words) if known else words


def answer(program: str, words: list[str], folder: str, env: dict[str, str]):
    """(stdout, stderr, exit code) of a program that is run in this process."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    own_env = mock.patch.dict(os.environ, env, clear=True)
    with pytest.MonkeyPatch.context() as patch, own_env, redirect_stdout(out), redirect_stderr(err):
        patch.chdir(folder)
        patch.setattr(sys, "path", [*sys.path])
        try:
            run_here(program, words)
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
            err.write(end.code if isinstance(end.code, str) else "")
        except BaseException:
            err.write(traceback.format_exc())
            code = 1
    return out.getvalue(), err.getvalue(), code


def run_bash(text: str, folder: Path, env: dict[str, str]) -> subprocess.CompletedProcess:
    """Run a script by bash in that folder; it ends at the first command that fails."""
    programs = folder / ".programs"
    programs.mkdir(exist_ok=True)
    then_tell = f'bash -euo pipefail -c "$1"; code=$?; {END}; exit $code'
    with Listener() as listener, tempfile.TemporaryFile("w+") as printed:
        how = dict(python=sys.executable, address=listener.address)
        texts = {name: STAND_IN.format(name=name, **how) for name in (*HERE, END)}
        for name, text_of_program in (PROGRAMS | texts).items():
            (programs / name).write_text(text_of_program)
            (programs / name).chmod(0o755)
        process = subprocess.Popen(
            ["bash", "-c", then_tell, "bash", text],
            cwd=folder,
            env=environment(alone=True, **env, PATH=f"{programs}:{os.environ['PATH']}"),
            stdout=printed,
            stderr=subprocess.STDOUT,
        )
        name = ""
        while name != END:
            with listener.accept() as line:
                name, *request = line.recv()
                line.send(("", "", 0) if name == END else answer(name, *request))
        process.wait()
        printed.seek(0)
        return subprocess.CompletedProcess(text, process.returncode, printed.read(), "")
