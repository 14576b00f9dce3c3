"""kill -9 while latents are cached: the same command ends with the bytes of an undisturbed run.

What is whole when a job is killed is not written again, on whatever number of processes it goes on.
A step is an image; lost are those that had to be encoded a second time.
"""

import random
import signal
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from main_cache import QUEUED
from models.tokenizers.kl16 import AutoencoderKL
from tests.faults.harness import Job, Row, send
from tests.runs import free_port
from util.vae import save_vae

SCRIPT = "tests.faults.count_cache"
SIZE, IMAGES, SHARD, BATCH = 16, 60, 4, 2
# Images that a killed process has encoded in vain: the shard that it writes, the batches that wait.
MOST_LOST = SHARD + QUEUED * BATCH
MOST_KILLS = 5  # of one cache, before it may come to its end
LATER = 0.05  # seconds, in which a shard is encoded, written and named
LOSS_GRACE = 60.0  # seconds until torchrun must have ended after a worker's death


def make_images(folder: Path) -> None:
    """data/train/{ant,bee,cat}/00.png ... and vae.ckpt."""
    rng = np.random.default_rng(0)
    for i in range(IMAGES):
        path = folder / "data" / "train" / ("ant", "bee", "cat")[i % 3] / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (SIZE, SIZE, 3), np.uint8)).save(path)
    torch.manual_seed(0)
    save_vae(folder / "vae.ckpt", AutoencoderKL(4, (1, 1), ch=32, num_res_blocks=1))


class Caching:
    """One cache, started as often as need be."""

    def __init__(self, inputs: Path, folder: Path, form: str):
        self.folder = folder
        self.log, self.encoded = folder.with_suffix(".log"), folder.with_suffix(".encoded")
        flags = dict(data_path=inputs / "data", vae_path=inputs / "vae.ckpt", cached_path=folder)
        flags |= dict(format=form, shard_size=SHARD, img_size=SIZE, batch_size=BATCH)
        flags |= dict(num_workers=1, device="cpu")
        self.argv = [part for name, value in flags.items() for part in (f"--{name}", value)]

    def start(self, processes: int) -> Job:
        launch = []
        if processes > 1:
            launch = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}"]
            launch += [f"--master_port={free_port()}"]
        return Job(*launch, "-m", SCRIPT, *self.argv, log=self.log, ENCODED=self.encoded)

    def finish(self, processes: int = 1) -> dict[str, bytes]:
        """Let it go on to its end; all that the cache holds."""
        job = self.start(processes)
        assert job.end() == 0, job.printed()[-2000:]
        files = (p for p in self.folder.rglob("*") if p.is_file() and p.name != "config.yaml")
        return {str(path.relative_to(self.folder)): path.read_bytes() for path in files}

    def entries(self) -> int:
        return sum(1 for _ in self.folder.rglob("*"))

    def whole(self) -> dict[str, tuple[int, int]]:
        """Which file is which, of those that must not be written again."""
        shards = [path.with_suffix("") for path in self.folder.glob("shard-*.json")]
        files = [shard.with_suffix(end) for shard in shards for end in (".json", ".npy")]
        files += self.folder.glob("*/*.npz")
        there = {str(path): path.stat() for path in files if path.exists()}
        return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in there.items()}

    def unfinished_bytes(self) -> int:
        """In files that never got their names."""
        return sum(path.stat().st_size for path in self.folder.rglob(".*.tmp"))

    def encoded_twice(self) -> int:
        return self.encoded.stat().st_size - IMAGES


def kill_once(caching: Caching, processes: int, rng: random.Random) -> bool:
    """Start it and kill it when some more files are there; false if it was done before."""
    job, enough = caching.start(processes), caching.entries() + rng.randint(1, 12)
    if not job.wait_for(lambda: caching.entries() >= enough):
        assert job.end() == 0, job.printed()[-2000:]
        return False
    time.sleep(rng.uniform(0, LATER))
    workers = job.workers(SCRIPT)
    if workers and rng.random() < 0.5:
        send(rng.choice(workers), signal.SIGKILL)
        job.end(LOSS_GRACE)  # torchrun ends the other one
    else:
        job.kill()
    return True


def harm(
    caching: Caching, kills: int, processes: tuple[int, ...], rng: random.Random, row: Row
) -> None:
    """Kill one cache's jobs, then let the last one end. Counts all but what survived."""
    kept: dict[str, tuple[int, int]] = {}
    for _ in range(kills):
        if not kill_once(caching, rng.choice(processes), rng):
            break
        row.injected += 1
        row.bytes_lost += caching.unfinished_bytes()
        found = caching.whole()
        assert kept.items() <= found.items(), "what was whole was written again"
        kept = found


def kill_caching(
    folder: Path, kills: int, seed: int, processes: tuple[int, ...] = (1, 1, 2)
) -> Row:
    """kill -9 at random moments of caching, of both forms. processes: of a job, drawn for each."""
    inputs, rng, row = folder / "images", random.Random(seed), Row("kill -9 while caching")
    make_images(inputs)
    expected, number = {}, 0
    while row.injected < kills:
        form, number = ("npy", "npz")[number % 2], number + 1
        if form not in expected:
            expected[form] = Caching(inputs, folder / f"undisturbed-{form}", form).finish()
        caching, before = Caching(inputs, folder / f"cache-{number}", form), row.injected
        most = min(rng.randint(1, MOST_KILLS), kills - row.injected)
        harm(caching, most, processes, rng, row)
        if caching.finish(rng.choice(processes)) == expected[form]:
            row.survived += row.injected - before
        row.steps_lost += caching.encoded_twice()
    row.result = "same bytes" if row.survived == row.injected else "OTHER BYTES"
    return row
