"""kill -9 while latents are cached: the same command ends with the bytes of an undisturbed run.

What is whole when a job is killed is not written again, on whatever number of processes it goes on.
A step is an image; lost are those that had to be encoded a second time.
As a program this is main_cache.py, which also adds a byte to the file ENCODED for every image.
"""

import json
import os
import random
import signal
import time
from pathlib import Path

import main_cache
from tests.faults.harness import Row, Run, send
from tests.runs import CACHE_FLAGS, CLASSES, IMAGES, contents, flags
from util.args import CONFIG
from util.dist import run

SCRIPT = "tests.faults.caching"
SHARD, BATCH = 4, 2
COUNT = IMAGES * len(CLASSES)
MOST_LOST = 2 * SHARD  # images encoded in vain: of the shard that is written, and of the next
MOST_KILLS = 5  # of one cache, before it may come to its end
LATER = 0.05  # seconds, in which a shard is encoded, written and named
LOSS_GRACE = 60.0  # seconds until torchrun must have ended after a worker's death


class Caching(Run):
    """One cache."""

    def __init__(self, inputs: Path, folder: Path, form: str):
        self.encoded = folder.with_suffix(".encoded")
        changes = dict(format=form, shard_size=SHARD, batch_size=BATCH, num_workers=1)
        argv = flags(inputs, CACHE_FLAGS, changes, cached_path=folder)
        super().__init__(["-m", SCRIPT], argv, folder, ENCODED=self.encoded)

    def contents(self) -> dict[str, bytes]:
        return contents(self.output, but=(CONFIG,))

    def entries(self) -> int:
        return sum(1 for _ in self.output.rglob("*"))

    def whole(self) -> dict[str, tuple[int, int]]:
        """Which file is which, of those that must not be written again."""
        sidecars = sorted(self.output.glob("shard-*.json"))
        names = [name for path in sidecars for name in json.loads(path.read_text())["names"]]
        files = [*sidecars, *(path.with_suffix(".npy") for path in sidecars)]
        files += [self.output / f"{name}.npz" for name in names]
        there = {str(path): path.stat() for path in files if path.exists()}
        return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in there.items()}


def kill_once(caching: Caching, processes: int, rng: random.Random) -> bool:
    """Start it and kill it when some more files are there; false if it was done before."""
    job, enough = caching.start(processes), caching.entries() + rng.randint(1, 8)
    if not job.wait_for(lambda said: caching.entries() >= enough):
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


def kill_caching(
    inputs: Path, folder: Path, kills: int, seed: int, processes: tuple[int, ...] = (1, 1, 2)
) -> Row:
    """kill -9 at random moments of caching, of both forms. processes: of a job, drawn for each."""
    rng, row, caches = random.Random(seed), Row("kill -9 while caching"), 0
    while row.injected < kills:
        form, caches = ("npy", "npz")[caches % 2], caches + 1
        whole = Caching(inputs, folder / f"undisturbed-{form}", form)
        whole.undisturbed("main_cache.py")
        caching = Caching(inputs, folder / f"cache-{seed}-{caches}", form)
        kept, killed = {}, 0
        most = min(rng.randint(1, MOST_KILLS), kills - row.injected)
        while killed < most and kill_once(caching, rng.choice(processes), rng):
            killed += 1
            found = caching.whole()
            assert kept.items() <= found.items(), "what was whole was written again"
            kept = found
        caching.finish(rng.choice(processes))
        row.injected += killed
        row.survived += killed * (caching.contents() == whole.contents())
        row.steps_lost += caching.encoded.stat().st_size - COUNT
    row.result = "same bytes" if row.survived == row.injected else "OTHER BYTES"
    return row


def count_encoded() -> None:
    encode = main_cache.encode

    def counted(vae, images):
        with open(os.environ["ENCODED"], "ab") as file:
            file.write(b"." * len(images))
        return encode(vae, images)

    main_cache.encode = counted


if __name__ == "__main__":
    count_encoded()
    run(main_cache.main)
