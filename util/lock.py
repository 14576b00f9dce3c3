"""One job at a time in a folder: a lock that ends with the process that holds it.

It is the system's lock on the file .lock (POSIX record lock): killed with -9, the holder leaves the
file but no lock, and processes that it forked, such as data loader workers, do not hold it either.
"""

import errno
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from util.errors import UserError, as_user_error

try:
    import fcntl
except ImportError:  # not a Unix
    fcntl = None

LOCK = ".lock"
TAKEN = (errno.EACCES, errno.EAGAIN)
UNKNOWN = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)  # to this file system


@contextmanager
def only_job_in(folder: str | Path, flag: str) -> Iterator[None]:
    """Hold the folder's lock; the folder is made if need be, and removed if it stays empty.

    Raises UserError, naming the flag, if another job holds it or the folder cannot be written to.
    A file system without locks is said once, and the work goes on.
    """
    folder = Path(folder)
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    with as_user_error(f"{flag} {folder}: cannot write", (OSError,)):
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = _acquire(folder, flag)
    try:
        yield
    finally:
        with suppress(OSError):
            os.unlink(folder / LOCK)  # while it is held: see _is_current
        os.close(descriptor)
        with suppress(OSError):  # not empty
            for place in made:
                place.rmdir()


def refuse_busy(folder: str | Path, flag: str) -> None:
    """Raise UserError, naming the flag, if another job holds the folder's lock now.

    Early, before its files are read, which the other job replaces and removes; nothing is made.
    """
    folder = Path(folder)
    nothing = suppress(FileNotFoundError, NotADirectoryError)
    with as_user_error(f"{flag} {folder}: cannot write", (OSError,)), nothing:
        descriptor = os.open(folder / LOCK, os.O_RDWR)
        try:
            _lock(descriptor, folder, flag)
        finally:
            os.close(descriptor)


def _acquire(folder: Path, flag: str) -> int:
    """An open file that holds the lock until it is closed."""
    while True:
        descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            _lock(descriptor, folder, flag)
            if _is_current(descriptor, folder / LOCK):
                os.truncate(descriptor, 0)
                os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _lock(descriptor: int, folder: Path, flag: str) -> None:
    try:
        if fcntl is None:
            raise OSError(errno.ENOSYS, "this system has no fcntl")
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in TAKEN:
            holder = ascii(os.read(descriptor, 100).decode(errors="replace"))[1:-1]
            raise UserError(
                f"{flag} {folder} is in use by another job ({holder or 'starting'}); wait for it "
                "or stop it"
            ) from None
        if error.errno not in UNKNOWN:
            raise
        print(
            f"warning: {flag} {folder}: this file system has no locks ({error.strerror}); see to "
            "it that no second job works in this folder",
            file=sys.stderr,
            flush=True,
        )


def _is_current(descriptor: int, path: Path) -> bool:
    """Whether the lock is on the file of that name, and not on one its last holder removed."""
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    return False
