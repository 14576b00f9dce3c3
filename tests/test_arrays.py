"""Arrays come back as numpy wrote them; what a header claims beyond its file is not believed."""

import io
import os
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest

from util.data.arrays import map_npy, read_npz

ARRAY = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
LIMIT = 10_000


def npy(array: np.ndarray, **header) -> bytes:
    """An npy file whose header says something else than its content."""
    file = io.BytesIO()
    told = np.lib.format.header_data_from_array_1_0(array) | header
    np.lib.format.write_array_header_1_0(file, told)
    return file.getvalue() + array.tobytes()


def npz(path: Path, content: bytes, **options) -> Path:
    with zipfile.ZipFile(path, "w", **options) as archive:
        archive.writestr("a.npy", content)
    return path


@pytest.mark.parametrize("dtype", ["<f2", "<f4", ">f8", "<i4", "S3"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_arrays_come_back_as_numpy_wrote_them(tmp_path, dtype, order):
    array = np.asarray(ARRAY.astype(dtype), order=order)
    np.save(tmp_path / "a.npy", array)
    np.savez(tmp_path / "a.npz", a=array, b=array[0])
    np.savez_compressed(tmp_path / "c.npz", a=array)
    mapped = map_npy(tmp_path / "a.npy")
    both = read_npz(tmp_path / "a.npz", ["b", "absent", "a"], LIMIT)
    compressed = read_npz(tmp_path / "c.npz", ["a"], LIMIT)["a"]
    assert list(both) == ["b", "a"]
    pairs = ((mapped, array), (both["b"], array[0]), (both["a"], array), (compressed, array))
    for found, expected in pairs:
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected)
        with pytest.raises(ValueError, match="read-only"):
            found[...] = found


def test_a_mapped_file_is_read_where_it_is_touched(tmp_path):
    np.save(tmp_path / "a.npy", ARRAY)
    mapped = map_npy(tmp_path / "a.npy")
    with open(tmp_path / "a.npy", "r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(struct.pack("<f", 5.0))
    assert mapped[-1, -1, -1] == 5


def test_headers_must_account_for_every_byte(tmp_path):
    path = tmp_path / "a.npy"
    for shape in ((2, 3, 5), (2, 3, 3), (1 << 60,), (1 << 62, 1 << 62), (-2, -12), (), (24, 0)):
        path.write_bytes(npy(ARRAY, shape=shape))
        for read in (lambda: map_npy(path), lambda: read_npz(tmp_path / "a.npz", ["a"], LIMIT)):
            npz(tmp_path / "a.npz", path.read_bytes())
            with pytest.raises(ValueError, match="bytes"):
                read()
    path.write_bytes(npy(ARRAY, descr="<f2"))  # half of the entry, whose checksum comes last
    with pytest.raises(ValueError, match="float16 .* 48 bytes, but 96"):
        map_npy(path)


def test_objects_are_refused_by_their_header(tmp_path):
    objects = np.array([{}], dtype=object)
    np.save(tmp_path / "a.npy", objects, allow_pickle=True)
    np.savez(tmp_path / "a.npz", a=objects)
    with pytest.raises(ValueError, match="never unpickled"):
        map_npy(tmp_path / "a.npy")
    with pytest.raises(ValueError, match="never unpickled"):
        read_npz(tmp_path / "a.npz", ["a"], LIMIT)


def test_an_entry_that_unpacks_to_more_than_it_may_is_not_unpacked(tmp_path):
    bomb = npy(np.zeros(10**6, np.float32))
    path = npz(tmp_path / "a.npz", bomb, compression=zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < LIMIT
    with pytest.raises(ValueError, match=f"more than {LIMIT} bytes"):
        read_npz(path, ["a"], LIMIT)
    npz(path, bomb, compression=zipfile.ZIP_LZMA)
    with pytest.raises(ValueError, match="compressed by method 14"):
        read_npz(path, ["a"], 10**7)


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_wrong_bit_in_an_entry_never_passes(tmp_path, compression):
    path = npz(tmp_path / "a.npz", npy(ARRAY), compression=compression)
    whole = path.read_bytes()
    for position in range(len(whole)):
        for bit in (0, 1, 3):
            content = bytearray(whole)
            content[position] ^= 1 << bit
            path.write_bytes(content)
            try:
                found = read_npz(path, ["a"], LIMIT)["a"]
            except Exception:
                continue
            assert found.dtype == ARRAY.dtype
            np.testing.assert_array_equal(found, ARRAY)
