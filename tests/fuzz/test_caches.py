"""Latent caches that are damaged or made to harm: refused, or the posteriors that were cached."""

import io
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fuzz.harness import damaged, fuzz, outcome, seeds
from tests.test_latent_cache import MOMENTS, NAMES, fill, rewrite, writer_for
from util.build import cache_histogram
from util.data.cache_files import read_moments
from util.data.latent_cache import open_cache, verify
from util.errors import UserError
from util.files import sha256

FORMS = st.sampled_from(["npy", "npz"])


@pytest.fixture(scope="module")
def caches(tmp_path_factory) -> dict[str, Path]:
    """Of both forms, and a published one, which has the npz files alone."""
    root = tmp_path_factory.mktemp("caches")
    for form in ("npy", "npz", "published"):
        fill(root / form, format="npy" if form == "npy" else "npz")
    for path in (root / "published").glob("*.json"):
        path.unlink()
    return {form: root / form for form in ("npy", "npz", "published")}


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def content(folder: Path) -> dict:
    """All that training reads."""
    cache = open_cache(folder)
    views = [cache[(i, flip)] for i in range(len(cache)) for flip in (False, True)]
    return {
        "manifest": cache.manifest,
        "classes": cache.classes,
        "labels": [label for _, label in views],
        "moments": [moments.numpy().tobytes() for moments, _ in views],
    }


class Changed:
    """A context in which a file of the cache holds something else."""

    def __init__(self, path: Path, content: bytes):
        self.path, self.content = path, content

    def __enter__(self) -> None:
        self.whole = self.path.read_bytes()
        self.path.write_bytes(self.content)

    def __exit__(self, *_) -> None:
        self.path.write_bytes(self.whole)


@fuzz(150)
@given(st.sampled_from(["npy", "npz", "published"]), st.integers(0, 30), seeds)
def test_a_cache_with_a_damaged_file_is_refused_or_the_same(caches, form, which, seed):
    folder = caches[form]
    expected = content(folder)
    path = files(folder)[which % len(files(folder))]
    with Changed(path, damaged(path.read_bytes(), seed)):
        found = outcome(lambda: content(folder))
    assert isinstance(found, UserError) or found == expected


@fuzz(80)
@given(FORMS, st.integers(0, 30), seeds)
def test_verify_names_every_change_that_matters(caches, form, which, seed):
    folder = caches[form]
    expected = content(folder)
    path = files(folder)[which % len(files(folder))]
    changed = damaged(path.read_bytes(), seed)
    with Changed(path, changed):
        found = outcome(lambda: verify(folder))
        if not isinstance(found, UserError):
            assert content(folder) == expected
    if path.suffix == ".npy" and changed != path.read_bytes():
        assert isinstance(found, UserError)


@fuzz(25)
@given(FORMS, st.integers(0, 30), seeds)
def test_going_on_in_a_damaged_folder_is_refused_or_ends_with_the_same(
    tmp_path_factory, caches, form, which, seed
):
    folder = tmp_path_factory.mktemp("unfinished")
    fill(folder, format=form)
    for name in ("manifest.json", "shard-00001.json"):
        (folder / name).unlink()
    path = files(folder)[which % len(files(folder))]
    path.write_bytes(damaged(path.read_bytes(), seed))
    found = outcome(lambda: fill(folder, format=form))
    if isinstance(found, UserError):
        return
    whole = outcome(lambda: verify(folder))
    if not isinstance(whole, UserError):
        ends = content(folder), content(caches[form])
        for end in ends:  # with the checksums of sidecars, which may be spaced in another way
            del end["manifest"]["shards"]
        assert ends[0] == ends[1]


# --- made to harm: every checksum is right


integers = st.one_of(st.integers(-3, 12), st.sampled_from([2**31, 2**63, -(2**63), 10**400]))
texts = st.one_of(
    st.sampled_from(["../x", "/etc/passwd", "ant/../../x", "a\0b", "\ud800", "npz", "float16", ""]),
    st.text(max_size=20),
)
values = st.recursive(
    st.one_of(st.none(), st.booleans(), integers, texts, st.floats()),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)


def replaced(value, where: list[int], new):
    """The value with one part, which `where` leads to, replaced or removed."""
    if not where or not isinstance(value, dict | list) or not value:
        return new
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    key = keys[where[0] % len(keys)]
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[key] = replaced(value[key], where[1:], new)
    return copy


paths = st.lists(st.integers(0, 30), min_size=1, max_size=4)


@fuzz(200)
@given(FORMS, st.sampled_from(["manifest.json", "shard-00001.json"]), paths, values)
def test_no_value_in_a_manifest_or_sidecar_breaks_a_reader(caches, form, name, where, value):
    folder = caches[form]
    whole = {k: (folder / k).read_text() for k in ("manifest.json", "shard-00001.json")}
    said = json.loads(whole[name])
    try:
        rewrite(folder / name, **replaced(said, where, value))
        if name != "manifest.json":
            vouch(folder)
        found = outcome(lambda: content(folder))
        if not isinstance(found, UserError):
            outcome(lambda: cache_histogram(str(folder), 3, None))
        outcome(lambda: writer_for(folder, format=form).pending())
    finally:
        for k, text in whole.items():
            (folder / k).write_text(text)


@fuzz(60)
@given(values, values)
def test_no_value_in_a_histogram_breaks_its_reader(caches, exponents, counts):
    folder = caches["npy"]
    path = folder / "manifest.json"
    whole = json.loads(path.read_text())["histogram"]
    for changes in ({"exponents": exponents}, {"counts": counts}, {"exponents": [exponents] * 3}):
        with Changed(path, path.read_bytes()):
            rewrite(path, histogram=whole | changes)
            outcome(lambda: cache_histogram(str(folder), 3, None))


def vouch(folder: Path) -> None:
    """Let the manifest say that the sidecars are right."""
    manifest = json.loads((folder / "manifest.json").read_text())
    for shard, entry in enumerate(manifest["shards"]):
        entry["sidecar_sha256"] = sha256(folder / f"shard-{shard:05d}.json")
    rewrite(folder / "manifest.json", **manifest)


@pytest.mark.parametrize(
    "text",
    [
        "[" * 10**6,
        '{"a":' * 10**5,
        "[" + "1," * 10**6 + "1]",
        '{"a": 1e999}',
        "9" * 10**5,
        "\ufeff{}",
    ],
)
def test_json_of_any_depth_and_size_is_refused_at_once(caches, text):
    for name in ("manifest.json", "shard-00001.json"):
        with Changed(caches["npy"] / name, text.encode()):
            assert isinstance(outcome(lambda: open_cache(caches["npy"])), UserError)


# --- npz files


shapes = st.lists(st.one_of(st.integers(-2, 6), st.sampled_from([2**31, 2**62])), max_size=5)
dtypes = st.sampled_from(
    ["<f4", ">f4", "<f2", "<f8", "|O", "<i4", "<c8", "|V0", "<U5", "|S0", "f4,f4"]
)
headers = st.one_of(
    st.builds(
        lambda shape, dtype, order: repr(
            {"descr": dtype, "fortran_order": order, "shape": tuple(shape)}
        ),
        shapes,
        dtypes,
        st.booleans(),
    ),
    st.sampled_from(
        ["{}", "(" * 5000, "__import__('os').system('x')", "{" + "'a':1," * 1000 + "}"]
    ),
    st.text(max_size=30),
)
entries = st.sampled_from(["moments.npy", "moments_flip.npy", "../x.npy", "/etc/x.npy", "x", "a/"])


def npy(header: str, body: bytes, version: tuple[int, int]) -> bytes:
    encoded = header.encode("latin1", "replace") + b"\n"
    length = len(encoded).to_bytes(2 if version[0] == 1 else 4, "little")
    return b"\x93NUMPY" + bytes(version) + length + encoded + body


@fuzz(200)
@given(
    st.lists(st.tuples(entries, headers, st.integers(0, 200)), max_size=4),
    st.sampled_from([(1, 0), (2, 0), (3, 0), (9, 9)]),
    st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA]),
)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_npz_files_of_any_content_are_refused_or_floats(caches, parts, version, method):
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", method) as archive:
        for name, header, size in parts:
            archive.writestr(name, npy(header, bytes(size), version))
    path = files(caches["published"])[0]
    with Changed(path, packed.getvalue()):
        found = outcome(lambda: read_moments(path))
    if not isinstance(found, UserError):
        assert found.dtype == np.float32 and found.ndim == 4 and found.size <= 400


def test_an_archive_that_unpacks_to_much_is_refused(caches):
    packed = io.BytesIO()
    with (
        zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("moments.npy", "w", force_zip64=True) as entry,
    ):
        for _ in range(64):
            entry.write(bytes(1 << 22))
    path = files(caches["published"])[0]
    with Changed(path, packed.getvalue()):
        assert "unpacks to more" in str(outcome(lambda: open_cache(caches["published"])))


def test_the_caches_of_these_tests_hold_what_was_cached(caches):
    for form, folder in caches.items():
        found = content(folder)
        assert found["labels"] == [0] * 10 + [1] * 10 and len(NAMES) == 10
        views = [MOMENTS[i, flip].tobytes() for i in range(10) for flip in (0, 1)]
        assert found["moments"] == views, form
