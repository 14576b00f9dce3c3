"""Start a script as a user does, do it harm at a chosen moment, and see what is left."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tests.conftest import ROOT, environment
from tests.runs import fork_together, free_port

TIMEOUT = 300.0


@dataclass
class Row:
    """What became of one kind of fault. survived: those after which the stated result came."""

    fault: str
    injected: int = 0
    survived: int = 0
    steps_lost: int = 0
    result: str = ""


class Job:
    """A command with all its children; what it prints goes to a file."""

    def __init__(self, *command, log: Path, **env):
        self.log = log
        with log.open("ab") as output:
            self.begins_at = output.tell()
            self.process = subprocess.Popen(
                [sys.executable, *map(str, command)],
                cwd=ROOT,
                env=environment(**env),
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def printed(self) -> str:
        """What it has printed so far, and what its successor prints into the same file."""
        with self.log.open("rb") as file:
            file.seek(self.begins_at)
            return file.read().decode(errors="replace")

    @property
    def running(self) -> bool:
        return self.process.poll() is None

    def wait_for(self, condition: Callable[[str], object], timeout: float = TIMEOUT) -> bool:
        """Until what it has printed meets the condition; false if the command has ended before."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if condition(self.printed()):
                return True
            if not self.running:
                return False
            time.sleep(0.002)
        self.kill()
        raise TimeoutError(f"nothing happened for {timeout:.0f} s:\n{self.printed()[-2000:]}")

    def kill(self) -> None:
        """kill -9, the children first known and then killed with it."""
        for pid in (*descendants(self.process.pid), self.process.pid):
            send(pid, signal.SIGKILL)
        self.process.wait()

    def end(self, timeout: float = TIMEOUT) -> int:
        """The exit code, when it has ended by itself."""
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            raise TimeoutError(f"no end after {timeout:.0f} s:\n{self.printed()[-2000:]}") from None

    def workers(self, script: str) -> list[int]:
        """The children of torchrun that run a script, in the order of their ranks."""
        return sorted(children(self.process.pid, script))


class Run:
    """A script in its folder, started as often as need be.

    command: its words before the flags. env: variables beside the usual ones.
    """

    def __init__(self, command: list[str], argv: list[str], output: Path, **env):
        self.command, self.argv, self.env = command, argv, env
        self.output, self.log = output, output.with_suffix(".log")

    def start(self, processes: int = 1, restarts: int = 0) -> Job:
        """restarts: those of torchrun, by which two and more processes are started."""
        launch = []
        if processes > 1:
            launch = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}"]
            launch += [f"--master_port={free_port()}", f"--max-restarts={restarts}"]
        return Job(*launch, *self.command, *self.argv, log=self.log, **self.env)

    def finish(self, processes: int = 1) -> str:
        """Let it go on to its end; what it printed."""
        job = self.start(processes)
        assert job.end() == 0, job.printed()[-2000:]
        return job.printed()

    def undisturbed(self, script: str) -> None:
        """Nothing happens to it, so it may be forked from where torch is imported already."""
        if not self.output.exists():
            ((code, _, error),) = fork_together([script, *self.argv], timeout=TIMEOUT)
            assert code == 0, error


def send(pid: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):  # it was faster
        os.kill(pid, number)


def children(pid: int, words: str = "") -> list[int]:
    """Those that have the words in their command line."""
    command = ["pgrep", "-P", str(pid), "-f", words]
    return [int(line) for line in subprocess.run(command, capture_output=True).stdout.split()]


def descendants(pid: int) -> list[int]:
    return [d for child in children(pid) for d in (child, *descendants(child))]


def steps_of(printed: str) -> list[int]:
    """The steps that training said were done."""
    return [int(step) for step in re.findall(r"step (\d+)/", printed)]


def last_step(printed: str) -> int:
    """The last of them; 0 if none."""
    return max(steps_of(printed), default=0)
