"""Folders as people have them: what is data in them, how many classes, and what a user is told."""

import os
import shutil
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import ImageFolder

import main_cache
import main_tokenbridge
import reconstruction
from tests.measures import PIXELS
from tests.runs import (
    CACHE_FLAGS,
    CHANNELS,
    COMMON,
    IMAGE_FLAGS,
    RECONSTRUCTION_FLAGS,
    TRAIN_FLAGS,
    assert_same_training,
    call,
    flags,
    make_images,
    refused,
    save_published,
    train,
)
from util import doctor, fid_stats
from util.data.listing import list_images
from util.errors import UserError

NO_CACHE = IMAGE_FLAGS | {"class_num": None}


@pytest.fixture
def data(tmp_path) -> Path:
    """data/train/CLASS/0.png ..., to be changed."""
    make_images(tmp_path / "data", 16)
    return tmp_path / "data"


def command(inputs: Path, tool: str, path: Path) -> tuple:
    """A script's main and its flags, reading images of (a part of) a folder."""
    if tool == "train":
        own = flags(inputs, TRAIN_FLAGS, NO_CACHE, data_path=path, output_dir=path / "out")
        return main_tokenbridge.main, *own, "--dry_run"
    if tool == "cache":
        own = flags(inputs, CACHE_FLAGS, data_path=path, cached_path=path / "cache")
        return main_cache.main, *own, "--dry_run"
    if tool == "reconstruct":
        own = flags(inputs, RECONSTRUCTION_FLAGS, image_dir=path)
        return reconstruction.main, *own, "--dry_run"
    own = flags(inputs, COMMON, image_dir=path / "train", output=path / "s.npz")
    return fid_stats.main, *own, "--feature_extractor", PIXELS


def examined(inputs: Path, path: Path, capsys) -> str:
    """What the doctor prints of the data."""
    argv = flags(inputs, TRAIN_FLAGS, NO_CACHE, data_path=path, output_dir=path / "out")
    capsys.readouterr()
    with suppress(SystemExit):
        call(doctor.main, *argv)
    return capsys.readouterr().out


COUNTS = {
    "train": "24 images in 3 classes",
    "cache": "images to encode         24",
    "reconstruct": "24 images as original",
    "statistics": "24 images of 16 px",
}


@pytest.mark.parametrize("tool", COUNTS)
def test_hidden_entries_and_loops_are_no_data(inputs, data, capsys, tool):
    image = data / "train" / "ant" / "0.png"
    for name in (".ipynb_checkpoints/0.png", "__MACOSX/0.png", "ant/._0.png", "bee/@eaDir/0.png"):
        (data / "train" / name).parent.mkdir(exist_ok=True)
        shutil.copy(image, data / "train" / name)
    (data / "train" / "loop").symlink_to(".")
    (data / "train" / "ant" / "loop").symlink_to("../..")
    (data / "train" / "ant" / "a.png").symlink_to("0.png")
    (data / "train" / "bee" / "self.png").symlink_to("self.png")
    if tool == "train":  # which takes a folder val/ for validation
        shutil.copytree(data / "train" / "bee", data / "val" / "bee", symlinks=True)
        shutil.copytree(data / "val" / "bee", data / "val" / ".ipynb_checkpoints", symlinks=True)
    call(*command(inputs, tool, data))
    out = capsys.readouterr().out
    assert COUNTS[tool] in out and "no validation loss" not in out
    line = next(line for line in out.splitlines() if "links to what is listed" in line)
    assert all(str(data / "train" / name) in line for name in ("loop", "ant/loop", "bee/self"))


def test_published_caches_are_listed_likewise(inputs, tmp_path, capsys):
    moments = np.zeros((2 * CHANNELS, 4, 4), np.float32)
    for name in ("ant/0", "ant/._0", "bee/0", ".hidden/0"):
        (tmp_path / "kept" / name).parent.mkdir(parents=True, exist_ok=True)
        np.savez(tmp_path / "kept" / f"{name}.npz", moments=moments, moments_flip=moments)
    (tmp_path / "kept" / "bee" / "loop").symlink_to("..")
    call(main_cache.main, "--verify", "--cached_path", str(tmp_path / "kept"))
    assert "2 images in 2 classes" in capsys.readouterr().out
    line = refused(capsys, main_cache.main, "--verify", "--cached_path", str(tmp_path))
    assert f"name --cached_path {tmp_path / 'kept'}" in line
    shutil.copytree(inputs / "cache", tmp_path / "ours")
    line = refused(capsys, main_cache.main, "--verify", "--cached_path", str(tmp_path))
    assert f"name --cached_path {tmp_path / 'ours'}" in line


def move(data: Path, name: str) -> None:
    """Put the folder of classes at another place in the folder."""
    (data / "train").rename(data / "moved")
    (data / name).parent.mkdir(parents=True, exist_ok=True)
    (data / "moved").rename(data / name)


@pytest.mark.parametrize(
    ("tool", "place", "named", "remedy"),
    [
        ("train", "inner/train", ".", "name --data_path {0}/train, or"),
        ("cache", "inner/images", ".", "not in {0}/train; move them there"),
        ("train", "images/train", ".", "name --data_path {0}/images"),
        ("cache", "train", "train", "name --data_path {0}"),
        ("train", "ant", ".", "no folder {0}/train; put the class folders there"),
        ("reconstruct", "train", "..", "name --image_dir {0}/train"),
    ],
)
def test_a_level_too_many_or_few_is_named(inputs, data, capsys, tool, place, named, remedy):
    move(data, place)
    if place.startswith("inner"):
        (data / "inner").rename(data / "train")
    line = refused(capsys, *command(inputs, tool, (data / named).resolve()))
    assert remedy.format(data) in line


def test_a_flat_folder_is_reconstructed_and_the_doctor_names_the_folder_inside(
    inputs, data, capsys
):
    main, *argv = command(inputs, "reconstruct", data / "train" / "ant")
    call(main, *argv, "--images_per_class", "5")
    told = capsys.readouterr().out
    assert "--images_per_class 5 is how many of its 8 images" in told and "5 images as" in told
    move(data, "train/train")
    assert f"name --data_path {data / 'train'}" in examined(inputs, data, capsys)


def test_one_class_may_have_folders_where_that_is_clear(data):
    move(data, "train/all")
    assert list_images(data).classes == ["all"]
    shutil.copy(data / "train/all/ant/0.png", data / "train/all/0.png")
    (data / "train" / "all").rename(data / "train" / "ant")
    assert list_images(data).classes == ["ant"]


def test_the_order_is_torchvision_s_where_nothing_is_out_of_order(data):
    """Indices of images, and so a resumed training and a cache, depend on it."""
    for name in ("ant/1/b.png", "ant/1.png", "ant/1/a/c.JPG", "ant/1-/d.webp", "ant/B.png"):
        (data / "train" / name).parent.mkdir(parents=True, exist_ok=True)
        (data / "train" / name).touch()
    expected = ImageFolder(data / "train")
    found = list_images(data)
    assert (found.classes, found.samples) == (expected.classes, expected.samples)


def test_listing_names_what_is_missing(tmp_path):
    for name, said in (
        ("", "no folder"),
        ("data", "no folder"),
        ("data/train", "no class folder"),
        ("data/train/hollow", "no images in hollow"),
    ):
        (tmp_path / name).mkdir(exist_ok=True)
        with pytest.raises(UserError, match=f"--data_path {tmp_path / 'data'}.*{said}"):
            list_images(tmp_path / "data")


# --- the number of classes


def test_classes_are_counted_where_no_flag_says(inputs, tmp_path, capsys):
    found = train(inputs, tmp_path / "own", class_num=None, epochs=1)
    assert found["config"]["class_num"] == 3
    assert_same_training(found, train(inputs, tmp_path / "given", epochs=1))
    capsys.readouterr()
    train(inputs, tmp_path / "more", class_num=5, epochs=1)
    assert "the model has 5 classes, --cached_path" in capsys.readouterr().out
    save_published(tmp_path / "more", tmp_path / "published.pth")
    asked = dict(resume=tmp_path / "published.pth", class_num=None, dry_run=True)
    call(main_tokenbridge.main, *flags(inputs, TRAIN_FLAGS, asked, output_dir=tmp_path / "x"))
    assert "the model has 5 classes, --cached_path" in capsys.readouterr().out


# --- what is told


def grey(low: int, high: int, kind: type) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(low, high, (16, 16), kind))


def other_kinds(data: Path) -> None:
    for name in ("a.jfif", "b.gif", "c.jp2"):
        form = {"format": "JPEG"} if name == "a.jfif" else {}
        grey(0, 255, np.uint8).save(data / "train" / "ant" / name, **form)
    for name in ("a.heic", "b.HEIC", "notes.txt"):
        (data / "train" / "ant" / name).write_bytes(b"nothing that is read")


def twelve_bits(data: Path) -> None:
    for path in data.rglob("*.png"):
        grey(0, 4096, np.uint16).save(path)


def numbers(data: Path) -> None:
    for name in ("0", "1", "2", "10"):
        shutil.copytree(data / "train" / "ant", data / "train" / name)


@pytest.mark.parametrize(
    ("change", "fragments"),
    [
        (other_kinds, ["27 images in 3", "2 .heic files"]),
        (twelve_bits, ["nearly black; if it holds 12 bits in 16"]),
        (numbers, ["as text, not as numbers: 0, 1, 10, 2"]),
    ],
)
def test_training_and_doctor_say_what_may_surprise(inputs, data, capsys, change, fragments):
    call(*command(inputs, "train", data))
    told = capsys.readouterr().out
    assert "warning: " not in told and "note: " not in told
    change(data)
    call(*command(inputs, "train", data))
    told = capsys.readouterr().out
    assert all(fragment in told for fragment in fragments), told
    found = examined(inputs, data, capsys)
    assert all(fragment in found for fragment in fragments), found


def test_images_of_any_name_and_too_large_ones_are_refused_in_one_line(inputs, data, capsys):
    argv = flags(inputs, CACHE_FLAGS, data_path=data, cached_path=data / "x", num_workers=1)
    line = refused(capsys, main_cache.main, *argv, "--max_image_pixels", "300")
    assert "is 304 pixels, more than --max_image_pixels 300" in line
    (data / "train" / "ant" / "a\nb.png").write_bytes(b"broken")
    assert "a\\nb.png" in refused(capsys, main_cache.main, *argv)


def test_an_unreadable_folder_is_not_passed_over(inputs, data, capsys, monkeypatch):
    scan = os.scandir

    def locked(folder):
        if Path(folder).name == "sub":
            raise PermissionError(13, "Permission denied", str(folder))
        return scan(folder)

    (data / "train" / "ant" / "sub").mkdir()
    monkeypatch.setattr(os, "scandir", locked)
    line = refused(capsys, *command(inputs, "train", data))
    assert "--data_path" in line and "Permission denied" in line and "ant/sub" in line
