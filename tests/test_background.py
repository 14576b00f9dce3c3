"""Who makes work and who does it meet each other's failures; neither runs ahead without limit."""

import threading

import pytest

from util.data.background import in_background


def test_calls_are_done_in_order_and_when_the_block_is():
    done, threads = [], set()

    def note(number: int) -> None:
        done.append(number)
        threads.add(threading.current_thread())

    with in_background(2) as hand_over:
        for i in range(100):
            hand_over(note, i)
    assert done == list(range(100))
    assert len(threads) == 1 and not threads.pop().is_alive()


def test_no_more_calls_are_undone_than_the_depth():
    handed_over, fourth_waits, go_on = [], threading.Event(), threading.Event()

    def make() -> None:
        with in_background(3) as hand_over:
            for i in range(5):
                hand_over(go_on.wait, 10)
                handed_over.append(i)
                if i == 2:
                    fourth_waits.set()

    maker = threading.Thread(target=make)
    maker.start()
    assert fourth_waits.wait(10)
    maker.join(0.2)
    assert handed_over == [0, 1, 2]
    go_on.set()
    maker.join(10)
    assert handed_over == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("count", [3, 1000])
def test_a_failed_call_is_the_last_and_raised_where_calls_come_from(count):
    done, handed_over = [], []

    def write(number: int) -> None:
        if number == 2:
            raise OSError("no space")
        done.append(number)

    with pytest.raises(OSError, match="no space"), in_background(2) as hand_over:
        for i in range(count):
            hand_over(write, i)
            handed_over.append(i)
    assert done == [0, 1]
    assert len(handed_over) <= 3 + 2  # the failed one, and what the depth allows


def test_what_was_handed_over_before_the_block_failed_is_done():
    done = []
    with pytest.raises(ValueError, match="bad image"), in_background(8) as hand_over:
        for i in range(5):
            hand_over(done.append, i)
        raise ValueError("bad image")
    assert done == [0, 1, 2, 3, 4]
