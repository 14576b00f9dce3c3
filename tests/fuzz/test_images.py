"""Images that are damaged or made to harm: refused in one line, or pixels of the right shape."""

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tests.fuzz.harness import damaged, fuzz, outcome, seeds
from util.data.images import ImageDataset, read_image
from util.errors import UserError

SIZE = 16


def encoded(form: str, mode: str = "RGB", size: tuple[int, int] = (40, 30), **options) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, form, **options)
    return file.getvalue()


EXIF = Image.Exif()
EXIF[0x0112] = 6
FRAMES = [Image.new("RGB", (40, 30), colour) for colour in ("red", "blue")]
IMAGES = {
    "png": encoded("PNG"),
    "palette": encoded("PNG", "P", transparency=3),
    "transparent": encoded("PNG", "LA"),
    "jpeg": encoded("JPEG", exif=EXIF),
    "progressive": encoded("JPEG", progressive=True),
    "cmyk": encoded("JPEG", "CMYK"),
    "webp": encoded("WEBP"),
    "webp frames": encoded("WEBP", save_all=True, append_images=FRAMES),
    "gif": encoded("GIF", save_all=True, append_images=FRAMES),
    "tiff": encoded("TIFF"),
    "tiff lzw": encoded("TIFF", compression="tiff_lzw"),
    "tiff jpeg": encoded("TIFF", compression="jpeg"),
    "tiff 16": encoded("TIFF", "I;16"),
    "bmp": encoded("BMP"),
    "ppm": encoded("PPM"),
    "pgm": encoded("PPM", "L"),
}


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("images") / "image.png"


def check(path: Path) -> object:
    """Read it as training does; pixels or an error of ours."""
    found = outcome(lambda: ImageDataset([(str(path), 0)], SIZE)[(0, True)])
    if not isinstance(found, UserError):
        pixels, label = found
        assert pixels.shape == (3, SIZE, SIZE) and pixels.dtype == torch.uint8 and label == 0
    return found


@fuzz(500)
@given(st.sampled_from(sorted(IMAGES)), seeds)
def test_a_damaged_image_is_refused_or_has_pixels(path, form, seed):
    path.write_bytes(damaged(IMAGES[form], seed))
    check(path)


def test_undamaged_images_are_read(path):
    for content in IMAGES.values():
        path.write_bytes(content)
        assert not isinstance(check(path), UserError)


# --- bombs: small files of large images


def chunk(name: bytes, content: bytes) -> bytes:
    crc = zlib.crc32(name + content)
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", crc)


def png(width: int, height: int, *chunks: bytes) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + b"".join(chunks) + chunk(b"IEND", b"")


def packed(size: int) -> bytes:
    """Zeros by the gigabyte in a few kilobytes."""
    packer, parts = zlib.compressobj(9), []
    for _ in range(size >> 20):
        parts.append(packer.compress(bytes(1 << 20)))
    return b"".join(parts) + packer.flush()


BOMBS: dict[str, Callable[[], bytes]] = {
    "png size": lambda: png(60000, 60000, chunk(b"IDAT", packed(1 << 24))),
    "png data": lambda: png(8, 8, chunk(b"IDAT", packed(1 << 28))),
    "png text": lambda: png(8, 8, chunk(b"zTXt", b"a\0\0" + packed(1 << 28))),
    "ppm": lambda: b"P6 999999999 999999999 255\n" + bytes(100),
    "thin": lambda: encoded("PNG", size=(60000, 1)),
}
# What is too much of these is left aside or short of the limit.
HARMLESS = ("png data", "png text", "thin")


@pytest.mark.parametrize("kind", BOMBS)
def test_a_bomb_is_refused_without_its_size(path, kind):
    path.write_bytes(BOMBS[kind]())
    found = check(path)
    assert isinstance(found, UserError) or kind in HARMLESS


def test_a_jpeg_of_many_scans_takes_no_minutes(path):
    """Each scan of a progressive image costs a pass over all of it."""
    file = io.BytesIO()
    Image.new("RGB", (4000, 3000), "red").save(file, "JPEG", progressive=True)
    content = file.getvalue()
    last = content.rindex(b"\xff\xda")
    path.write_bytes(content[:last] + content[last:-2] * 20_000 + content[-2:])
    assert "scans" in str(check(path))
    path.write_bytes(content[:last] + content[last:-2] * 50 + content[-2:])
    assert not isinstance(check(path), UserError)


def test_no_image_is_read_from_a_pipe_or_a_device(tmp_path):
    (tmp_path / "null.png").symlink_to("/dev/zero")
    assert "regular file" in str(outcome(lambda: read_image(tmp_path / "null.png")))
