"""Who has died and who holds everybody up is named."""

import time

import pytest

from util import watchdog
from util.watchdog import FINISHED, Watchdog


class Board:
    """What TCPStore does, in one process."""

    def __init__(self):
        self.values: dict[str, bytes] = {}

    def set(self, key: str, value: str) -> None:
        self.values[key] = value.encode()

    def multi_get(self, keys: list[str]) -> list[bytes]:
        return [self.values[key] for key in keys]


NAMES = ["process 0 (a)", "process 1 (b)", "process 2 (c)"]


@pytest.fixture
def now(monkeypatch):
    """A clock that the test moves."""
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(watchdog, "INTERVAL", 0)
    return clock


@pytest.fixture
def dogs(now) -> list[Watchdog]:
    return new_dogs(end=lambda rank, why: None)


def new_dogs(end) -> list[Watchdog]:
    board = Board()
    ends = [lambda why, rank=rank: end(rank, why) for rank in range(3)]
    return [Watchdog(board, rank, NAMES, 80.0, ends[rank]) for rank in range(3)]


def exchange(dogs: list[Watchdog]) -> None:
    for dog in (*dogs, *dogs):  # twice: the first has asked before the others wrote
        dog._exchange()


def test_everybody_lives_and_works(now, dogs):
    for _ in range(20):
        now[0] += 10
        for dog in dogs:
            dog.beat("step")
        exchange(dogs)
        assert [dog.find_dead() or dog.find_hung() for dog in dogs] == [""] * 3


def test_process_without_a_sign_of_life_has_died(now, dogs):
    exchange(dogs)
    exchange(dogs[:2])  # who have read the third's last sign now
    now[0] += 59
    exchange(dogs[:2])
    assert dogs[0].find_dead() == ""
    now[0] += 2
    exchange(dogs[:2])
    assert dogs[0].find_dead().startswith("process 2 (c) has died: no sign of life for 61 s")


def test_process_that_said_why_it_ends_is_quoted(dogs):
    dogs[1].announce_end("stopped with an error: no such file")
    dogs[1].announce_end("again")  # the first reason counts
    exchange(dogs[:1])
    assert dogs[0].find_dead() == "process 1 (b) stopped with an error: no such file"


def test_process_that_has_finished_is_missed_by_nobody(now, dogs):
    dogs[2].announce_end(FINISHED)
    now[0] += 1000
    exchange(dogs[:2])
    assert dogs[0].find_dead() == ""


def test_main_process_is_missed_when_its_store_is_gone(dogs):
    dogs[1].store = None
    dogs[1]._exchange()
    assert dogs[1].find_dead().startswith("process 0 (a) has died")


def test_who_is_behind_is_named_when_nobody_makes_progress(now, dogs):
    for dog in dogs:
        dog.beat("step 1: forward")
    for dog in (dogs[0], dogs[2]):
        dog.beat("step 1: backward")
    exchange(dogs)
    now[0] += 79
    exchange(dogs)
    assert dogs[0].find_hung() == ""
    now[0] += 2
    for dog in dogs:
        exchange(dogs)
        line = dog.find_hung()
        assert "no progress for 81 s" in line and "--dist_timeout" in line
        assert line.endswith("waiting for process 1 (b) (step 1: forward)")


def test_slow_start_is_no_hang(now, dogs):
    dogs[0].beat("step 1")
    now[0] += 1000
    exchange(dogs)
    assert dogs[0].find_hung() == ""


def test_one_that_works_on_is_waited_for(now, dogs):
    """An evaluation ends when its slowest process has drawn its last batch."""
    for dog in dogs:
        dog.beat("batch 1")
    for _ in range(10):
        now[0] += 70
        dogs[1].beat("batch")
        exchange(dogs)
        assert dogs[0].find_hung() == ""


def test_main_process_lets_the_others_read_who_is_lost_before_its_store_ends(monkeypatch):
    """Each thread ends its process with the reason."""
    ended = []
    monkeypatch.setattr(watchdog, "INTERVAL", 0.1)

    def end(rank: int, why: str) -> None:
        ended.append((rank, why))
        if rank == 0:  # and its store with it
            dogs[0].store.multi_get = dogs[0].store.set = None

    dogs = new_dogs(end)
    for dog in dogs[:2]:
        dog.start()
    dogs[2].announce_end("was stopped by SIGKILL")
    for dog in dogs[:2]:
        dog.join(10)
    assert sorted(ended) == [(r, "process 2 (c) was stopped by SIGKILL") for r in (0, 1)]
