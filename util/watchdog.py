"""Who is still there: every process publishes that it lives, and how far it has come.

A thread in each process publishes two counters once a second: one that it raises itself (the
process lives) and one that the main thread raises with every batch (it makes progress). From those
of the others it sees who has died, and who holds everybody up, and ends its own process with a line
that names the rank: collectives alone would wait, and then name nobody.
"""

import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

INTERVAL = 1.0  # seconds between two signs of life
SURELY_DEAD = 60.0  # seconds without one; long work that holds the interpreter's lock is shorter
PROBABLY_DEAD = 4.0  # the same, where a connection has broken already
FINISHED = "finished"


@dataclass
class Peer:
    """What is known of one process. The times are of this process's clock, in seconds."""

    name: str
    beats: int = -1
    progress: int = -1
    doing: str = ""
    ending: str = ""
    beat_at: float = 0.0
    progress_at: float = 0.0

    def update(self, beats: int, progress: int, doing: str, ending: str) -> None:
        now = time.monotonic()
        self.beat_at = now if beats != self.beats else self.beat_at
        self.progress_at = now if progress != self.progress else self.progress_at
        self.beats, self.progress, self.doing, self.ending = beats, progress, doing, ending


class Watchdog(threading.Thread):
    """names: of all processes by rank. timeout: seconds without progress of any of them.

    store: a TCPStore, served by process 0. silence: seconds after which a process has died.
    end: called with the reason when this process has nobody to go on with.
    """

    def __init__(
        self, store, rank: int, names: list[str], timeout: float, end: Callable[[str], None]
    ):
        super().__init__(daemon=True, name="watchdog")
        self.store, self.rank, self.timeout, self.end = store, rank, timeout, end
        self.silence = min(SURELY_DEAD, timeout)
        self.peers = [Peer(name) for name in names]
        self.beats, self.progress, self.doing, self.ending = 0, 0, "starting", ""
        for peer in self.peers:
            peer.update(self.beats, self.progress, self.doing, self.ending)
        self.store_lost = False
        self._stopping = threading.Event()
        self._exchange(with_peers=False)

    def beat(self, doing: str) -> None:
        """The main thread has come to this."""
        self.progress += 1
        self.doing = doing

    def announce_end(self, why: str) -> None:
        """Say to the others why this process ends; they need not look for a reason."""
        if self._stopping.is_set():
            return  # said already
        self.ending = why
        self._stopping.set()
        self._exchange(with_peers=False)
        if why != FINISHED:
            self._linger()

    def _linger(self) -> None:
        """The store ends with process 0: let the others read first what it has read, or they would
        name process 0.
        """
        if self.rank == 0:
            time.sleep(2 * INTERVAL)

    def run(self) -> None:
        while not self._stopping.wait(INTERVAL):
            self._exchange()
            if lost := self.find_dead() or self.find_hung():
                self._linger()
                if not self._stopping.is_set():  # else it was asked to stop, too
                    # The main thread waits in a collective that nothing else interrupts.
                    self.end(lost)
                return

    def _exchange(self, with_peers: bool = True) -> None:
        """Publish this process's state, and read those of all."""
        self.beats += 1
        state = [self.beats, self.progress, self.doing, self.ending]
        keys = [str(rank) for rank in range(len(self.peers))]
        try:
            self.store.set(str(self.rank), json.dumps(state))
            found = self.store.multi_get(keys) if with_peers else []
            for peer, state in zip(self.peers, found, strict=False):
                peer.update(*json.loads(state))
        except Exception:  # whatever a store says whose process has gone
            self.store_lost = True

    def find_dead(self) -> str:
        """Who has given no sign of life for too long, or has said that it ends; or ''."""
        if self.store_lost and self.rank != 0:
            return f"{self.peers[0].name} has died: the connection to it is lost"
        for rank, peer in enumerate(self.peers):
            if rank == self.rank or peer.ending == FINISHED:
                continue
            if peer.ending:
                return f"{peer.name} {peer.ending}"
            silent = time.monotonic() - peer.beat_at
            if silent > self.silence:
                return f"{peer.name} has died: no sign of life for {silent:.0f} s ({peer.doing})"
        return ""

    def find_hung(self) -> str:
        """Who holds everybody up, if nobody makes progress any more; or ''."""
        working = [peer for peer in self.peers if not peer.ending]
        still = time.monotonic() - max(peer.progress_at for peer in working)
        behind = min(peer.progress for peer in working)
        if still < self.timeout or behind <= 0:
            return ""
        slowest = [peer for peer in working if peer.progress == behind]
        where = f"all {len(working)} processes wait at the same place ({self.doing})"
        if len(slowest) < len(working):
            where = "waiting for " + " and ".join(f"{p.name} ({p.doing})" for p in slowest)
        return f"no progress for {still:.0f} s (--dist_timeout): {where}"
