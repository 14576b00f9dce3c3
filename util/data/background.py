"""Calls that run one after the other in a thread of their own, while this one makes the next."""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager


@contextmanager
def in_background(depth: int) -> Iterator[Callable[..., None]]:
    """Gives hand_over(call, *args), which waits while `depth` calls are not done.

    Once a call has failed, those after it are dropped, and what it raised is raised by the next
    hand_over, at the latest by the end of the block. If the block itself fails, what it handed over
    is still done. Either way the thread has ended when the block has.
    """
    waiting: deque[Future] = deque()
    failed = False

    def once(call: Callable, *args) -> None:
        nonlocal failed
        if failed:
            return
        try:
            call(*args)
        except BaseException:
            failed = True
            raise

    with ThreadPoolExecutor(max_workers=1) as thread:

        def hand_over(call: Callable, *args) -> None:
            while len(waiting) >= depth or (waiting and waiting[0].done()):
                waiting.popleft().result()
            waiting.append(thread.submit(once, call, *args))

        yield hand_over
        for call in waiting:
            call.result()
