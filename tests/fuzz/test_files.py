"""Damaged or hostile checkpoints and files of FID statistics: refused, or what was saved."""

import argparse
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given

from tests.fuzz.harness import damaged, fuzz, outcome, seeds
from tests.runs import tensors
from util.checkpoint import load_checkpoint
from util.errors import UserError
from util.evaluation.reference import check_statistics, load_fid_statistics

SAVED = {
    "model": {"a.weight": torch.arange(40.0).view(8, 5), "a.bias": torch.ones(8, dtype=torch.half)},
    "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"params": [0]}]},
    "args": argparse.Namespace(lr=1e-3, name="x" * 50),
    "config": {"img_size": 16, "channel_order": (2, 0, 1), "grad_clip": None},
    "step": 7,
}
D = 4
RNG = np.random.default_rng(0)
STATS = {"mu": RNG.normal(size=D), "sigma": np.cov(RNG.normal(size=(D, 50)))}
RECORD = {"count": np.array(50), "layer": np.array("2048"), "weights_sha256": np.array("ab" * 32)}


def packed(write: Callable[[io.BytesIO], None]) -> bytes:
    write(file := io.BytesIO())
    return file.getvalue()


CHECKPOINT = packed(lambda file: torch.save(SAVED, file))
STATISTICS = {
    ".npz": packed(lambda file: np.savez(file, **STATS, **RECORD)),
    ".pt": packed(lambda file: torch.save(STATS, file)),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("files")


def content(saved: dict) -> tuple:
    """Equal where all is, tensors to the bit."""
    return repr(saved), {name: t.numpy().tobytes() for name, t in tensors(saved).items()}


@fuzz(300)
@given(seeds)
def test_a_damaged_checkpoint_is_refused_or_what_was_saved(folder, seed):
    path = folder / "checkpoint.pth"
    path.write_bytes(damaged(CHECKPOINT, seed))
    found = outcome(lambda: load_checkpoint(path))
    assert isinstance(found, UserError) or content(found.saved) == content(SAVED)


@pytest.mark.parametrize("suffix", STATISTICS)
@fuzz(150)
@given(seed=seeds)
def test_damaged_statistics_are_refused_or_mu_and_sigma(folder, suffix, seed):
    path = folder / f"damaged{suffix}"
    path.write_bytes(damaged(STATISTICS[suffix], seed))
    found = outcome(lambda: load_fid_statistics(path, D))
    if not isinstance(found, UserError):
        assert all(np.array_equal(found[name], STATS[name]) for name in STATS)
        said = outcome(lambda: check_statistics(path, found, {}, None)[0])
        if not isinstance(said, UserError):
            assert all(said[name] == RECORD[name].item() for name in said.keys() & RECORD)
