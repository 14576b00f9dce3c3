"""What a user reads when a script is called wrongly or given a damaged file.

Whatever a user can cause and mend is a `UserError`: one line with the value, the flag and the
remedy, exit code 2. Everything else is a defect of ours and keeps its traceback.
"""

import difflib
import sys
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from util import stop

EXIT_USER_ERROR = 2
EXIT_LOST_PEER = 1
EXIT_STOPPED = 75  # "try again" (EX_TEMPFAIL of sysexits.h): the same command goes on
LONGEST = 500  # characters of what a library says, which may quote a damaged file
# What the backends say on a process whose peer has left.
LOST_PEER = ("Connection closed by peer", "Connection reset by peer", "remote process exited")


class UserError(ValueError):
    """A mistake of the caller's, told in one line: what is wrong, the value, the remedy."""


@contextmanager
def as_user_error(context: str = "", catch: tuple[type[Exception], ...] = (ValueError,)):
    """Re-raise what a library says of the user's own values as a UserError, with its context."""
    try:
        yield
    except stop.Stopped:
        raise
    except catch as error:
        message = " ".join(str(error).split()) or type(error).__name__
        if not isinstance(error, UserError):
            message = message[:LONGEST]
        raise UserError(f"{context}: {message}" if context else message) from error


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """ "; did you mean ...?", or nothing where no known name is like it."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def program() -> str:
    """The name by which this process was started, of a script or a console command."""
    return Path(sys.argv[0]).name


def run(main: Callable[[], None]) -> NoReturn:
    """Run a script's main and end the process.

    A UserError becomes one line on stderr and exit code 2; a signal, after which the same command
    goes on where it was, one line and exit code 75; a lost process, its name and exit code 1.
    """
    from util import dist  # which raises UserErrors itself

    code, line = 0, None
    try:
        stop.install()
        main()
    except UserError as error:
        # A DataLoader worker re-raises with its traceback inside the message: keep the last line.
        lines = str(error).strip().splitlines() or ["unknown error"]
        message = lines[-1].strip().removeprefix("util.errors.UserError: ")
        code, line = EXIT_USER_ERROR, f"error: {message}"
        dist.say_goodbye(f"stopped with an error: {message}")
    except stop.Stopped as signal:
        code, line = EXIT_STOPPED, f"stopped by {signal}; start the same command again to go on"
        dist.say_goodbye(f"was stopped by {signal}")
    except RuntimeError as error:
        if not any(phrase in str(error) for phrase in LOST_PEER):
            dist.say_goodbye(f"failed: {type(error).__name__}")
            raise
        with stop.deferred():  # torchrun asks the others to end before they have found out why
            dist.end(f"stopped: {dist.who_is_lost()}", EXIT_LOST_PEER)
    if line is not None:
        print(f"{program()}: {line}", file=sys.stderr, flush=True)
    sys.exit(code)
