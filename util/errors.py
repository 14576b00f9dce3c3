"""What a user reads when a script is called wrongly or given a damaged file.

Whatever a user can cause and mend is a `UserError`: one line with the value, the flag and the
remedy, exit code 2. Everything else is a defect of ours and keeps its traceback.
"""

import sys
from collections.abc import Callable
from contextlib import contextmanager
from typing import NoReturn

EXIT_USER_ERROR = 2
# What the backends say on a process whose peer has left; the peer has said why.
LOST_PEER = ("Connection closed by peer", "Connection reset by peer", "remote process exited")


class UserError(ValueError):
    """A mistake of the caller's, told in one line: what is wrong, the value, the remedy."""


@contextmanager
def as_user_error(context: str = "", catch: tuple[type[Exception], ...] = (ValueError,)):
    """Re-raise what a library says of the user's own values as a UserError, with its context."""
    try:
        yield
    except catch as error:
        message = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{context}: {message}" if context else message) from error


def run(main: Callable[[], None]) -> NoReturn:
    """Run a script's main; a UserError becomes one line on stderr and exit code 2."""
    try:
        main()
    except UserError as error:
        # A DataLoader worker re-raises with its traceback inside the message: keep the last line.
        lines = str(error).strip().splitlines() or ["unknown error"]
        message = lines[-1].strip().removeprefix("util.errors.UserError: ")
        print(f"{sys.argv[0]}: error: {message}", file=sys.stderr, flush=True)
        sys.exit(EXIT_USER_ERROR)
    except RuntimeError as error:
        if not any(phrase in str(error) for phrase in LOST_PEER):
            raise
        print(f"{sys.argv[0]}: stopped: another process ended first", file=sys.stderr, flush=True)
        sys.exit(1)
    sys.exit(0)
