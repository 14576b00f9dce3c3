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
from types import SimpleNamespace

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
