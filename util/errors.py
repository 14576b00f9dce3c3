"""What a user reads when a script is called wrongly or given a damaged file.

Whatever a user can cause and mend is a `UserError`: one line with the value, the flag and the
remedy, exit code 2. Everything else is a defect of ours and keeps its traceback.
"""

import difflib
import sys
from collections.abc import Iterable
from contextlib import contextmanager
from pathlib import Path

EXIT_USER_ERROR = 2
EXIT_STOPPED = 75  # "try again" (EX_TEMPFAIL of sysexits.h): the same command goes on
LONGEST = 500  # characters of what a library says, which may quote a damaged file


class UserError(ValueError):
    """A mistake of the caller's in one line: what is wrong, the value, the remedy."""


@contextmanager
def as_user_error(context: str = "", catch: tuple[type[Exception], ...] = (ValueError,)):
    """Re-raise what a library says of the user's own values as a UserError, with its context."""
    try:
        yield
    except catch as error:
        message = " ".join(str(error).split()) or type(error).__name__
        message = message if isinstance(error, UserError) else message[:LONGEST]
        raise UserError(f"{context}: {message}" if context else message) from error


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """ "; did you mean ...?", or nothing where no known name is like it."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def program() -> str:
    """The name by which this process was started, of a script, a module or a console command."""
    script = Path(sys.argv[0])
    return f"{script.parent.name}.py" if script.name == "__main__.py" else script.name
