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
from tests.runs import free_port

TIMEOUT = 300.0
LIMITED = """
import os, resource, sys
limit, *command = sys.argv[1:]
resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit),) * 2)
os.execv(command[0], command)
"""


@dataclass
class Row:
    """What became of one kind of fault. survived: those after which the stated result came."""

    fault: str
    injected: int = 0
    survived: int = 0
    steps_lost: int = 0
    result: str = ""


class Job:
    """A command with all its children; what it prints goes to a file.

    limit: largest file in bytes that it can write, which is a full disk to it.
    """

    def __init__(self, *command, log: Path, limit: int | None = None, **env):
        self.log = log
        start = [sys.executable]
        if limit is not None:
            start += ["-c", LIMITED, limit, sys.executable]
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                [*map(str, (*start, *command))],
                cwd=ROOT,
                env=environment(**env),
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.begins_at, self.ends_at = log.stat().st_size, None

    @staticmethod
    def torchrun(processes: int, restarts: int = 0) -> list[str]:
        """The words before a script that start so many processes of it."""
        launch = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}"]
        launch += [f"--master_port={free_port()}", f"--max-restarts={restarts}"]
        return launch if processes > 1 else []

    def printed(self) -> str:
        """What it has printed so far; the file may go on with its successor's."""
        with self.log.open("rb") as file:
            file.seek(self.begins_at)
            length = -1 if self.ends_at is None else self.ends_at - self.begins_at
            return file.read(length).decode(errors="replace")

    @property
    def running(self) -> bool:
        return self.process.poll() is None

    def wait_for(self, condition: Callable[[], object], timeout: float = TIMEOUT) -> bool:
        """Until the condition holds; false if the command has ended before."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if condition():
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
        self.ends_at = self.log.stat().st_size

    def end(self, timeout: float = TIMEOUT) -> int:
        """The exit code, when it has ended by itself."""
        try:
            self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            raise TimeoutError(f"no end after {timeout:.0f} s:\n{self.printed()[-2000:]}") from None
        self.ends_at = self.log.stat().st_size
        return self.process.returncode

    def workers(self, script: str) -> list[int]:
        """The children of torchrun that run a script, in the order of their ranks."""
        return sorted(pid for pid in children(self.process.pid) if script in command_line(pid))


def send(pid: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):  # it was faster
        os.kill(pid, number)


def command_line(pid: int) -> str:
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    return ""


def children(pid: int) -> list[int]:
    found = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True).stdout
    return [int(line) for line in found.split()]


def descendants(pid: int) -> list[int]:
    return [d for child in children(pid) for d in (child, *descendants(child))]


def steps_of(printed: str) -> list[int]:
    """The steps that training said were done."""
    return [int(step) for step in re.findall(r"step (\d+)/", printed)]


def last_step(printed: str) -> int:
    """The last of them; 0 if none."""
    return max(steps_of(printed), default=0)


def resumed_step(printed: str) -> int:
    """The step after which training went on; 0 if it began anew."""
    return max((int(step) for step in re.findall(r"going on after step (\d+)", printed)), default=0)
