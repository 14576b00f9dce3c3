"""Files become the right pixels, bad files one line; no order depends on the processes."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from tests.conftest import golden
from util.data.batches import Batches, MicroBatchSampler
from util.data.images import ImageDataset, center_crop, collate_skipping, read_image
from util.errors import UserError


def gradient(height: int = 6, width: int = 4) -> np.ndarray:
    """Bytes [H, W] without any symmetry, from 0 to 255."""
    return np.linspace(0, 255, height * width).round().astype(np.uint8).reshape(height, width)


def save(path: Path, pixels: np.ndarray, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    return path


# --- cropping and reading


def test_center_crop_equals_golden():
    data = golden("center_crop")
    for k in range(6):
        cropped = center_crop(Image.fromarray(data[f"in{k}"].numpy()), int(data[f"size{k}"]))
        np.testing.assert_array_equal(np.asarray(cropped), data[f"out{k}"])
    with pytest.raises(ValueError, match="1 x 60000"):  # a thread that would fill memory
        center_crop(Image.new("RGB", (1, 60000)), 256)


def test_images_of_all_kinds_become_upright_rgb_of_8_bits_and_transparent_parts_white(tmp_path):
    eight = gradient()
    sixteen = eight.astype(np.uint16) * 257  # scaled, not clipped
    for name in ("8.png", "16.png", "16.tif", "16.ppm"):
        image = read_image(save(tmp_path / name, eight if name == "8.png" else sixteen))
        np.testing.assert_array_equal(np.asarray(image), np.stack([eight] * 3, axis=-1), name)
    exif = Image.Exif()
    exif[0x0112] = 6  # shown upright after a quarter turn clockwise
    upright = np.asarray(read_image(save(tmp_path / "turned.png", eight, exif=exif)))[..., 0]
    np.testing.assert_array_equal(upright, np.rot90(eight, -1))
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "red.jpg")
    red, green, blue = read_image(tmp_path / "red.jpg").getpixel((4, 4))
    assert red > 240 and green < 15 and blue < 15

    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putdata([0, 1])
    palette.save(tmp_path / "palette.png", transparency=1)
    save(tmp_path / "rgba.png", np.array([[[10, 20, 30, 255], [0, 0, 0, 0]]], np.uint8))
    save(tmp_path / "la.png", np.array([[[90, 255], [90, 0]]], np.uint8))
    for name, colour in (("palette", [10, 20, 30]), ("rgba", [10, 20, 30]), ("la", [90] * 3)):
        assert np.asarray(read_image(tmp_path / f"{name}.png")).tolist() == [[colour, [255] * 3]]


def test_bad_files_are_named_with_the_remedy_and_an_image_bomb_with_its_size(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    whole = save(tmp_path / "whole.png", noise).read_bytes()
    contents = {"empty.png": b"", "cut.png": whole[: len(whole) // 2], "text.jpg": b"no image"}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    save(tmp_path / "float.tif", np.full((4, 4), 0.5, np.float32))
    save(tmp_path / "int32.tif", np.full((4, 4), 70000, np.int32))
    save(tmp_path / "other_format.png", gradient(), format="PCX")
    os.mkfifo(tmp_path / "pipe.png")
    others = ("float.tif", "int32.tif", "other_format.png", "pipe.png", "none.png")
    for name in (*contents, *others):
        with pytest.raises(UserError, match=f"{name}.*--skip_bad_images"):
            read_image(tmp_path / name)
    path = save(tmp_path / "bomb.png", np.zeros((40, 30), np.uint8))
    with pytest.raises(UserError, match="1200 pixels, more than --max_image_pixels 1199"):
        read_image(path, 1199)
    assert read_image(path, 1200).size == (30, 40)


# --- the dataset


@pytest.fixture
def samples(tmp_path) -> list[tuple[str, int]]:
    """Six images whose label is their number; numbers 2 and 3 cannot be read."""
    noise = np.random.default_rng(0).integers(0, 255, (6, 20, 30, 3), np.uint8)
    paths = [save(tmp_path / f"{i}.png", pixels) for i, pixels in enumerate(noise)]
    paths[2].write_bytes(b"")
    paths[3].write_bytes(paths[3].read_bytes()[:100])
    return [(str(path), i) for i, path in enumerate(paths)]


def test_items_are_cropped_and_flipped(samples):
    dataset = ImageDataset(samples, 16)
    image, label = dataset[1]
    expected = np.asarray(center_crop(read_image(samples[1][0]), 16)).transpose(2, 0, 1)
    np.testing.assert_array_equal(image.numpy(), expected)
    assert label == 1 and image.dtype == torch.uint8
    for flip, found in ((False, image), (True, image.flip(-1))):
        assert torch.equal(dataset[(1, flip)][0], found)


def test_batches_hold_the_items_as_they_lie_in_memory_without_the_dropped(samples):
    dataset = ImageDataset(samples, 16, on_bad="drop")
    keys = [[(1, True), (5, False), (2, False)], [(2, False), (3, True)], [4, 0]]
    how = dict(collate_fn=collate_skipping, num_workers=2)
    (images, labels), second, third = list(DataLoader(dataset, batch_sampler=keys, **how))
    assert labels.tolist() == [1, 5] and second is None and third[1].tolist() == [4, 0]
    assert images.dtype == torch.uint8 and images.shape == (2, 3, 16, 16)
    assert images.is_contiguous(memory_format=torch.channels_last)
    expected = (dataset[key][0] for key in keys[0][:2])
    assert all(torch.equal(*pair) for pair in zip(images, expected, strict=True))
    assert dataset.bad.nonzero().flatten().tolist() == [2, 3]


def test_next_readable_image_takes_the_place_of_a_bad_one(samples, capfd):
    dataset = ImageDataset(samples, 16, on_bad="next")
    for _ in range(2):
        image, label = dataset[(2, True)]
        assert label == 4 and torch.equal(image, dataset[(4, True)][0])
    assert dataset.bad.sum() == 2
    named = capfd.readouterr().err.splitlines()  # once, however often they are met
    assert len(named) == 2 and "2.png" in named[0] and "3.png" in named[1]
    assert ImageDataset([samples[1], samples[2]], 16, on_bad="next")[1][1] == 1  # the first again
    with pytest.raises(UserError, match="none of the 2 images"):
        ImageDataset(samples[2:4], 16, on_bad="next")[0]


# --- the order of samples

N, B, G, SEED = 131, 3, 12, 7  # 36 samples a step, 3 steps an epoch, 23 samples left over


def micro_batches(world_size: int, first_step: int = 0, num_steps: int = 8) -> dict:
    """{(step, j): keys} of all processes together."""
    found, steps = {}, range(first_step, first_step + num_steps)
    for rank in range(world_size):
        sampler = MicroBatchSampler(Batches(B, G, N, SEED), steps, rank, world_size)
        batches = list(sampler)
        assert len(batches) == len(sampler)
        for number, keys in enumerate(batches):
            step, turn = divmod(number, G // world_size)
            found[first_step + step, turn * world_size + rank] = keys
    return found


@pytest.mark.parametrize("world_size", [1, 3, 4, 12])
def test_micro_batches_depend_neither_on_the_processes_nor_on_restarts(world_size):
    alone, rest = micro_batches(1), micro_batches(world_size, 5, 3)
    assert len(alone) == 8 * G and micro_batches(world_size) == alone
    assert rest == {key: keys for key, keys in alone.items() if key[0] >= 5}


def test_every_sample_comes_at_most_once_an_epoch_and_epochs_differ():
    batches = micro_batches(1)
    orders = []
    for epoch in range(2):
        keys = [batches[step, j] for step in range(3 * epoch, 3 * epoch + 3) for j in range(G)]
        orders.append([index for batch in keys for index, _ in batch])
        assert len(orders[-1]) == 3 * G * B == len(set(orders[-1]))
        assert set(orders[-1]) < set(range(N))
    assert orders[0] != orders[1] and orders[0] != sorted(orders[0])
    other = MicroBatchSampler(Batches(B, G, N, -1), range(1), 0, 1)
    assert [index for keys in other for index, _ in keys] != orders[0][: G * B]


def test_flips_are_fair_and_differ_between_epochs_or_are_none():
    def flips(epoch: int, flip: bool = True) -> dict[int, bool]:
        steps = range(400 * epoch, 400 * epoch + 400)
        sampler = MicroBatchSampler(Batches(10, 1, 4000, SEED), steps, 0, 1, flip)
        return dict(key for batch in sampler for key in batch)

    first, second = flips(0), flips(1)
    assert not any(flips(0, flip=False).values())
    assert abs(sum(first.values()) - 2000) < 200
    assert 1800 < sum(first[i] != second[i] for i in range(4000)) < 2200
