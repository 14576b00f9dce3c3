"""Damaged and hostile files: how they are made, and what no reader may do with them.

A reader returns a right result or raises a UserError of one line, within SECONDS and BYTES of
memory. TOKENBRIDGE_FUZZ_EXAMPLES=5000 tries as many new examples of each kind.
"""

import faulthandler
import os
import random
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from util.errors import UserError

SECONDS = 10  # a hang; the slowest reader here takes a tenth of one
BYTES = 1 << 30
LONGEST_LINE = 1500  # characters, of which some hundreds are a path
EXAMPLES = int(os.environ.get("TOKENBRIDGE_FUZZ_EXAMPLES", "0"))

Result = TypeVar("Result")
seeds = st.integers(0, 2**32 - 1)  # of `damaged`


def fuzz(examples: int):
    """Decorator: so many examples in the short form. Fixtures are not made anew for each."""
    return settings(
        max_examples=EXAMPLES or examples,
        derandomize=not EXAMPLES,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


class Hang(BaseException):
    """Not an Exception, which a reader may turn into an error of ours."""


def outcome(read: Callable[[], Result], bounded: bool = True) -> Result | UserError:
    """What a reader returns or the UserError it raises; all else fails the test.

    bounded: whether it may not even try to take more memory than BYTES.
    """
    with _limits():
        try:
            return read()
        except UserError as error:
            line = str(error)
            assert line and "\n" not in line and len(line) < LONGEST_LINE, line
            cause = error
            while cause := cause.__cause__:
                huge = isinstance(cause, MemoryError) or "allocate" in str(cause)
                assert not huge or not bounded, f"tried to take more than {BYTES} bytes: {cause!r}"
            return error


@contextmanager
def _limits() -> Iterator[None]:
    def stop(*_):
        raise Hang(f"more than {SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    faulthandler.dump_traceback_later(3 * SECONDS, exit=True)  # where Python is not asked
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    if sys.platform == "linux":
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + BYTES, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def damaged(content: bytes, seed: int) -> bytes:
    """One to four changes at places that the seed chooses."""
    rng, data = random.Random(seed), bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 4))):
        start = rng.randrange(len(data) + 1)
        stop = min(len(data), start + rng.choice((1, 2, 4, 16, 200)))
        piece = bytes(data[start:stop])
        data[start:stop] = rng.choice(
            (
                bytes(byte ^ 1 << rng.randrange(8) for byte in piece[:1]) + piece[1:],
                rng.choice((b"\0", b"\xff", b"\x7f")) * len(piece),
                rng.randbytes(rng.choice((1, 4, 100))) + piece,
                b"",
                piece * rng.choice((2, 20)),
            )
        )
        if rng.random() < 0.15:
            del data[start:]
    return bytes(data)
