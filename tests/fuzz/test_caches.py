"""Latent caches with damaged files: refused, or the posteriors that were cached."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fuzz.harness import damaged, fuzz, outcome, seeds
from tests.test_latent_cache import MOMENTS, fill
from util.data.latent_cache import open_cache, verify
from util.errors import UserError


@pytest.fixture(scope="module")
def caches(tmp_path_factory) -> dict[str, Path]:
    """Of both forms, and a published one, which has the npz files alone."""
    root = tmp_path_factory.mktemp("caches")
    for form in ("npy", "npz", "published"):
        fill(root / form, format="npy" if form == "npy" else "npz")
    for path in (root / "published").glob("*.json"):
        path.unlink()
    return {form: root / form for form in ("npy", "npz", "published")}


def content(folder: Path) -> tuple:
    """All that training reads."""
    cache = open_cache(folder)
    views = [cache[(i, flip)] for i in range(len(cache)) for flip in (False, True)]
    moments = [moments.numpy().tobytes() for moments, _ in views]
    return cache.manifest, cache.classes, [label for _, label in views], moments


def spoil(folder: Path, which: int, seed: int) -> tuple[Path, bytes]:
    """Damage one of the files; which, and what it held."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    path = files[which % len(files)]
    whole = path.read_bytes()
    path.write_bytes(damaged(whole, seed))
    return path, whole


@fuzz(150)
@given(st.sampled_from(["npy", "npz", "published"]), st.integers(0, 30), seeds)
def test_a_cache_with_a_damaged_file_is_refused_or_the_same(caches, form, which, seed):
    folder = caches[form]
    expected = content(folder)
    assert expected[3] == [view.tobytes() for image in MOMENTS for view in image]
    path, whole = spoil(folder, which, seed)
    try:
        found = outcome(lambda: content(folder), bounded=False)
        verified = outcome(lambda: verify(folder), bounded=False)
    finally:
        path.write_bytes(whole)
    assert isinstance(found, UserError) or found == expected
    assert isinstance(verified, UserError) == isinstance(found, UserError)


@fuzz(25)
@given(st.sampled_from(["npy", "npz"]), st.integers(0, 30), seeds)
def test_going_on_after_damage_is_refused_or_the_same(tmp_path_factory, caches, form, which, seed):
    folder = tmp_path_factory.mktemp("unfinished")
    fill(folder, format=form)
    for name in ("manifest.json", "shard-00001.json"):
        (folder / name).unlink()
    spoil(folder, which, seed)
    if isinstance(outcome(lambda: fill(folder, format=form), bounded=False), UserError):
        return
    if not isinstance(outcome(lambda: verify(folder), bounded=False), UserError):
        found, expected = content(folder), content(caches[form])
        del found[0]["shards"], expected[0]["shards"]  # sidecars may be spaced in another way
        assert found == expected
