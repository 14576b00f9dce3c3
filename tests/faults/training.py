"""What can happen to a training run: each scenario harms one, lets it go on, and compares its end
with that of a run that nothing happened to, to the bit.

The runs have two micro-batches a step, whose gradients have the same sum in either order, so one
process and two end with the same bits.
"""

import os
import random
import resource
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from tests.faults.harness import Job, Row, Run, last_step, send, steps_of
from tests.runs import TRAIN_FLAGS, assert_same_training, flags, load, ranks
from util.errors import EXIT_STOPPED, EXIT_USER_ERROR

SCRIPT = "main_tokenbridge.py"
STEPS_PER_EPOCH = 3
GRACE = 60.0  # seconds until a run must have ended after a signal, or after a process has gone
GOES_ON = "going on after step "
SAVED = "saved checkpoint"


class Training(Run):
    """One run."""

    def __init__(self, inputs: Path, output: Path, steps: int, **changes):
        epochs = -(-steps // STEPS_PER_EPOCH)
        settings = dict(epochs=epochs, log_freq=1, save_steps=2, num_workers=0, resume="auto")
        settings |= dict(output_dir=output, accum_iter=None, global_batch=8) | changes
        super().__init__([SCRIPT], flags(inputs, TRAIN_FLAGS, settings), output)
        self.inputs, self.steps = inputs, steps

    def steps_lost(self) -> int:
        """How many steps all its starts together have done a second time."""
        steps = steps_of(self.log.read_text(errors="replace"))
        return sum(max(0, a - b + 1) for a, b in zip(steps, steps[1:], strict=False))


def judge(fault: str, injected: int, run: Training, problem: str = "") -> Row:
    """Of a run that has come to its end. problem: what else went wrong."""
    output = run.output.with_name(f"undisturbed{run.steps}")
    reference = Training(run.inputs, output, run.steps)
    reference.undisturbed(SCRIPT)
    if any(run.output.glob("*.damaged")):  # set aside by one of the starts
        problem = problem or "A CHECKPOINT WAS DAMAGED"
    try:
        assert_same_training(load(run.output), load(reference.output))
    except AssertionError:
        problem = problem or "ENDS DIFFERENTLY"
    survived, result = (0, problem) if problem else (injected, "ends with the same bits")
    return Row(fault, injected, survived, run.steps_lost(), result)


def kill_training(inputs: Path, folder: Path, kills: int, seed: int) -> Row:
    """kill -9 at random moments, on one process and two in turn."""
    rng, injected = random.Random(seed), 0
    run = Training(inputs, folder / "killed", 8 * kills)
    while injected < kills:
        job = run.start(processes=1 + injected % 2)
        if rng.random() < 0.8:
            job.wait_for(last_step)
        time.sleep(rng.uniform(0, 1))
        ended = not job.running
        job.kill()
        if ended:
            break
        injected += 1
    run.finish()
    return judge("kill -9 while training, 1 and 2 processes", injected, run)


def kill_saving(inputs: Path, folder: Path, kills: int, seed: int) -> Row:
    """kill -9 while a checkpoint is being written."""
    rng, injected = random.Random(seed), 0
    run = Training(inputs, folder / "killed_saving", 8 * kills, save_steps=1)
    while injected < kills:
        job, enough = run.start(), rng.randrange(1, 6)
        job.wait_for(lambda said, n=enough: said.count(SAVED) >= n)
        if not job.wait_for(lambda said: any(run.output.glob(".checkpoint-*.tmp"))):
            break
        job.kill()
        injected += 1
    run.finish()
    return judge("kill -9 while saving", injected, run)


def terminate(inputs: Path, folder: Path, signals: int, seed: int) -> Row:
    """A signal to a process, or to one worker of torchrun: saved, exit code 75, nothing lost."""
    rng, injected, problem = random.Random(seed), 0, ""
    run = Training(inputs, folder / "terminated", 20 * signals, save_steps=0)
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    while injected < signals:
        processes = 1 + injected % 2
        job = run.start(processes)
        job.wait_for(last_step)
        time.sleep(rng.uniform(0, 0.3))
        if not job.running:
            break
        # Under torchrun one of the workers is enough: they agree.
        target = job.process.pid if processes == 1 else job.workers(SCRIPT)[injected // 2 % 2]
        send(target, numbers[injected % 3])
        code = job.end(GRACE / 2)
        injected += 1
        if code != EXIT_STOPPED and (processes == 1 or "exitcode  : 75" not in job.printed()):
            problem = f"exit code {code}"
    run.finish()
    problem = problem or ("STEPS WERE LOST" if run.steps_lost() else "")
    return judge("SIGTERM, SIGUSR1, SIGINT", injected, run, problem)


def full_disk(inputs: Path, folder: Path) -> Row:
    """No checkpoint can be written: reported, training goes on, the one before stays."""
    run = Training(inputs, folder / "full", 24)
    job = run.start()
    job.wait_for(lambda said: SAVED in said)
    job.kill()
    kept = load(run.output)["step"]
    limited = run.start()
    resource.prlimit(limited.process.pid, resource.RLIMIT_FSIZE, (200_000, 200_000))
    code, printed = limited.end(), limited.printed()
    went_on = "was not saved: [Errno 27]" in printed and last_step(printed) == 24
    stayed = load(run.output)["step"] == kept and not any(run.output.glob(".checkpoint*"))
    resumed = f"{GOES_ON}{kept}" in run.finish()
    right = went_on and stayed and resumed and code == EXIT_USER_ERROR
    problem = "" if right else f"exit code {code}: {printed[-300:]}"
    return judge("full disk (file-size limit)", 1, run, problem)


def damaged_newest(inputs: Path, folder: Path, times: int, seed: int) -> Row:
    """A byte of the newest checkpoint changes, or its end is missing: the one before is taken."""
    rng, injected = random.Random(seed), 0
    run = Training(inputs, folder / "damaged", 24)
    while injected < times:
        job = run.start()
        job.wait_for(lambda said: said.count(SAVED) >= 2)
        job.kill()
        steps = sorted(run.output.glob("checkpoint-step*.pth"))
        if len(steps) < 2:
            break
        spoil(steps[-1], rng, cut=injected % 2 == 1)
        injected += 1
    run.finish()
    named = run.log.read_text(errors="replace").count("set aside as") >= injected
    for path in run.output.glob("*.damaged"):
        path.unlink()
    problem = "" if named else "nothing was set aside"
    return judge("newest checkpoint damaged", injected, run, problem)


def spoil(path: Path, rng: random.Random, cut: bool) -> None:
    """In place, so that all names of the file see it."""
    size = path.stat().st_size
    if cut:
        return os.truncate(path, rng.randrange(size))
    # The weights and moments make up nearly all of the middle; padding could be hit outside.
    place = rng.randrange(size // 4, size // 2)
    with path.open("r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 0xFF]))


def kill_worker(inputs: Path, folder: Path, kills: int, seed: int) -> Row:
    """A worker of torchrun dies: --max-restarts goes on by itself."""
    rng, injected = random.Random(seed), 0
    run = Training(inputs, folder / "worker", 30 * kills, resume=None)
    job = run.start(processes=2, restarts=kills + 1)
    while injected < kills:
        before = len(job.printed())
        job.wait_for(lambda said, n=before: SAVED in said[n:])
        time.sleep(rng.uniform(0, 0.3))
        victims = job.workers(SCRIPT)
        if not victims:
            break
        before = len(job.printed())
        send(rng.choice(victims), signal.SIGKILL)
        injected += 1
        if not job.wait_for(lambda said, n=before: GOES_ON in said[n:]):
            break
    assert job.end() == 0, job.printed()[-2000:]
    return judge("worker killed under torchrun --max-restarts", injected, run)


def kill_node(inputs: Path, folder: Path) -> Row:
    """Two nodes on loopback, one dies: the other ends and names it; started again, both go on."""
    run, other = (Training(inputs, folder / "nodes", 24) for _ in range(2))
    other.log = run.log.with_suffix(".1.log")

    def start() -> list[Job]:
        for node, own in zip((run, other), ranks(2), strict=True):
            node.env = own | {"LOCAL_RANK": 0}
        return [run.start(), other.start()]

    first, second = start()
    first.wait_for(lambda said: last_step(said) > 2)  # saved, and far from the end
    second.kill()
    code, printed = first.end(GRACE), first.printed()
    codes = [job.end() for job in start()]
    right = code == 1 and "stopped: process 1 (pid " in printed and codes == [0, 0]
    problem = "" if right else f"exit codes {code}, {codes}: {printed[-300:]}"
    return judge("one of two nodes dies", 1, run, problem)


def hang(inputs: Path, folder: Path) -> Row:
    """A process stands still (SIGSTOP): the others end within --dist_timeout and name it."""
    run = Training(inputs, folder / "hang", 3000, dist_timeout=8)
    row, job = Row("a process hangs", injected=1), run.start(processes=2)
    job.wait_for(lambda said: last_step(said) > 3)
    victim = job.workers(SCRIPT)[1]
    send(victim, signal.SIGSTOP)
    noticed = job.wait_for(lambda said: "main_tokenbridge.py: stopped: " in said, GRACE)
    row.survived = int(noticed and f"process 1 (pid {victim}" in job.printed())
    job.kill()
    row.result = "named within the time-out" if row.survived else job.printed()[-300:]
    return row


def scenarios(kills: int, seed: int) -> list[Callable[[Path, Path], Row]]:
    """Each takes the inputs and a folder. kills: of a training; the rest follows from it."""
    few = max(1, kills // 8)
    return [
        partial(kill_training, kills=kills, seed=seed),
        partial(kill_saving, kills=max(1, kills // 2), seed=seed),
        partial(terminate, signals=max(3, kills // 4), seed=seed),
        full_disk,
        partial(damaged_newest, times=few, seed=seed),
        partial(kill_worker, kills=few, seed=seed),
        kill_node,
        hang,
    ]
