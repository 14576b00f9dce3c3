"""Checkpoints and VAE files that are damaged or made to harm: refused, or what was saved."""

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
from models.tokenizers.kl16 import AutoencoderKL
from tests.fuzz.harness import damaged, fuzz, outcome, repacked, seeds
from util.checkpoint import Checkpoint, find_checkpoint, load_checkpoint
from util.errors import UserError
from util.vae import load_vae, save_vae

SAVED = {
    "model": {"a.weight": torch.arange(40.0).view(8, 5), "a.bias": torch.ones(8, dtype=torch.half)},
    "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"params": [0]}]},
    "args": argparse.Namespace(lr=1e-3, name="x" * 50),
    "config": {"img_size": 16, "channel_order": (2, 0, 1), "grad_clip": None},
    "step": 7,
}


def saved_bytes(value: object, legacy: bool = False) -> bytes:
    file = io.BytesIO()
    torch.save(value, file, _use_new_zipfile_serialization=not legacy)
    return file.getvalue()


def same(found: object, expected: object) -> bool:
    """Equal, tensors to the bit."""
    if isinstance(expected, torch.Tensor):
        return (
            isinstance(found, torch.Tensor)
            and (found.dtype, found.shape) == (expected.dtype, expected.shape)
            and torch.equal(found, expected)
        )
    if isinstance(expected, dict):
        return list(found) == list(expected) and all(same(found[k], expected[k]) for k in expected)
    if isinstance(expected, list | tuple):
        pairs = zip(found, expected, strict=True)
        return type(found) is type(expected) and all(same(a, b) for a, b in pairs)
    return type(found) is type(expected) and found == expected


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("checkpoints") / "checkpoint.pth"


CONFIG = TokenBridgeConfig().to_dict()
ZIPPED, LEGACY = saved_bytes(SAVED), saved_bytes(SAVED, legacy=True)


@fuzz(300)
@given(seeds)
def test_a_damaged_checkpoint_is_refused_or_what_was_saved(path, seed):
    path.write_bytes(damaged(ZIPPED, seed))
    found = outcome(lambda: load_checkpoint(path))
    assert isinstance(found, UserError) or same(found.saved, SAVED)


@fuzz(150)
@given(seeds)
def test_a_damaged_file_of_the_old_form_without_checksums_is_refused_or_a_dict(path, seed):
    path.write_bytes(damaged(LEGACY, seed))
    found = outcome(lambda: load_checkpoint(path))
    assert isinstance(found, UserError) or isinstance(found.saved, dict)


@fuzz(150)
@given(seeds)
def test_a_changed_pickle_with_right_checksums_is_refused_or_a_dict(path, seed):
    def change(name: str, content: bytes) -> bytes:
        return damaged(content, seed) if name.endswith("data.pkl") else content

    path.write_bytes(repacked(ZIPPED, change))
    found = outcome(lambda: load_checkpoint(path))
    assert isinstance(found, UserError) or isinstance(found.saved, dict)


@fuzz(60)
@given(seeds)
def test_other_storages_than_the_pickle_names_are_refused_or_tensors(path, seed):
    def change(name: str, content: bytes) -> bytes:
        return damaged(content, seed) if "/data/" in name else content

    path.write_bytes(repacked(ZIPPED, change))
    found = outcome(lambda: load_checkpoint(path))
    if isinstance(found, Checkpoint):
        assert found.saved["model"]["a.weight"].sum().dtype == torch.float32  # memory that is there


# --- VAEs


@pytest.fixture(scope="module")
def vae_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("vae") / "vae.ckpt"
    save_vae(path, AutoencoderKL(embed_dim=2, ch_mult=(1,), ch=32, num_res_blocks=1))
    return path


@fuzz(60)
@given(seeds)
def test_a_damaged_vae_is_refused_or_what_was_saved(path, vae_file, seed):
    path.write_bytes(damaged(vae_file.read_bytes(), seed))
    found = outcome(lambda: load_vae(path))
    if isinstance(found, AutoencoderKL):
        assert same(dict(found.state_dict()), dict(load_vae(vae_file).state_dict()))


sizes = st.one_of(
    st.integers(-2, 40), st.sampled_from([2**20, 2**62, 10**30, 1.5, None, True, "1"])
)
# --- finding one


kinds = st.sampled_from(["whole", "damaged", "empty", "folder", "pipe", "dangling"])
numbers = st.one_of(
    st.integers(0, 99_999_999).map("{:08d}".format), st.text("0123456789x", max_size=9)
)
names = st.one_of(
    st.just("checkpoint-last.pth"),
    numbers.map("checkpoint-step{}.pth".format),
    st.integers(0, 9999).map("checkpoint-epoch{:04d}.pth".format),
    numbers.map("checkpoint-epoch{}.pth".format),
)
OURS = re.compile(r"checkpoint-(last|step[0-9]{8}|epoch[0-9]{4})\.pth")  # others are copies


def put(folder: Path, name: str, kind: str) -> None:
    path = folder / name
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "dangling":
        path.symlink_to(folder / "nothing")
    else:
        content = {"whole": ZIPPED, "damaged": ZIPPED[:-90], "empty": b""}[kind]
        path.write_bytes(content)


@fuzz(100)
@given(
    st.dictionaries(names, kinds, max_size=4), st.sampled_from(["auto", "folder"]), st.booleans()
)
def test_a_folder_of_anything_gives_a_whole_checkpoint_or_says_what_is_wrong(
    tmp_path_factory, entries, resume, must_exist
):
    folder = tmp_path_factory.mktemp("run")
    for name, kind in entries.items():
        put(folder, name, kind)
    named = "auto" if resume == "auto" else str(folder)
    found = outcome(lambda: find_checkpoint(named, str(folder), must_exist))
    if isinstance(found, Checkpoint):
        assert same(found.saved, SAVED)
    elif resume == "auto" and entries.get("checkpoint-last.pth") != "folder":
        assert not any(OURS.fullmatch(n) for n, kind in entries.items() if kind == "whole")


values = st.one_of(
    sizes,
    st.floats(),
    st.text(max_size=5),
    st.lists(sizes, max_size=3),
    st.lists(sizes, max_size=3).map(tuple),
    st.dictionaries(st.text(max_size=3), sizes, max_size=2),
)


@fuzz(200)
@given(st.dictionaries(st.sampled_from(sorted(CONFIG)) | st.text(max_size=5), values) | values)
def test_settings_of_any_kind_are_refused_or_a_configuration(path, changes):
    config = CONFIG | changes if isinstance(changes, dict) else changes
    found = outcome(lambda: Checkpoint(path, {"config": config}).config)
    assert isinstance(found, UserError | TokenBridgeConfig)
