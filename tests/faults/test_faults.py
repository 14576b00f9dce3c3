"""Each kind of fault once: the run ends with the bits of one that nothing happened to."""

from pathlib import Path

import pytest

from tests.faults import caching, training


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("faults")


@pytest.mark.parametrize(
    "harm",
    training.scenarios(kills=2, seed=0),
    ids=lambda harm: getattr(harm, "func", harm).__name__,
)
def test_a_run_ends_as_if_nothing_had_happened(inputs, folder, harm):
    row = harm(inputs, folder)
    assert row.survived == row.injected > 0, row


@pytest.mark.parametrize(("processes", "kills"), [((1,), 3), ((2, 1), 1)])
def test_killed_caching_ends_with_the_same_bytes(inputs, tmp_path, processes, kills):
    row = caching.kill_caching(inputs, tmp_path, kills, seed=kills, processes=processes)
    assert row.injected == row.survived == kills, row
    assert row.steps_lost <= kills * len(processes) * caching.MOST_LOST, row  # of each process
