"""Why a process stops: signals (SIGTERM, Ctrl-C's SIGINT, Slurm's SIGUSR1), or a lost process.

Anywhere but in a training step signals raise `Stopped` at once: evaluation, caching and
reconstruction go on where they were when they are started again. Training defers them to the end
of a step that all processes agree on, so that it can save.
"""

import atexit
import json
import multiprocessing.util
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace

INTERVAL = 1.0  # seconds between two signs of life
SURELY_DEAD = 60.0  # seconds without one; long work that holds the interpreter's lock is shorter
PROBABLY_DEAD = 4.0  # the same, where a connection has broken already
FINISHED = "finished"
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_state = SimpleNamespace(pid=0, received=None, deferred=False)


class Stopped(BaseException):
    """The process was asked to stop, and has done what it must not lose.

    Like KeyboardInterrupt no Exception: who catches whatever may fail lets it pass.
    """


def install() -> None:
    """Handle the signals from now on, in the main thread."""
    _state.pid, _state.received = os.getpid(), None
    for number in SIGNALS:
        signal.signal(number, _on_signal)


def _on_signal(number: int, _frame) -> None:
    # torchrun repeats what the terminal has sent already, so a second signal changes nothing;
    # and a forked child that has not set its own handlers yet is not the one who was meant.
    if os.getpid() == _state.pid and _state.received is None:
        _state.received = signal.Signals(number).name
        check()


def requested() -> bool:
    return _state.received is not None


def check() -> None:
    """Raise Stopped if a signal came whose exception got lost, as in a destructor."""
    if requested() and not _state.deferred:
        raise Stopped(_state.received)


def acknowledge() -> Stopped:
    """The exception of a deferred signal, or of another process's."""
    return Stopped(_state.received or "a signal to another process")


@contextmanager
def deferred(active: bool = True) -> Iterator[None]:
    """Signals are only noted, for `requested`; within it, active=False lets them raise again."""
    before, _state.deferred = _state.deferred, active
    try:
        check()
        yield
    finally:
        _state.deferred = before


def ignore_in_worker(_worker: int) -> None:
    """For DataLoader workers: Slurm and terminals signal them too, but their process decides."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@atexit.register  # later than multiprocessing's own, so before it: handlers run in reverse order
def _end_workers() -> None:
    """At exit, multiprocessing asks its workers to end by SIGTERM, which ours ignore."""
    for worker in multiprocessing.active_children():
        if worker.daemon:
            worker.kill()


@dataclass
class Peer:
    """What is known of one process; times in seconds of this one's clock."""

    name: str
    beat_at: float
    progress_at: float
    beats: int = 0
    progress: int = 0
    doing: str = "starting"
    ending: str = ""

    def update(self, beats: int, progress: int, doing: str, ending: str) -> None:
        now = time.monotonic()
        self.beat_at = now if beats != self.beats else self.beat_at
        self.progress_at = now if progress != self.progress else self.progress_at
        self.beats, self.progress, self.doing, self.ending = beats, progress, doing, ending


class Watchdog(threading.Thread):
    """Ends this process with a line that names who has died, or who holds everybody up.

    Once a second it publishes two counters, one that it raises itself (the process lives) and one
    that the main thread raises with every batch (it makes progress), and reads those of the others.
    Collectives alone would wait, and then name nobody.

    store: a TCPStore, served by process 0. names: of all processes by rank. timeout: seconds
    without progress of any of them. end: called with the reason.
    """

    def __init__(
        self, store, rank: int, names: list[str], timeout: float, end: Callable[[str], None]
    ):
        super().__init__(daemon=True, name="watchdog")
        self.store, self.rank, self.timeout, self.end = store, rank, timeout, end
        self.silence = min(SURELY_DEAD, timeout)  # seconds after which a process has died
        self.peers = [Peer(name, time.monotonic(), time.monotonic()) for name in names]
        self.own, self.store_lost = self.peers[rank], False
        self.others = [other for other in range(len(names)) if other != rank]
        self._stopping = threading.Event()
        self._exchange([])

    def beat(self, doing: str) -> None:
        self.own.update(self.own.beats, self.own.progress + 1, doing, "")

    def announce_end(self, why: str) -> None:
        """Say to the others why this process ends, once; they need not look for a reason."""
        if self._stopping.is_set():
            return
        self._stopping.set()
        self.own.ending = why
        self._exchange([])
        if why != FINISHED and self.rank == 0:
            time.sleep(2 * INTERVAL)  # the store ends with process 0: let the others read first
        if self.is_alive():  # a thread that comes out of the store while Python ends aborts it
            self.join(PROBABLY_DEAD)

    def run(self) -> None:
        while not self._stopping.wait(INTERVAL):
            self._exchange(self.others)
            if lost := self.find_lost():
                time.sleep(0 if self.rank else 2 * INTERVAL)
                if not self._stopping.is_set():  # else it was asked to stop, too
                    # The main thread waits in a collective that nothing else interrupts.
                    self.end(lost)
                return

    def _exchange(self, others: list[int]) -> None:
        """Publish this process's state, and read that of others."""
        self.own.beats += 1
        state = [self.own.beats, self.own.progress, self.own.doing, self.own.ending]
        try:
            self.store.set(str(self.rank), json.dumps(state))
            states = self.store.multi_get([str(rank) for rank in others]) if others else []
        except Exception:  # whatever a store says whose process has gone
            self.store_lost = True
            return
        for rank, state in zip(others, states, strict=True):
            self.peers[rank].update(*json.loads(state))

    def find_lost(self) -> str:
        """Who has died, has said that it ends, or holds everybody up; or ''."""
        if self.store_lost and self.rank != 0:
            return f"{self.peers[0].name} has died: the connection to it is lost"
        now, working = time.monotonic(), [peer for peer in self.peers if not peer.ending]
        for peer in self.peers:
            if peer.ending not in ("", FINISHED):
                return f"{peer.name} {peer.ending}"
            silent = now - peer.beat_at
            if not peer.ending and peer is not self.own and silent > self.silence:
                return f"{peer.name} has died: no sign of life for {silent:.0f} s ({peer.doing})"
        still = now - max((peer.progress_at for peer in working), default=now)
        behind = min((peer.progress for peer in working), default=0)
        if still < self.timeout or behind == 0:  # 0: it has not come to its first batch
            return ""
        names = [f"{peer.name} ({peer.doing})" for peer in working if peer.progress == behind]
        return f"no progress for {still:.0f} s (--dist_timeout): waiting for {' and '.join(names)}"
