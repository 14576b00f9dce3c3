"""Checkpoints that are damaged or made to harm: refused, or what was saved."""

import argparse
import io
from pathlib import Path

import pytest
import torch
from hypothesis import given

from tests.fuzz.harness import damaged, fuzz, outcome, seeds
from tests.runs import tensors
from util.checkpoint import load_checkpoint
from util.errors import UserError

SAVED = {
    "model": {"a.weight": torch.arange(40.0).view(8, 5), "a.bias": torch.ones(8, dtype=torch.half)},
    "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"params": [0]}]},
    "args": argparse.Namespace(lr=1e-3, name="x" * 50),
    "config": {"img_size": 16, "channel_order": (2, 0, 1), "grad_clip": None},
    "step": 7,
}


def content(saved: dict) -> tuple:
    """Equal where all is, tensors to the bit."""
    return repr(saved), {name: t.numpy().tobytes() for name, t in tensors(saved).items()}


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("checkpoints") / "checkpoint.pth"


torch.save(SAVED, file := io.BytesIO())
ZIPPED = file.getvalue()


@fuzz(300)
@given(seeds)
def test_a_damaged_checkpoint_is_refused_or_what_was_saved(path, seed):
    path.write_bytes(damaged(ZIPPED, seed))
    found = outcome(lambda: load_checkpoint(path))
    assert isinstance(found, UserError) or content(found.saved) == content(SAVED)
