"""Folders as people have them: what is data in them, how many classes, and what a user is told."""

import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from torchvision.datasets import ImageFolder

import main_cache
from reconstruction import choose_images
from tests import runs
from tests.conftest import complaint
from util.data.images import read_image
from util.data.listing import LABELS, list_images
from util.errors import UserError
from util.evaluation.reference import open_images


@pytest.fixture
def data(tmp_path) -> Path:
    """data/train/CLASS/0.png ..., to be changed."""
    runs.make_images(tmp_path / "data", 16)
    return tmp_path / "data"


def test_hidden_entries_are_no_data_and_links_are_followed(data):
    expected = list_images(data).names
    for name in (".ipynb_checkpoints/0.png", "__MACOSX/0.png", "ant/._0.png", "bee/@eaDir/0.png"):
        (data / "train" / name).parent.mkdir(exist_ok=True)
        shutil.copy(data / "train" / "ant" / "0.png", data / "train" / name)
    (data / "train" / "cat").rename(data / "elsewhere")
    (data / "train" / "cat").symlink_to("../elsewhere")
    found = (list_images(data), choose_images(data, 9), choose_images(data / "train", 9))
    assert [images.names for images in found] == [expected] * 3 and len(expected) == 24
    assert len(open_images(data / "train", 16)) == 24


@pytest.mark.parametrize(
    ("place", "remedy"),
    [
        ("train/train", "the class folders are not in {0}/train but deeper"),
        ("train/images", "as {0}/train/images/ant; move them there"),
        ("ant", "no folder {0}/train; name the folder with train/CLASS/ in it"),
        ("train/all", None),  # one class, which may have folders where that is clear
        ("train/ant", None),
    ],
)
def test_a_level_too_many_or_few_is_named(data, place, remedy):
    (data / "train").rename(data / "moved")
    (data / place).parent.mkdir(exist_ok=True)
    (data / "moved").rename(data / place)
    if remedy:
        assert remedy.format(data) in complaint(list_images, data)
        return
    if place == "train/ant":
        shutil.copy(data / "train/ant/ant/0.png", data / "train/ant/0.png")
    assert len(list_images(data).classes) == 1


def test_of_each_class_or_of_a_flat_folder_the_first_images_are_reconstructed(data, capsys):
    for root in (data, data / "train"):
        expected = [f"{name}/{i}.png" for name in runs.CLASSES for i in (0, 1)]
        assert choose_images(root, 2).names == expected
    (data / "train" / "ant" / ".ipynb_checkpoints").mkdir()
    assert len(choose_images(data / "train" / "ant", 5).samples) == 5
    assert "--images_per_class 5 is how many of its 8 images" in capsys.readouterr().out


def test_the_order_is_torchvision_s_where_nothing_is_out_of_order(data):
    """Indices of images, and so a resumed training and a cache, depend on it."""
    for name in ("ant/1/b.png", "ant/1.png", "ant/1/a/c.JPG", "ant/1-/d.webp", "ant/B.png"):
        (data / "train" / name).parent.mkdir(parents=True, exist_ok=True)
        (data / "train" / name).touch()
    expected = ImageFolder(data / "train")
    found = list_images(data)
    assert (found.classes, found.samples) == (expected.classes, expected.samples)


def test_listing_names_what_is_missing_or_cannot_be_read(tmp_path, monkeypatch):
    data, scan = tmp_path / "data", os.scandir
    for name, said in (
        ("", "no folder"),
        ("data", "no folder"),
        ("data/train", "no class folder"),
        ("data/train/hollow", f"no images in {data}/train/hollow"),
    ):
        (tmp_path / name).mkdir(exist_ok=True)
        line = complaint(list_images, data)
        assert line.startswith(f"--data_path {data}: ") and said in line

    def locked(folder):
        if Path(folder).name == "sub":
            raise PermissionError(13, "Permission denied", str(folder))
        return scan(folder)

    (data / "train" / "hollow" / "sub").mkdir()
    monkeypatch.setattr(os, "scandir", locked)
    line = complaint(list_images, data)
    assert "--data_path" in line and "Permission denied" in line and "hollow/sub" in line


def test_classes_are_counted_where_no_flag_says(inputs, tmp_path, capsys):
    found = runs.train(inputs, tmp_path / "own", class_num=None, epochs=1)
    assert found["config"]["class_num"] == 3
    runs.assert_same_training(found, runs.train(inputs, tmp_path / "given", epochs=1))
    capsys.readouterr()
    runs.train(inputs, tmp_path / "more", class_num=5, epochs=1)
    assert "the model has 5 classes, --cached_path" in capsys.readouterr().out
    published = tmp_path / "published.pth"
    runs.save_published(tmp_path / "more", published)
    changes = dict(class_num=None, resume=published, dry_run=True)
    runs.use("train", inputs, output_dir=tmp_path / "x", **changes)
    assert "the model has 5 classes, --cached_path" in capsys.readouterr().out


def test_other_kinds_of_images_are_read_or_counted(data, capsys):
    pixels = np.random.default_rng(0).integers(0, 255, (16, 16), np.uint8)
    for name, form in (("a.jfif", "JPEG"), ("b.gif", "GIF"), ("c.jp2", "JPEG2000")):
        Image.fromarray(pixels).save(data / "train" / "ant" / name, format=form)
    assert len([read_image(path) for path, _ in list_images(data).samples]) == 27
    assert capsys.readouterr().out == ""
    for name in ("a.heic", "notes.txt"):
        (data / "train" / "ant" / name).write_bytes(b"nothing that is read")
    assert len(list_images(data).samples) == 27
    assert "warning: " in (told := capsys.readouterr().out) and "1 .heic files" in told


def test_images_of_any_name_and_too_large_ones_are_refused_in_one_line(inputs, data, capsys):
    settings = dict(data_path=data, cached_path=data / "x", num_workers=1)
    argv = runs.flags(inputs, runs.CACHE_FLAGS, settings)
    line = runs.refused(capsys, main_cache.main, *argv, "--max_image_pixels", "300")
    assert "304 pixels, more than --max_image_pixels 300" in line
    (data / "train" / "ant" / "a\nb.png").write_bytes(b"broken")
    assert "a\\nb.png" in runs.refused(capsys, main_cache.main, *argv)


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
def test_imagenet_is_found_as_kaggle_and_the_hub_have_it(data, capsys, layout, monkeypatch):
    root = lay_out(data, layout)
    plain, *found = list_images(data), list_images(root), list_images(root, "val")
    read = [sorted((y, read_image(p).tobytes()) for p, y in x.samples) for x in (plain, *found)]
    assert read[0] == read[1] == read[2] and [x.classes for x in found] == [SYNSETS, SYNSETS]
    assert {os.path.dirname(name) for name in found[1].names} == set(SYNSETS)
    told = capsys.readouterr().out
    assert ("24 images in 1 parquet files" in told) == (layout == "parquet")
    (root / "ILSVRC/Data/CLS-LOC/val/x.JPEG").touch()
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(UserError, match=r"is not of the images in .*val|pip install .*\[parquet\]"):
        list_images(root, "val")
