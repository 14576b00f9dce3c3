"""Killed while it caches, the same command ends with the bytes of an undisturbed run."""

from tests.faults.caching import MOST_LOST, kill_caching


def test_killed_caching_ends_with_the_same_bytes(tmp_path):
    row = kill_caching(tmp_path, kills=3, seed=0, processes=(1,))
    assert row.injected == row.survived == 3, row
    assert row.steps_lost <= 3 * MOST_LOST, row


def test_other_numbers_of_processes_go_on_with_it(tmp_path):
    row = kill_caching(tmp_path, kills=1, seed=1, processes=(2, 1))
    assert row.injected == row.survived == 1, row
    assert row.steps_lost <= 2 * MOST_LOST, row  # of each of two processes
