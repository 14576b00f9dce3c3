"""Signals that ask a process to stop: SIGTERM, SIGINT (Ctrl-C), SIGUSR1 (Slurm's warning).

Anywhere but in a training step they raise `Stopped` at once: evaluation, caching and
reconstruction go on where they were when they are started again. Training defers them to the end
of a step that all processes agree on, so that it can save.
"""

import atexit
import multiprocessing.util
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name)
)


class Stopped(Exception):
    """The process was asked to stop, and has done what it must not lose."""


@dataclass
class _State:
    """Of the process: signals have no other place. pid: whose handlers they are."""

    pid: int = 0
    received: str | None = None
    deferred: bool = False


_state = _State()


def install() -> None:
    """Handle the signals from now on; for the main thread, once."""
    _state.pid, _state.received = os.getpid(), None
    for number in SIGNALS:
        signal.signal(number, _on_signal)


def _on_signal(number: int, _frame) -> None:
    # torchrun repeats what the terminal has sent already, so a second signal changes nothing;
    # and a forked child that has not set its own handlers yet is not the one who was meant.
    if os.getpid() != _state.pid or _state.received is not None:
        return
    _state.received = signal.Signals(number).name
    if not _state.deferred:
        raise Stopped(_state.received)


def requested() -> bool:
    return _state.received is not None


def check() -> None:
    """Raise Stopped if a signal came whose exception got lost, as in a destructor."""
    if _state.received is not None and not _state.deferred:
        raise Stopped(_state.received)


def acknowledge() -> Stopped:
    """The exception of a deferred signal, or of another process's."""
    return Stopped(_state.received or "a signal to another process")


@contextmanager
def deferred() -> Iterator[None]:
    """Signals are only noted; who asks `requested` does what is right."""
    _state.deferred = True
    try:
        yield
    finally:
        _state.deferred = False


@contextmanager
def immediate() -> Iterator[None]:
    """Within `deferred`: signals raise again, those that wait included."""
    _state.deferred = False
    try:
        check()
        yield
    finally:
        _state.deferred = True


def ignore_in_worker(_worker: int) -> None:
    """For DataLoader workers: Slurm and terminals signal them too, but their process decides."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _end_workers() -> None:
    """At exit, multiprocessing asks its workers to end by SIGTERM, which ours ignore."""
    for worker in multiprocessing.active_children():
        if worker.daemon:
            worker.kill()


# Exit handlers run in the opposite order of their registration: before multiprocessing's own.
atexit.register(_end_workers)
