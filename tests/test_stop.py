"""Signals: at once where nothing can be lost, at the end of a step in training."""

import os
import signal

import pytest

from util import stop


@pytest.fixture(autouse=True)
def handlers():
    before = {number: signal.getsignal(number) for number in stop.SIGNALS}
    stop.install()
    yield
    stop._state.received = None
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", stop.SIGNALS)
def test_signal_raises_at_once(number):
    with pytest.raises(stop.Stopped, match=signal.Signals(number).name):
        os.kill(os.getpid(), number)
        signal.sigtimedwait([], 1)  # the handler runs before anything else does


def test_deferred_signal_waits_to_be_asked_for_and_a_second_one_changes_nothing():
    """torchrun repeats the terminal's, in the middle of saving."""
    with stop.deferred():
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested()
        stop.check()
        with pytest.raises(stop.Stopped, match="SIGTERM"), stop.deferred(active=False):
            raise AssertionError("not reached")
        os.kill(os.getpid(), signal.SIGINT)
        assert str(stop.acknowledge()) == "SIGTERM"
    with pytest.raises(stop.Stopped):
        stop.check()
    os.kill(os.getpid(), signal.SIGINT)


def test_child_keeps_out_of_it_and_workers_ignore_what_their_process_decides():
    child = os.fork()
    if child == 0:
        os.kill(os.getpid(), signal.SIGTERM)
        os._exit(0 if not stop.requested() else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    stop.ignore_in_worker(0)
    for number in stop.SIGNALS:
        os.kill(os.getpid(), number)
    assert not stop.requested()
