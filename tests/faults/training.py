"""What can happen to a training run: each scenario harms one, lets it go on, and compares its end
with that of a run that nothing happened to, to the bit.

The runs have two micro-batches a step, whose gradients have the same sum in either order, so one
process and two end with the same bits.
"""

import os
import random
import signal
import time
from pathlib import Path

import torch

from tests.faults.harness import TIMEOUT, Job, Row, last_step, resumed_step, send, steps_of
from tests.runs import TRAIN_FLAGS, flags, fork_together, load, ranks, tensors
from util.errors import EXIT_STOPPED, EXIT_USER_ERROR

SCRIPT = "main_tokenbridge.py"
STEPS_PER_EPOCH = 3
GRACE = 60.0  # seconds until a run must have ended after a signal, or after a process has gone
GOES_ON = "going on after"


class Training:
    """One run in its folder, started as often as need be."""

    def __init__(self, inputs: Path, output: Path, steps: int, **changes):
        epochs = -(-steps // STEPS_PER_EPOCH)
        settings = dict(epochs=epochs, log_freq=1, save_steps=2, num_workers=0, resume="auto")
        settings |= dict(output_dir=output, accum_iter=None, global_batch=8) | changes
        self.argv = flags(inputs, TRAIN_FLAGS, settings)
        self.output, self.log = output, output.with_suffix(".log")

    def start(self, processes: int = 1, restarts: int = 0, limit: int | None = None) -> Job:
        launch = Job.torchrun(processes, restarts)
        return Job(*launch, SCRIPT, *self.argv, log=self.log, limit=limit)

    def finish(self) -> str:
        """Let it go on to its end; what it printed."""
        job = self.start()
        assert job.end() == 0, job.printed()[-2000:]
        return job.printed()

    def steps_lost(self) -> int:
        """How many steps all its starts together have done a second time."""
        steps = steps_of(self.log.read_text(errors="replace"))
        return sum(max(0, a - b + 1) for a, b in zip(steps, steps[1:], strict=False))


def judge(row: Row, run: Training, reference: Training, problem: str = "") -> Row:
    """problem: what else went wrong."""
    found, expected = (tensors(load(each.output)) for each in (run, reference))
    same = list(found) == list(expected)
    same = same and all(torch.equal(found[name], expected[name]) for name in expected)
    if any(run.output.glob("*.damaged")):  # set aside by one of the starts
        problem = problem or "A CHECKPOINT WAS DAMAGED"
    row.survived = row.injected if same and not problem else 0
    row.result = problem or ("ends with the same bits" if same else "ENDS DIFFERENTLY")
    return row


def undisturbed(inputs: Path, folder: Path, steps: int) -> Training:
    """Nothing happens to it, so it may be forked from where torch is imported already."""
    run = Training(inputs, folder / f"undisturbed{steps}", steps)
    if not run.output.exists():
        ((code, _, error),) = fork_together([SCRIPT, *run.argv], timeout=TIMEOUT)
        assert code == 0, error
    return run


def kill_training(inputs: Path, folder: Path, kills: int, seed: int) -> Row:
    """kill -9 at random moments, on one process and two in turn."""
    steps, rng = 8 * kills, random.Random(seed)
    reference = undisturbed(inputs, folder, steps)
    run = Training(inputs, folder / "killed", steps)
    row = Row("kill -9 while training, 1 and 2 processes")
    while row.injected < kills:
        job = run.start(processes=1 + row.injected % 2)
        if rng.random() < 0.8:
            job.wait_for(lambda job=job: last_step(job.printed()))
        time.sleep(rng.uniform(0, 1))
        ended = not job.running
        job.kill()
        if ended:
            break
        row.injected += 1
    run.finish()
    row.steps_lost = run.steps_lost()
    return judge(row, run, reference)


def kill_saving(inputs: Path, folder: Path, kills: int, seed: int) -> Row:
    """kill -9 while a checkpoint is being written."""
    rng = random.Random(seed)
    reference = undisturbed(inputs, folder, 8 * kills)
    run = Training(inputs, folder / "killed_saving", 8 * kills, save_steps=1)
    row = Row("kill -9 while saving")
    for _ in range(kills):
        job, enough = run.start(), rng.randrange(1, 6)
        job.wait_for(lambda job=job, n=enough: job.printed().count("saved checkpoint") >= n)
        if not job.wait_for(lambda: any(run.output.glob(".checkpoint-*.tmp"))):
            break
        job.kill()
        row.injected += 1
    run.finish()
    row.steps_lost = run.steps_lost()
    return judge(row, run, reference)


def terminate(inputs: Path, folder: Path, signals: int, seed: int) -> Row:
    """A signal to a process, or to one worker of torchrun: saved, exit code 75, nothing lost."""
    rng, steps = random.Random(seed), 20 * signals
    reference = undisturbed(inputs, folder, steps)
    run = Training(inputs, folder / "terminated", steps, save_steps=0)
    row, problem = Row("SIGTERM, SIGUSR1, SIGINT"), ""
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    for i in range(signals):
        processes = 1 + i % 2
        job = run.start(processes)
        job.wait_for(lambda job=job: last_step(job.printed()))
        time.sleep(rng.uniform(0, 0.3))
        if not job.running:
            break
        # Under torchrun one of the workers is enough: they agree.
        target = job.workers(SCRIPT)[i // 2 % 2] if processes > 1 else job.process.pid
        send(target, numbers[i % 3])
        code = job.end(GRACE / 2)
        row.injected += 1
        if code != EXIT_STOPPED and (processes == 1 or "exitcode  : 75" not in job.printed()):
            problem = f"exit code {code}"
    run.finish()
    row.steps_lost = run.steps_lost()
    return judge(row, run, reference, problem)


def full_disk(inputs: Path, folder: Path) -> Row:
    """No checkpoint can be written: reported, training goes on, the one before stays."""
    reference = undisturbed(inputs, folder, 24)
    run = Training(inputs, folder / "full", 24)
    job = run.start()
    job.wait_for(lambda: "saved checkpoint" in job.printed())
    job.kill()
    kept, row = load(run.output)["step"], Row("full disk (file-size limit)", injected=1)
    limited = run.start(limit=200_000)
    code, printed = limited.end(), limited.printed()
    went_on = "was not saved: [Errno 27]" in printed and last_step(printed) == 24
    stayed = load(run.output)["step"] == kept and not any(run.output.glob(".checkpoint*"))
    row.steps_lost = max(0, kept - resumed_step(run.finish()))
    right = went_on and stayed and code == EXIT_USER_ERROR
    return judge(row, run, reference, "" if right else f"exit code {code}: {printed[-300:]}")


def damaged_newest(inputs: Path, folder: Path, times: int, seed: int) -> Row:
    """A byte of the newest checkpoint changes, or its end is missing: the one before is taken."""
    rng = random.Random(seed)
    reference = undisturbed(inputs, folder, 24)
    run = Training(inputs, folder / "damaged", 24)
    row = Row("newest checkpoint damaged")
    for i in range(times):
        job = run.start()
        job.wait_for(lambda job=job: job.printed().count("saved checkpoint") >= 2)
        job.kill()
        steps = sorted(run.output.glob("checkpoint-step*.pth"))
        if len(steps) < 2:
            break
        spoil(steps[-1], rng, cut=i % 2 == 1)
        row.injected += 1
    run.finish()
    row.steps_lost = run.steps_lost()
    named = run.log.read_text(errors="replace").count("set aside as") >= row.injected
    for path in run.output.glob("*.damaged"):
        path.unlink()
    return judge(row, run, reference, "" if named else "nothing was set aside")


def spoil(path: Path, rng: random.Random, cut: bool) -> None:
    """In place, so that all names of the file see it."""
    size = path.stat().st_size
    with path.open("r+b") as file:
        if cut:
            file.truncate(rng.randrange(size))
            return
        # The weights and moments make up nearly all of the middle; padding could be hit outside.
        file.seek(rng.randrange(size // 4, size // 2))
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 0xFF]))


def kill_worker(inputs: Path, folder: Path, kills: int, seed: int) -> Row:
    """A worker of torchrun dies: --max-restarts goes on by itself."""
    rng, steps = random.Random(seed), 30 * kills
    reference = undisturbed(inputs, folder, steps)
    run = Training(inputs, folder / "worker", steps, resume=None)
    row = Row("worker killed under torchrun --max-restarts")
    job = run.start(processes=2, restarts=kills + 1)
    for _ in range(kills):
        before = len(job.printed())
        job.wait_for(lambda n=before: "saved checkpoint" in job.printed()[n:])
        time.sleep(rng.uniform(0, 0.3))
        victims = job.workers(SCRIPT)
        if not victims:
            break
        before = len(job.printed())
        send(rng.choice(victims), signal.SIGKILL)
        row.injected += 1
        if not job.wait_for(lambda n=before: GOES_ON in job.printed()[n:]):
            break
    assert job.end() == 0, job.printed()[-2000:]
    row.steps_lost = run.steps_lost()
    return judge(row, run, reference)


def kill_node(inputs: Path, folder: Path) -> Row:
    """Two nodes on loopback, one dies: the other ends and names it; started again, both go on."""
    reference = undisturbed(inputs, folder, 24)
    run = Training(inputs, folder / "nodes", 24)

    def start() -> list[Job]:
        logs = [run.log, run.output.with_suffix(".1.log")]
        meeting = [own | {"LOCAL_RANK": 0} for own in ranks(2)]
        return [Job(SCRIPT, *run.argv, log=logs[rank], **meeting[rank]) for rank in (0, 1)]

    first, second = start()
    first.wait_for(lambda: last_step(first.printed()) > 2)  # saved, and far from the end
    second.kill()
    code = first.end(GRACE)
    named = "stopped: process 1 (pid " in first.printed()
    again = start()
    codes = [job.end() for job in again]
    row = Row("one of two nodes dies", injected=1, steps_lost=run.steps_lost())
    right = code == 1 and named and codes == [0, 0]
    return judge(
        row, run, reference, "" if right else f"exit code {code}, {first.printed()[-300:]}"
    )


def hang(inputs: Path, folder: Path) -> Row:
    """A process stands still (SIGSTOP): the others end within --dist_timeout and name it."""
    run = Training(inputs, folder / "hang", 3000, dist_timeout=8)
    row, job = Row("a process hangs", injected=1), run.start(processes=2)
    job.wait_for(lambda: last_step(job.printed()) > 3)
    victim = job.workers(SCRIPT)[1]
    send(victim, signal.SIGSTOP)
    noticed = job.wait_for(lambda: "main_tokenbridge.py: stopped: " in job.printed(), GRACE)
    row.survived = int(noticed and f"process 1 (pid {victim}" in job.printed())
    job.kill()
    row.result = "named within the time-out" if row.survived else job.printed()[-300:]
    return row
