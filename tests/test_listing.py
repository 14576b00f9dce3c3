"""Folders as people have them: what is data in them, how many classes, and what a user is told."""

import os
import shutil
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
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
    TRAIN_FLAGS,
    assert_same_training,
    call,
    flags,
    make_images,
    refused,
    train,
)
from util import doctor, fid_stats
from util.data.images import read_image
from util.data.listing import LABELS, list_images
from util.errors import UserError

NO_CACHE = dict(use_cached=None, cached_path=None, vae_path="vae.ckpt", latent_scale=1.0)
NO_CACHE |= {"channel_order": "0,1,2,3", "class_num": None}


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
        return main_cache.main, *own
    if tool == "reconstruct":
        own = flags(inputs, COMMON, vae_path="vae.ckpt", image_dir=path, no_metrics=True)
        return reconstruction.main, *own, "--latent_scale=1", f"--output_dir={path / 'out'}"
    own = flags(inputs, COMMON, image_dir=path / "train", output=path / "s.npz")
    return fid_stats.main, *own, "--feature_extractor", PIXELS


def examined(inputs: Path, path: Path, capsys) -> str:
    """What the doctor prints of the data."""
    argv = flags(inputs, TRAIN_FLAGS, NO_CACHE, data_path=path, output_dir=path / "out")
    capsys.readouterr()
    with suppress(SystemExit):
        call(doctor.main, *argv, "--vae_path", str(inputs / "vae.ckpt"))
    return capsys.readouterr().out


COUNTS = {
    "train": "24 images in 3 classes",
    "cache": "24 images in 3 classes",
    "reconstruct": "24 images, rows of",
    "statistics": "24 images of 16 px",
}


@pytest.mark.parametrize("tool", COUNTS)
def test_hidden_entries_are_no_data_and_links_are_followed(inputs, data, capsys, tool):
    image = data / "train" / "ant" / "0.png"
    for name in (".ipynb_checkpoints/0.png", "__MACOSX/0.png", "ant/._0.png", "bee/@eaDir/0.png"):
        (data / "train" / name).parent.mkdir(exist_ok=True)
        shutil.copy(image, data / "train" / name)
    (data / "train" / "cat").rename(data / "elsewhere")
    (data / "train" / "cat").symlink_to("../elsewhere")
    call(*command(inputs, tool, data))
    assert COUNTS[tool] in capsys.readouterr().out


def test_published_caches_are_listed_likewise(inputs, tmp_path, capsys):
    moments = np.zeros((2 * CHANNELS, 4, 4), np.float32)
    for name in ("ant/0", "ant/._0", "bee/0", ".hidden/0"):
        (tmp_path / "kept" / name).parent.mkdir(parents=True, exist_ok=True)
        np.savez(tmp_path / "kept" / f"{name}.npz", moments=moments, moments_flip=moments)
    call(main_cache.main, "--verify", "--cached_path", str(tmp_path / "kept"))
    assert "2 images in 2 classes" in capsys.readouterr().out


def move(data: Path, name: str) -> None:
    """Put the folder of classes at another place in the folder."""
    (data / "train").rename(data / "moved")
    (data / name).parent.mkdir(parents=True, exist_ok=True)
    (data / "moved").rename(data / name)


@pytest.mark.parametrize(
    ("tool", "place", "remedy"),
    [
        ("train", "inner/train", "the class folders are not in {0}/train but deeper"),
        ("cache", "inner/images", "as {0}/train/images/ant; move them there"),
        ("train", "ant", "no folder {0}/train; name the folder with train/CLASS/ in it"),
    ],
)
def test_a_level_too_many_or_few_is_named(inputs, data, capsys, tool, place, remedy):
    move(data, place)
    if place.startswith("inner"):
        (data / "inner").rename(data / "train")
    line = refused(capsys, *command(inputs, tool, data))
    assert remedy.format(data) in line


def test_a_flat_folder_is_reconstructed(inputs, data, capsys):
    main, *argv = command(inputs, "reconstruct", data / "train" / "ant")
    call(main, *argv, "--images_per_class", "5")
    told = capsys.readouterr().out
    assert "--images_per_class 5 is how many of its 8 images" in told and "5 images" in told


@pytest.mark.parametrize("name", ["all", "ant"])
def test_one_class_may_have_folders_where_that_is_clear(inputs, data, capsys, name):
    move(data, f"train/{name}")
    if name != "all":
        shutil.copy(data / "train/ant/ant/0.png", data / "train/ant/0.png")
    call(*command(inputs, "train", data))
    assert "images in 1 classes" in capsys.readouterr().out


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
        ("data/train/hollow", "no images in .*hollow"),
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
    more = train(inputs, tmp_path / "more", class_num=5, epochs=1)
    assert "the model has 5 classes, --cached_path" in capsys.readouterr().out
    published = {k: more[k] for k in ("model", "model_ema", "optimizer", "epoch")}
    torch.save(published, tmp_path / "published.pth")
    argv = flags(inputs, TRAIN_FLAGS, class_num=None, output_dir=tmp_path / "x")
    call(main_tokenbridge.main, *argv, "--dry_run", "--resume", str(tmp_path / "published.pth"))
    assert "the model has 5 classes, --cached_path" in capsys.readouterr().out


# --- what is told


def grey(low: int, high: int, kind: type) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(low, high, (16, 16), kind))


def other_kinds(data: Path) -> None:
    for name in ("a.jfif", "b.gif", "c.jp2"):
        form = {"format": "JPEG"} if name == "a.jfif" else {}
        grey(0, 255, np.uint8).save(data / "train" / "ant" / name, **form)
    for name in ("a.heic", "notes.txt"):
        (data / "train" / "ant" / name).write_bytes(b"nothing that is read")


def test_training_and_doctor_say_what_may_surprise(inputs, data, capsys):
    call(*command(inputs, "train", data))
    assert "warning: " not in capsys.readouterr().out
    other_kinds(data)
    call(*command(inputs, "train", data))
    told = capsys.readouterr().out
    assert "27 images in 3" in told and "1 .heic files" in told, told
    assert "27 images in 3" in (found := examined(inputs, data, capsys)) and ".heic" in found


def test_images_of_any_name_and_too_large_ones_are_refused_in_one_line(inputs, data, capsys):
    argv = flags(inputs, CACHE_FLAGS, data_path=data, cached_path=data / "x", num_workers=1)
    line = refused(capsys, main_cache.main, *argv, "--max_image_pixels", "300")
    assert "304 pixels, more than --max_image_pixels 300" in line
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


SYNSETS = ["n01440764", "n01443537", "n02123045"]


def lay_out(data: Path, layout: str) -> Path:
    """The images of data/train/ for train and for val, as Kaggle or the hub has them."""
    for old, new in zip(("ant", "bee", "cat"), SYNSETS, strict=True):
        (data / "train" / old).rename(data / "train" / new)
    files = sorted((data / "train").rglob("*.png"), key=lambda path: path.name)  # classes mixed
    root, flat = data / "imagenet", data / "imagenet/ILSVRC/Data/CLS-LOC/val"
    flat.mkdir(parents=True)
    if layout == "parquet":
        images = [{"bytes": p.read_bytes(), "path": f"{p.parent.name}_{p.name}"} for p in files]
        table = pa.table({"image": images, "label": [SYNSETS.index(p.parent.name) for p in files]})
        for split in ("train", "validation"):
            pq.write_table(table, root / f"{split}-00000-of-00001.parquet", row_group_size=5)
        return root
    shutil.copytree(data / "train", flat.parent / "train")
    lines = {f"v{i:02}": path.parent.name for i, path in enumerate(files)}
    for name, path in zip(lines, files, strict=True):
        shutil.copy(path, flat / f"{name}.JPEG")
    table = ["ImageId,PredictionString", *(f"{v},{name} 1 2 3 4" for v, name in lines.items())]
    name, lines = (LABELS[0], table) if layout == "csv" else (LABELS[1], lines.values())
    (root / name).write_text("\n".join(lines) + "\n")
    return root


@pytest.mark.parametrize("layout", ["csv", "list", "parquet"])
def test_imagenet_is_found_as_kaggle_and_the_hub_have_it(inputs, data, capsys, layout, monkeypatch):
    root = lay_out(data, layout)
    plain, *found = list_images(data), list_images(root), list_images(root, "val")
    read = [sorted((y, read_image(p).tobytes()) for p, y in x.samples) for x in (plain, *found)]
    assert read[0] == read[1] == read[2] and [x.classes for x in found] == [SYNSETS, SYNSETS]
    assert {os.path.dirname(name) for name in found[1].names} == set(SYNSETS)
    assert ("24 images in 1 parquet files" in examined(inputs, root, capsys)) == ("q" in layout)
    (root / "ILSVRC/Data/CLS-LOC/val/x.JPEG").touch()
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(UserError, match=r"is not of the images in .*val|pip install .*\[parquet\]"):
        list_images(root, "val")
