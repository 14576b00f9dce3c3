"""The table of decoding options."""

import pytest

from benchmarks.decoding import POINTS, main, table
from util.errors import UserError


def test_a_point_twice_as_fast_as_the_plain_one_says_so():
    found = {"plain": [(0.9, 5.0, 4.0), (1.0, 7.0, 2.0)], "fast": [(0.8, 6.0, 1.5)]}
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table(found)[2:]]
    assert rows[0] == ["plain", "95.0 % (90.0 to 100.0)", "6.00 (5.00 to 7.00)", "0.83", "1.00"]
    assert rows[1][-1] == "2.00"


def test_the_first_point_changes_nothing():
    assert next(iter(POINTS.values())) == {}


def test_a_folder_without_a_demo_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["decoding", "--demo", str(tmp_path)])
    with pytest.raises(UserError, match="lacks model.*make demo"):
        main()
