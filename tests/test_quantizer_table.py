"""The table of docs/quantizer.md: its claims hold row by row; where it is put in the page."""

import re
import sys
from pathlib import Path
from unittest import mock

import pytest

from tests.conftest import ROOT
from tests.runs import make_inputs
from tools import quantizer_table
from util.errors import UserError
from util.page import END, begin, write_between


def rows(text: str) -> list[list[float]]:
    """[bits, error and error, ratio, entropy and entropy] of each row of numbers."""
    cells = [line.strip("| \n").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return [[float(c) for c in line] for line in cells if len(line) == 6 and line[0].isdigit()]


def test_the_pages_table_shows_less_error_and_more_even_use_at_every_width():
    found = rows((ROOT / "docs" / "quantizer.md").read_text())
    assert [row[0] for row in found] == [*range(2, 9)] * 2  # N(0, 1), then latents
    for bits, error, calibrated_error, ratio, entropy, calibrated_entropy in found:
        assert calibrated_error < error and ratio == pytest.approx(calibrated_error / error, 0.01)
        assert entropy < calibrated_entropy <= bits


def test_table_and_figure_are_written_between_the_marks(tmp_path, monkeypatch, capsys):
    inputs = make_inputs(tmp_path)
    page = tmp_path / "page.md"
    page.write_text(f"before\n{begin(quantizer_table.MARK)}\nold\n{END}\nafter\n")
    monkeypatch.setattr(quantizer_table, "POINTS", 2**12)
    argv = ["--cached_path", inputs / "cache", "--bits", 2, 5]
    argv += ["--page", page, "--figure", tmp_path / "figure.png"]
    with mock.patch.object(sys, "argv", ["quantizer_table.py", *map(str, argv)]):
        quantizer_table.main()
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    assert [row[0] for row in rows(text)] == [2, 5, 2, 5]
    for _, error, calibrated_error, _, entropy, calibrated_entropy in rows(text):
        assert calibrated_error < error and entropy < calibrated_entropy
    assert re.search(r"Python 3\.\d+", text) and "24 images' latents" in text
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_a_page_without_the_marks_is_left_alone(tmp_path):
    page: Path = tmp_path / "page.md"
    page.write_text("nothing here\n")
    with pytest.raises(UserError, match="no place for the table"):
        write_between(page, quantizer_table.MARK, ["table"])
    assert page.read_text() == "nothing here\n"
