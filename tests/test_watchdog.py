"""Who has died and who holds everybody up is told by its name."""

import threading
import time

import pytest

from util.watchdog import FINISHED, PROBABLY_DEAD, Watchdog


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
    return clock


def new_dogs(timeout: float = 50.0) -> list[Watchdog]:
    board = Board()
    return [Watchdog(board, rank, NAMES, timeout, end=lambda lost: None) for rank in range(3)]


def exchange(dogs: list[Watchdog]) -> None:
    for dog in (*dogs, *dogs):  # twice: the first has asked before the others told
        dog._exchange()


def test_everybody_lives_and_works(now):
    dogs = new_dogs()
    for _ in range(20):
        now[0] += 10
        for dog in dogs:
            dog.beat("step")
        exchange(dogs)
        assert [dog.find_dead(60) or dog.find_hung() for dog in dogs] == [""] * 3


def test_process_without_a_sign_of_life_has_died(now):
    dogs = new_dogs()
    exchange(dogs)
    exchange(dogs[:2])  # who have heard the third's last sign now
    now[0] += 61
    exchange(dogs[:2])
    assert dogs[0].find_dead(60).startswith("process 2 (c) has died: no sign of life for 61 s")
    assert dogs[0].find_dead(62) == ""


def test_process_that_said_why_it_ends_is_quoted(now):
    dogs = new_dogs()
    dogs[1].say_goodbye("stopped with an error: no such file")
    dogs[1].say_goodbye("again")  # the first reason counts
    exchange(dogs[:1])
    assert dogs[0].find_dead(60) == "process 1 (b) stopped with an error: no such file"


def test_process_that_has_finished_is_missed_by_nobody(now):
    dogs = new_dogs()
    dogs[2].say_goodbye(FINISHED)
    now[0] += 1000
    exchange(dogs[:2])
    assert dogs[0].find_dead(60) == ""


def test_main_process_is_missed_when_its_store_is_gone(now):
    dogs = new_dogs()
    dogs[1].store = None
    dogs[1]._exchange()
    assert dogs[1].find_dead(60).startswith("process 0 (a) has died")


def test_who_is_behind_is_named_when_nobody_makes_progress(now):
    dogs = new_dogs()
    for dog in dogs:
        dog.beat("step 1: forward")
    for dog in (dogs[0], dogs[2]):
        dog.beat("step 1: backward")
    exchange(dogs)
    now[0] += 49
    exchange(dogs)
    assert dogs[0].find_hung() == ""
    now[0] += 2
    for dog in dogs:
        exchange(dogs)
        found = dog.find_hung()
        assert "no progress for 51 s" in found and "--dist_timeout" in found
        assert found.endswith("waiting for process 1 (b) (step 1: forward)")


def test_slow_start_is_no_hang(now):
    dogs = new_dogs()
    dogs[0].beat("step 1")
    now[0] += 1000
    exchange(dogs)
    assert dogs[0].find_hung() == ""


def test_one_that_works_on_is_waited_for(now):
    """An evaluation ends when its slowest process has drawn its last batch."""
    dogs = new_dogs()
    for dog in dogs:
        dog.beat("batch 1")
    for _ in range(10):
        now[0] += 40
        dogs[1].beat("batch")
        exchange(dogs)
        assert dogs[0].find_hung() == ""


def test_thread_ends_its_process_with_the_reason():
    ended, done = [], threading.Event()
    board = Board()
    dogs = [
        Watchdog(board, r, NAMES[:2], 50.0, lambda why: (ended.append(why), done.set()), poll=0.01)
        for r in range(2)
    ]
    dogs[0].start()
    dogs[1].say_goodbye("was stopped by SIGKILL")
    assert done.wait(10) and ended == ["process 1 (b) was stopped by SIGKILL"]
    dogs[0].join(10)


def test_main_process_lets_the_others_read_who_is_lost_before_its_store_ends():
    board, ended = Board(), []

    def end(rank: int, why: str) -> None:
        ended.append((rank, why))
        if rank == 0:  # and its store with it
            board.multi_get = board.set = None

    ends = [lambda why, rank=rank: end(rank, why) for rank in range(3)]
    dogs = [Watchdog(board, r, NAMES, 50.0, ends[r], poll=p) for r, p in enumerate((0.4, 0.5, 1))]
    for dog in dogs[:2]:
        dog.start()
    dogs[2].say_goodbye("was stopped by SIGKILL")
    for dog in dogs[:2]:
        dog.join(10)
    assert sorted(ended) == [(r, "process 2 (c) was stopped by SIGKILL") for r in (0, 1)]


def test_broken_connection_waits_for_the_name_of_the_dead(monkeypatch):
    board = Board()
    dogs = [Watchdog(board, r, NAMES[:2], 50.0, print, poll=0.01) for r in range(2)]
    began = time.monotonic()
    dogs[0].peers[1].beat_at -= PROBABLY_DEAD - 0.2
    assert dogs[0].who_is_lost().startswith("process 1 (b) has died")
    assert time.monotonic() - began < 5
