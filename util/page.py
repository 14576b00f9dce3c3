"""Pages whose tables a command writes: what stands between two marks is replaced."""

from pathlib import Path

from util.errors import UserError, as_user_error
from util.files import atomic_write

END = "<!-- end -->"


def begin(mark: str) -> str:
    """The line after which the lines of that mark stand, up to END."""
    return f"<!-- {mark}: begin -->"


def check_place(path: Path, mark: str) -> None:
    """Raise UserError if the page has no place for the lines of that mark: before they are made."""
    with as_user_error("--page", (OSError, UnicodeDecodeError)):
        text, start = path.read_text(), begin(mark)
    if text.count(start) != 1 or END not in text.split(start)[1]:
        raise UserError(f"--page {path} has no place for the table: {start} ... {END}")


def write_between(path: Path, mark: str, lines: list[str]) -> None:
    """Replace what stands between the marks of a page. Raises UserError if it has no such place."""
    check_place(path, mark)
    start = begin(mark)
    before, rest = path.read_text().split(start)
    after = rest.split(END, 1)[1]
    with atomic_write(path) as file:
        file.write("\n".join([before + start, "", *lines, END + after]).encode())
