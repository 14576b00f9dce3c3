"""Files of FID statistics that are damaged or made to harm: refused, or mu and sigma."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.fuzz.harness import damaged, fuzz, outcome, seeds
from util.errors import UserError
from util.evaluation.reference import load_fid_statistics, statistics_record

D = 4
RNG = np.random.default_rng(0)
STATS = {"mu": RNG.normal(size=D), "sigma": np.cov(RNG.normal(size=(D, 50)))}
RECORD = {"count": np.array(50), "layer": np.array("2048"), "weights_sha256": np.array("ab" * 32)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("statistics")


def packed(suffix: str) -> bytes:
    file = io.BytesIO()
    if suffix == ".npz":
        np.savez(file, **STATS, **RECORD)
    else:
        torch.save(STATS, file)
    return file.getvalue()


FILES = {suffix: packed(suffix) for suffix in (".npz", ".pt")}


def right(found: dict) -> bool:
    return all(np.array_equal(found[name], STATS[name]) for name in STATS)


@pytest.mark.parametrize("suffix", FILES)
def test_undamaged_statistics_are_read(folder, suffix):
    path = folder / f"whole{suffix}"
    path.write_bytes(FILES[suffix])
    assert right(outcome(lambda: load_fid_statistics(path, D)))


@pytest.mark.parametrize("suffix", FILES)
@fuzz(150)
@given(seed=seeds)
def test_damaged_statistics_are_refused_or_the_same(folder, suffix, seed):
    path = folder / f"damaged{suffix}"
    path.write_bytes(damaged(FILES[suffix], seed))
    found = outcome(lambda: load_fid_statistics(path, D))
    assert isinstance(found, UserError) or right(found)
    told = outcome(lambda: statistics_record(path))
    if not isinstance(told, UserError):
        assert all(told[name] == RECORD[name].item() for name in told)


arrays = st.one_of(
    st.lists(st.floats(), max_size=D).map(np.array),
    st.just(np.zeros((D, D))),
    st.just(np.full((D, D), -np.inf)),
    st.just(-np.eye(D)),
    st.just(np.zeros(D, complex)),
    st.just(np.array(["x"] * D)),
    st.just(np.zeros(D, "f4,f4")),
)


@fuzz(80)
@given(st.dictionaries(st.sampled_from(["mu", "sigma", "count", "layer", "x"]), arrays))
def test_arrays_of_any_kind_are_refused_or_finite(folder, content):
    path = folder / "any.npz"
    np.savez(path, **content)
    found = outcome(lambda: load_fid_statistics(path, D))
    if not isinstance(found, UserError):
        assert all(np.isfinite(array).all() for array in found.values())
    outcome(lambda: statistics_record(path))
