"""Damaged and hostile files: checkpoints, FID statistics, latent caches and images.

A reader returns what was saved (of an image, pixels of the right shape) or raises a UserError of
one line, within SECONDS and BYTES of memory. TOKENBRIDGE_FUZZ_EXAMPLES=5000 tries as many new
examples of each kind.
"""

import argparse
import faulthandler
import io
import os
import random
import resource
import signal
import struct
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.runs import tensors
from tests.test_latent_cache import MOMENTS, fill
from util.checkpoint import load_checkpoint
from util.data.images import ImageDataset
from util.data.latent_cache import open_cache, verify
from util.errors import UserError
from util.evaluation.reference import check_statistics, load_fid_statistics

SECONDS = 10  # a hang; the slowest reader here takes a tenth of one
BYTES = 1 << 30
LONGEST_LINE = 1500  # characters, of which some hundreds are a path
EXAMPLES = int(os.environ.get("TOKENBRIDGE_FUZZ_EXAMPLES", "0"))

seeds = st.integers(0, 2**32 - 1)  # of `damaged`


def fuzz(examples: int):
    """Decorator: so many examples in the short form. Fixtures are not made anew for each."""
    return settings(
        max_examples=EXAMPLES or examples,
        derandomize=not EXAMPLES,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


class Hang(BaseException):
    """Not an Exception, which a reader may turn into an error of ours."""


def outcome(read: Callable, bounded: bool = True):
    """What a reader returns or the UserError it raises; all else fails the test.

    bounded: whether it may not even try to take more memory than BYTES.
    """
    with _limits():
        try:
            return read()
        except UserError as error:
            line = str(error)
            assert line and "\n" not in line and len(line) < LONGEST_LINE, line
            cause = error
            while cause := cause.__cause__:
                huge = isinstance(cause, MemoryError) or "allocate" in str(cause)
                assert not huge or not bounded, f"tried to take more than {BYTES} bytes: {cause!r}"
            return error


@contextmanager
def _limits() -> Iterator[None]:
    def stop(*_):
        raise Hang(f"more than {SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    faulthandler.dump_traceback_later(3 * SECONDS, exit=True)  # where Python is not asked
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    if sys.platform == "linux":
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + BYTES, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def damaged(content: bytes, seed: int) -> bytes:
    """One to four changes at places that the seed chooses."""
    rng, data = random.Random(seed), bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 4))):
        start = rng.randrange(len(data) + 1)
        stop = min(len(data), start + rng.choice((1, 2, 4, 16, 200)))
        piece = bytes(data[start:stop])
        data[start:stop] = rng.choice(
            (
                bytes(byte ^ 1 << rng.randrange(8) for byte in piece[:1]) + piece[1:],
                rng.choice((b"\0", b"\xff", b"\x7f")) * len(piece),
                rng.randbytes(rng.choice((1, 4, 100))) + piece,
                b"",
                piece * rng.choice((2, 20)),
            )
        )
        if rng.random() < 0.15:
            del data[start:]
    return bytes(data)


def packed(write: Callable[[io.BytesIO], None]) -> bytes:
    write(file := io.BytesIO())
    return file.getvalue()


# --- checkpoints and statistics

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
CHECKPOINT = packed(lambda file: torch.save(SAVED, file))
STATISTICS = {
    ".npz": packed(lambda file: np.savez(file, **STATS, **RECORD)),
    ".pt": packed(lambda file: torch.save(STATS, file)),
}


def parts(saved: dict) -> tuple:
    """Equal where all is, tensors to the bit."""
    return repr(saved), {name: t.numpy().tobytes() for name, t in tensors(saved).items()}


@fuzz(300)
@given(seed=seeds)
def test_a_damaged_checkpoint_is_refused_or_what_was_saved(tmp_path, seed):
    path = tmp_path / "checkpoint.pth"
    path.write_bytes(damaged(CHECKPOINT, seed))
    found = outcome(lambda: load_checkpoint(path))
    assert isinstance(found, UserError) or parts(found.saved) == parts(SAVED)


@pytest.mark.parametrize("suffix", STATISTICS)
@fuzz(150)
@given(seed=seeds)
def test_damaged_statistics_are_refused_or_mu_and_sigma(tmp_path, suffix, seed):
    path = tmp_path / f"damaged{suffix}"
    path.write_bytes(damaged(STATISTICS[suffix], seed))
    found = outcome(lambda: load_fid_statistics(path, D))
    if not isinstance(found, UserError):
        assert all(np.array_equal(found[name], STATS[name]) for name in STATS)
        said = outcome(lambda: check_statistics(path, found, {}, None))
        if not isinstance(said, UserError):
            assert all(said[name] == RECORD[name].item() for name in said.keys() & RECORD)


# --- latent caches


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


# --- images

SIZE = 16


def encoded(form: str, mode: str = "RGB", **options) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 255, (30, 40, 3), np.uint8)
    return packed(lambda file: Image.fromarray(pixels).convert(mode).save(file, form, **options))


EXIF = Image.Exif()
EXIF[0x0112] = 6
FRAMES = dict(save_all=True, append_images=[Image.new("RGB", (40, 30), "red")])
IMAGES = [
    *(encoded("PNG"), encoded("PNG", "P", transparency=3), encoded("PNG", "LA")),
    *(encoded("JPEG", exif=EXIF), encoded("JPEG", progressive=True), encoded("JPEG", "CMYK")),
    *(encoded("WEBP"), encoded("WEBP", **FRAMES), encoded("GIF", **FRAMES), encoded("TIFF")),
    *(encoded("TIFF", compression="tiff_lzw"), encoded("TIFF", compression="jpeg")),
    *(encoded("TIFF", "I;16"), encoded("BMP"), encoded("PPM"), encoded("PPM", "L")),
]


def read(path: Path, content: bytes | None = None) -> object:
    """Pixels, as training reads them, or an error of ours; of a file with that content."""
    if content is not None:
        path.write_bytes(content)
    found = outcome(lambda: ImageDataset([(str(path), 0)], SIZE)[(0, True)])
    if not isinstance(found, UserError):
        pixels, label = found
        assert pixels.shape == (3, SIZE, SIZE) and pixels.dtype == torch.uint8 and label == 0
    return found


@fuzz(500)
@given(image=st.sampled_from(range(len(IMAGES))), seed=seeds)
def test_a_damaged_image_is_refused_or_has_pixels(tmp_path, image, seed):
    read(tmp_path / "image.png", damaged(IMAGES[image], seed))


def test_undamaged_images_are_read_but_none_from_a_device(tmp_path):
    for content in IMAGES:
        assert not isinstance(read(tmp_path / "image.png", content), UserError)
    (tmp_path / "null.png").symlink_to("/dev/zero")
    assert "regular file" in str(read(tmp_path / "null.png"))


def chunk(name: bytes, content: bytes) -> bytes:
    crc = zlib.crc32(name + content)
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", crc)


def png(side: int, name: bytes, content: bytes) -> bytes:
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    chunks = chunk(b"IHDR", header), chunk(name, content), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def zeros(size: int) -> bytes:
    return zlib.compress(bytes(size), 9)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: png(60000, b"IDAT", zeros(1 << 24)), "pixels, more than"),
        (lambda: png(8, b"IDAT", zeros(1 << 28)), None),  # the rest is left aside
        (lambda: png(8, b"zTXt", b"a\0\0" + zeros(1 << 28)), None),
        (lambda: b"P6 999999999 999999999 255\n" + bytes(100), "pixels, more than"),
    ],
)
def test_a_bomb_is_refused_without_its_size(tmp_path, make, said):
    found = read(tmp_path / "bomb.png", make())
    assert said is None or said in str(found)
