"""Each kind of fault once: the run ends with the bits of one that nothing happened to."""

from pathlib import Path

import pytest

from tests.faults import training
from tests.faults.harness import Row
from tests.runs import make_inputs


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("faults")
    make_inputs(folder / "inputs")
    return folder


def assert_survived(row: Row) -> None:
    assert row.injected > 0 and row.survived == row.injected, row
    assert row.bytes_lost == 0, row


def test_killed_training_ends_with_the_same_bits(folder):
    assert_survived(training.kill_training(folder / "inputs", folder, 2, seed=0))


def test_kill_while_saving_leaves_the_checkpoint_before(folder):
    assert_survived(training.kill_saving(folder / "inputs", folder, 1, seed=0))


def test_signals_save_and_lose_nothing(folder):
    row = training.terminate(folder / "inputs", folder, 2, seed=0)
    assert_survived(row)
    assert row.steps_lost == 0


def test_full_disk_is_reported_and_training_goes_on(folder):
    assert_survived(training.full_disk(folder / "inputs", folder))


def test_newest_whole_checkpoint_is_taken(folder):
    assert_survived(training.damaged_newest(folder / "inputs", folder, 1, seed=0))


def test_torchrun_restarts_after_a_killed_worker(folder):
    assert_survived(training.kill_worker(folder / "inputs", folder, 1, seed=0))


def test_node_that_dies_is_named_and_the_run_goes_on(folder):
    assert_survived(training.kill_node(folder / "inputs", folder))


def test_process_that_hangs_is_named(folder):
    assert_survived(training.hang(folder / "inputs", folder))
