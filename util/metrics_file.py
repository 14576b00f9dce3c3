"""Figures in a text file, for other programs to read while it grows: --metrics_file.

    FILE.jsonl   {"step": 20, "train/loss": 3.97, "train/lr": 0.0001}     a line a time
    FILE.tsv     20 <tab> train/loss <tab> 3.97                           a line a figure

The step is the number of steps done; a published checkpoint, which does not know it, has none. The
main process alone writes. What goes wrong while writing is reported, and the training goes on.
"""

import argparse
import errno
import json
import math
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from util import dist
from util.errors import UserError
from util.files import atomic_write, check_writable

HEADER = "step\tname\tvalue\n"
FLAG = "--metrics_file"

Keep = Callable[[int | None, set[str]], bool]  # of a line's step and names, whether it stays


def metrics_path(text: str) -> str:
    if Path(text).suffix not in (".jsonl", ".tsv"):
        raise argparse.ArgumentTypeError(f"{text} does not end in .jsonl or .tsv")
    return text


class MetricsFile:
    """first_step: with which a training goes on; what a killed one wrote of later steps goes.

    Raises UserError if the file is not one of these, or cannot be.
    """

    def __init__(self, path: str | None, first_step: int | None = None):
        self.path = Path(path) if path and dist.is_main() else None
        self.first_step = first_step
        self.tabs = path is not None and path.endswith(".tsv")
        if self.path is not None:
            check_writable(self.path.parent, FLAG)
            self._lines()

    def write(self, values: dict[str, float], step: int | None, replace: bool = False) -> None:
        """Append the figures after so many steps. replace: the same ones of an earlier time go."""
        if self.path is None or not values:
            return
        try:
            if self.first_step is not None:
                self._go_on_after(self.first_step)
                self.first_step = None
            if replace:
                self._keep(lambda found, names: found != step or not names & set(values))
            self._append(self._encode(values, step))
        except OSError as error:
            print(f"warning: {FLAG} {self.path}: {error}; its figures are lost", file=sys.stderr)

    def _encode(self, values: dict[str, float], step: int | None) -> str:
        if self.tabs:
            shown = "" if step is None else step
            return "".join(f"{shown}\t{name}\t{value!r}\n" for name, value in values.items())
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        return json.dumps({"step": step} | finite) + "\n"

    def _append(self, text: str) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "ab", buffering=0) as file:
            end = file.tell()
            content = (HEADER + text if self.tabs and end == 0 else text).encode()
            try:
                if file.write(content) < len(content):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                with suppress(OSError):  # a part of a line would spoil the next one
                    os.truncate(self.path, end)
                raise

    def _lines(self) -> list[str]:
        """The whole lines there are; the one that a killed process was writing is not."""
        if not self.path.exists():
            return []
        try:
            lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
        except (OSError, ValueError) as error:
            raise UserError(f"{FLAG} {self.path}: cannot be read ({error})") from error
        lines = [line for line in lines if line.endswith("\n")]
        for number, line in enumerate(lines, start=1):
            try:
                self._read(line)
            except (ValueError, LookupError, TypeError, AttributeError):
                raise UserError(
                    f"{FLAG} {self.path}: line {number} is no line of figures; name a new file"
                ) from None
        return lines

    def _read(self, line: str) -> tuple[int | None, set[str]]:
        """Step and names of a line."""
        if self.tabs:
            step, name, _value = line.rstrip("\n").split("\t")
            return (None if step in ("", "step") else int(step)), {name}
        values = json.loads(line)
        step = values.pop("step")
        return (step if step is None else int(step)), set(values)

    def _go_on_after(self, step: int) -> None:
        """Drop what is of later steps; from step 0 on, the file of another run stays as .old."""
        dropped = self._keep(lambda found, _: found is None or found <= step, old=step == 0)
        if dropped:
            print(f"{self.path}: {dropped} lines of later steps dropped", flush=True)

    def _keep(self, wanted: Keep, old: bool = False) -> int:
        """Keep the lines that are wanted; the number of those that are not."""
        lines = self._lines()
        kept = [line for line in lines if wanted(*self._read(line))]
        text = "".join(kept).encode()
        if self.path.exists() and text != self.path.read_bytes():
            if old:
                os.replace(self.path, f"{self.path}.old")
            with atomic_write(self.path) as file:
                file.write(text)
        return len(lines) - len(kept)
