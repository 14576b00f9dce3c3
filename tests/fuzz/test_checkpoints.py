"""Checkpoints that are damaged or made to harm: refused, or what was saved."""

import argparse
import io
import os
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from models.config import TokenBridgeConfig
from tests.fuzz.harness import damaged, fuzz, outcome, seeds
from tests.runs import tensors
from util.checkpoint import Checkpoint, find_checkpoint, load_checkpoint
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


CONFIG = TokenBridgeConfig().to_dict()
torch.save(SAVED, file := io.BytesIO())
ZIPPED = file.getvalue()


@fuzz(300)
@given(seeds)
def test_a_damaged_checkpoint_is_refused_or_what_was_saved(path, seed):
    path.write_bytes(damaged(ZIPPED, seed))
    found = outcome(lambda: load_checkpoint(path))
    assert isinstance(found, UserError) or content(found.saved) == content(SAVED)


kinds = st.sampled_from(["whole", "damaged", "empty", "folder", "pipe", "dangling"])
numbers = st.one_of(
    st.integers(0, 99_999_999).map("{:08d}".format), st.text("0123456789x", max_size=9)
)
names = st.one_of(
    st.just("checkpoint-last.pth"),
    numbers.map("checkpoint-step{}.pth".format),
    st.integers(0, 9999).map("checkpoint-epoch{:04d}.pth".format),
)
OURS = re.compile(r"checkpoint-(last|step[0-9]{8}|epoch[0-9]{4})\.pth")  # others are copies


def put(path: Path, kind: str) -> None:
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "dangling":
        path.symlink_to(path.parent / "nothing")
    else:
        path.write_bytes({"whole": ZIPPED, "damaged": ZIPPED[:-90], "empty": b""}[kind])


@fuzz(100)
@given(st.dictionaries(names, kinds, max_size=4), st.booleans(), st.booleans())
def test_a_folder_of_anything_gives_a_whole_checkpoint_or_says_what_is_wrong(
    tmp_path_factory, entries, auto, must_exist
):
    folder = tmp_path_factory.mktemp("run")
    for name, kind in entries.items():
        put(folder / name, kind)
    named = "auto" if auto else str(folder)
    found = outcome(lambda: find_checkpoint(named, str(folder), must_exist))
    if isinstance(found, Checkpoint):
        assert content(found.saved) == content(SAVED)
    elif auto and entries.get("checkpoint-last.pth") != "folder":
        assert not any(OURS.fullmatch(n) for n, kind in entries.items() if kind == "whole")


sizes = st.integers(-2, 40) | st.sampled_from([2**20, 2**62, 10**30, 1.5, None, True, "1"])
values = st.one_of(
    *(sizes, st.floats(), st.text(max_size=5), st.lists(sizes, max_size=3)),
    st.dictionaries(st.text(max_size=3), sizes, max_size=2),
)


@fuzz(200)
@given(st.dictionaries(st.sampled_from(sorted(CONFIG)) | st.text(max_size=5), values) | values)
def test_settings_of_any_kind_are_refused_or_a_configuration(path, changes):
    config = CONFIG | changes if isinstance(changes, dict) else changes
    found = outcome(lambda: Checkpoint(path, {"config": config}).config)
    assert isinstance(found, UserError | TokenBridgeConfig)
