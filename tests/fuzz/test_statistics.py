"""Files of FID statistics that are damaged or made to harm: refused, or mu and sigma."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given

from tests.fuzz.harness import damaged, fuzz, outcome, seeds
from util.errors import UserError
from util.evaluation.reference import check_statistics, load_fid_statistics

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


@pytest.mark.parametrize("suffix", FILES)
@fuzz(150)
@given(seed=seeds)
def test_damaged_statistics_are_refused_or_the_same(folder, suffix, seed):
    path = folder / f"damaged{suffix}"
    path.write_bytes(damaged(FILES[suffix], seed))
    found = outcome(lambda: load_fid_statistics(path, D))
    if not isinstance(found, UserError):
        assert all(np.array_equal(found[name], STATS[name]) for name in STATS)
        said = outcome(lambda: check_statistics(path, found, {}, None)[0])
        if not isinstance(said, UserError):
            assert all(said[name] == RECORD[name].item() for name in said.keys() & RECORD)
