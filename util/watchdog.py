"""Who is still there: every process tells the others that it lives, and how far it has come.

A thread in each process publishes two counters once a second: one that it raises itself (the
process lives) and one that the main thread raises with every batch (it makes progress). From what
the others publish it sees who has died, and who holds everybody up, and ends its own process
with a line that names the rank: collectives alone would wait, and then name nobody.
"""

import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

INTERVAL = 1.0  # seconds between two signs of life
SURELY_DEAD = 60.0  # seconds without one; long work that holds the interpreter's lock is shorter
PROBABLY_DEAD = 4.0  # the same, where a connection has broken already
FINISHED = "finished"


class Store(Protocol):
    """The part of torch.distributed's TCPStore that is used here."""

    def set(self, key: str, value: str) -> None: ...

    def multi_get(self, keys: list[str]) -> list[bytes]: ...


@dataclass
class Peer:
    """What is known of one process. The times are this process's own, in seconds."""

    name: str
    beats: int = -1
    progress: int = -1
    doing: str = "starting"
    goodbye: str = ""
    beat_at: float = field(default_factory=lambda: time.monotonic())
    progress_at: float = field(default_factory=lambda: time.monotonic())

    def update(self, beats: int, progress: int, doing: str, goodbye: str) -> None:
        now = time.monotonic()
        if beats != self.beats:
            self.beats, self.beat_at = beats, now
        if progress != self.progress:
            self.progress, self.progress_at = progress, now
        self.doing, self.goodbye = doing, goodbye


class Watchdog(threading.Thread):
    """names: of all processes by rank. timeout: seconds without progress of any of them.

    end: called with the reason when this process has nobody to go on with.
    """

    def __init__(
        self,
        store: Store,
        rank: int,
        names: list[str],
        timeout: float,
        end: Callable[[str], None],
        poll: float = INTERVAL,
    ):
        super().__init__(daemon=True, name="watchdog")
        self.store, self.rank, self.timeout = store, rank, timeout
        self.end, self.poll = end, poll
        self.peers = [Peer(name) for name in names]
        self.progress, self.doing, self.goodbye = 0, "starting", ""
        self.beats = 0
        self.store_lost = False
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        self._publish()

    def beat(self, doing: str) -> None:
        """The main thread has come to this."""
        self.progress += 1
        self.doing = doing

    def say_goodbye(self, why: str) -> None:
        """Tell the others why this process ends; they need not look for a reason."""
        if self._stopping.is_set():
            return  # said already
        self.goodbye = why
        self._stopping.set()
        self._publish()
        if why != FINISHED:
            self.linger()

    def linger(self) -> None:
        """The store ends with the main process: let the others read first what it has read, or
        they would name the main process.
        """
        if self.rank == 0:
            time.sleep(2 * self.poll)

    def run(self) -> None:
        while not self._stopping.wait(self.poll):
            self._exchange()
            lost = self.find_dead(min(SURELY_DEAD, self.timeout)) or self.find_hung()
            if lost and not self._stopping.is_set():
                self.linger()
                if self._stopping.is_set():
                    return  # asked to stop, too
                # The main thread waits in a collective that nothing else interrupts.
                return self.end(lost)

    def _exchange(self) -> None:
        self._publish()
        keys = [str(rank) for rank in range(len(self.peers))]
        try:
            with self._lock:
                states = self.store.multi_get(keys)
        except Exception:  # whatever a store says whose process has gone
            self.store_lost = True
            return
        for peer, state in zip(self.peers, states, strict=True):
            peer.update(*json.loads(state))

    def _publish(self) -> None:
        self.beats += 1
        state = json.dumps([self.beats, self.progress, self.doing, self.goodbye])
        try:
            with self._lock:
                self.store.set(str(self.rank), state)
        except Exception:
            self.store_lost = True

    def find_dead(self, silence: float) -> str:
        """Who has given no sign of life for so many seconds, or has said that it ends; or ''."""
        if self.store_lost and self.rank != 0:
            return f"{self.peers[0].name} has died: the connection to it is lost"
        now = time.monotonic()
        for rank, peer in enumerate(self.peers):
            if rank == self.rank or peer.goodbye == FINISHED:
                continue
            if peer.goodbye:
                return f"{peer.name} {peer.goodbye}"
            if now - peer.beat_at > silence:
                return (
                    f"{peer.name} has died: no sign of life for {now - peer.beat_at:.0f} s "
                    f"({peer.doing})"
                )
        return ""

    def find_hung(self) -> str:
        """Who holds everybody up, if nobody makes progress any more; or ''."""
        working = [peer for peer in self.peers if not peer.goodbye]
        still = time.monotonic() - max(peer.progress_at for peer in working)
        if still < self.timeout or any(peer.progress <= 0 for peer in working):
            return ""
        behind = min(peer.progress for peer in working)
        slowest = [peer for peer in working if peer.progress == behind]
        if len(slowest) == len(working):
            where = f"all {len(working)} processes wait at the same place ({self.doing})"
            return f"no progress for {still:.0f} s (--dist_timeout): {where}"
        names = " and ".join(f"{peer.name} ({peer.doing})" for peer in slowest)
        return f"no progress for {still:.0f} s (--dist_timeout): waiting for {names}"

    def who_is_lost(self) -> str:
        """After a connection has broken: whose it was, as soon as that shows."""
        deadline = time.monotonic() + 3 * PROBABLY_DEAD
        while time.monotonic() < deadline:
            found = self.find_dead(PROBABLY_DEAD)
            if found:
                self.linger()
                return found
            time.sleep(self.poll / 2)
        return "another process ended first"
