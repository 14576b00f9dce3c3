"""Two jobs never work in one folder, and a killed one leaves it free."""

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest

from tests.conftest import ROOT
from util import files
from util.errors import UserError
from util.files import only_job_in

HOLD = """
import os, sys, time
from util.files import only_job_in
with only_job_in(sys.argv[1], "--flag"):
    child = os.fork() if "fork" in sys.argv else -1
    if child:  # two that print could print into each other's line
        print(child, flush=True)
    time.sleep(60)
"""


@contextmanager
def holder(folder: Path, *options: str) -> Iterator[tuple[subprocess.Popen, int]]:
    """Another process that holds the lock, and one that it forked."""
    command = [sys.executable, "-c", HOLD, str(folder), *options]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process, int(process.stdout.readline())
        finally:
            process.kill()


def test_a_second_job_is_refused_until_the_first_is_killed_and_no_child_holds_it(tmp_path):
    with holder(tmp_path, "fork") as (first, child):
        try:
            with pytest.raises(UserError) as error, only_job_in(tmp_path, "--flag"):
                pass
            line = str(error.value)
            assert f"--flag {tmp_path} is in use" in line and f"process {first.pid} on" in line
            assert (tmp_path / ".lock").exists()  # the first job's, not touched
            first.kill()
            first.wait()
            os.kill(child, 0)  # is alive
            with only_job_in(tmp_path, "--flag"):
                pass
        finally:
            os.kill(child, signal.SIGKILL)


def test_a_job_leaves_only_its_files_and_missing_locks_are_said(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "new" / "cache"
    with pytest.raises(ZeroDivisionError), only_job_in(folder, "--flag"):
        assert folder.is_dir()
        raise ZeroDivisionError
    assert os.listdir(tmp_path) == []
    with only_job_in(tmp_path, "--flag"):
        pass
    assert tmp_path.is_dir()  # it was there before
    with only_job_in(folder, "--flag"):
        (folder / "mine").touch()
    assert os.listdir(folder) == ["mine"]
    refuse = mock.Mock(side_effect=OSError(errno.ENOLCK, "No locks available"))
    monkeypatch.setattr(files.fcntl, "lockf", refuse)
    with only_job_in(tmp_path, "--flag"):
        (line,) = capsys.readouterr().err.splitlines()
        assert f"--flag {tmp_path}" in line and "no locks" in line
