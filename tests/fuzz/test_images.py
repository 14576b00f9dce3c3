"""Images that are damaged or made to harm: refused in one line, or pixels of the right shape."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tests.fuzz.harness import damaged, fuzz, outcome, seeds
from util.data.images import ImageDataset
from util.errors import UserError

SIZE = 16


def encoded(form: str, mode: str = "RGB", size: tuple[int, int] = (40, 30), **options) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, form, **options)
    return file.getvalue()


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


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("images") / "image.png"


def read(path: Path) -> object:
    """As training does; pixels or an error of ours."""
    found = outcome(lambda: ImageDataset([(str(path), 0)], SIZE)[(0, True)])
    if not isinstance(found, UserError):
        pixels, label = found
        assert pixels.shape == (3, SIZE, SIZE) and pixels.dtype == torch.uint8 and label == 0
    return found


@fuzz(500)
@given(st.sampled_from(range(len(IMAGES))), seeds)
def test_a_damaged_image_is_refused_or_has_pixels(path, number, seed):
    path.write_bytes(damaged(IMAGES[number], seed))
    read(path)


def test_undamaged_images_are_read_but_none_from_a_device(path, tmp_path):
    for content in IMAGES:
        path.write_bytes(content)
        assert not isinstance(read(path), UserError)
    (tmp_path / "null.png").symlink_to("/dev/zero")
    assert "regular file" in str(read(tmp_path / "null.png"))


# --- bombs: small files of large images


def chunk(name: bytes, content: bytes) -> bytes:
    crc = zlib.crc32(name + content)
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", crc)


def png(width: int, height: int, *chunks: bytes) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + b"".join(chunks) + chunk(b"IEND", b"")


def zeros(size: int) -> bytes:
    return zlib.compress(bytes(size), 9)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: png(60000, 60000, chunk(b"IDAT", zeros(1 << 24))), "pixels, more than"),
        (lambda: png(8, 8, chunk(b"IDAT", zeros(1 << 28))), None),  # the rest is left aside
        (lambda: png(8, 8, chunk(b"zTXt", b"a\0\0" + zeros(1 << 28))), None),
        (lambda: b"P6 999999999 999999999 255\n" + bytes(100), "pixels, more than"),
    ],
)
def test_a_bomb_is_refused_without_its_size(path, make, said):
    path.write_bytes(make())
    found = read(path)
    assert said is None or said in str(found)
