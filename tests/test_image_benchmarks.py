"""The benchmarks of images: they compare what the project reads, and their tables fill the page."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import main_cache
from benchmarks import decoding, feeding, images, loaders, pipelines, run, works
from models.tokenizers.kl16 import AutoencoderKL
from tests.conftest import tiny_model
from tests.runs import call, refused
from util.data.images import ImageDataset
from util.page import END, begin

JPEG = images.dead_leaves(260, 180, np.random.default_rng(0))


@pytest.fixture
def page(tmp_path) -> Path:
    path = tmp_path / "page.md"
    path.write_text("".join(f"{begin(m.MARK)}\n{END}\n" for m in (images, feeding)))
    return path


@pytest.fixture
def narrow(monkeypatch):
    for module in (works, pipelines):
        small = partial(AutoencoderKL, ch=32, num_res_blocks=1)
        monkeypatch.setattr(module, "AutoencoderKL", small)


def test_the_box_is_what_the_dataset_reads(tmp_path):
    path = tmp_path / "leaves.jpg"
    path.write_bytes(JPEG)
    expected = ImageDataset([(str(path), 0)], 32)[0][0].permute(1, 2, 0)
    assert np.array_equal(images.decoded(JPEG, images.FIRST, 32), expected)


def test_a_draft_decodes_fewer_pixels_of_nearly_the_same_image(monkeypatch):
    sizes, crop = [], images.center_crop
    monkeypatch.setattr(
        images, "center_crop", lambda x, size: sizes.append(x.size) or crop(x, size)
    )
    box, draft, partly = (np.asarray(images.decoded(JPEG, w, 32), int) for w in images.WAYS)
    assert sizes == [(260, 180), (65, 45), (130, 90)]  # 180 is halved twice before it is 32 wide
    assert 0 < np.abs(draft - box).mean() < 5 and 0 < np.abs(partly - box).mean() < 5
    small = (np.asarray(images.decoded(JPEG, w, 128), int) for w in images.WAYS)
    assert len({pixels.tobytes() for pixels in small}) == 1  # nothing to halve


def test_indices_of_the_same_images_are_the_same_and_of_others_are_not():
    judge = images.Judge(None, torch.device("cpu"))
    first = np.array(images.decoded(JPEG, images.FIRST, 32))[None]
    latents = judge.latents(np.concatenate([first, 255 - first]))
    assert judge.changed(judge.latents(first), latents[:1]) == 0
    assert judge.changed(latents[1:], latents[:1]) > 0.1


def test_the_table_of_a_folder_is_written_into_the_page(page, tmp_path, capsys):
    for i in range(3):
        (tmp_path / f"{i}.jpg").write_bytes(JPEG)
    flags = ["--data_path", str(tmp_path), "--img_size", "32", "--images", "2"]
    call(images.main, *flags, "--page", str(page))
    table = page.read_text().split(END)[0]
    assert all(f"| 2 of {tmp_path.name} | {way} |" in table for way in images.WAYS)
    (tmp_path / "0.jpg").write_bytes(JPEG[:1000])
    assert "0.jpg" in refused(capsys, images.main, *flags)
    assert "holds no .jpg" in refused(capsys, images.main, "--data_path", str(page.parent / "none"))


@pytest.mark.parametrize("command", [images, feeding, decoding])
def test_a_page_without_a_place_is_refused_before_anything_is_measured(command, tmp_path, capsys):
    assert "--page" in refused(capsys, command.main, "--page", str(tmp_path / "none.md"))
    (tmp_path / "page.md").write_text("words")
    line = refused(capsys, command.main, "--page", str(tmp_path / "page.md"))
    assert "has no place" in line and command.MARK in line


@pytest.mark.parametrize(("command", "flags"), [(images, ()), (run, ("--device", "cpu"))])
def test_sizes_that_do_not_fit_are_refused_before_anything_is_measured(command, flags, capsys):
    assert "--img_size 100" in refused(capsys, command.main, "--img_size", "100", *flags)


def test_there_are_labels_for_batches_of_more_than_all_classes():
    labels = works.class_labels(2003, tiny_model())
    classes = tiny_model().config.class_num
    assert labels.shape == (2003,) and labels.min() >= 0 and labels.max() < classes
    assert torch.equal(labels[:classes], torch.arange(classes))


def test_what_is_fed_how_fast_is_written_into_the_page(page, narrow, monkeypatch):
    for module, name, value in (
        (loaders, "BATCHES", 2),
        (feeding, "FILED", 16),
        (feeding, "SHARD", 8),
        (feeding, "BATCH", 4),
        (feeding, "IMG_SIZE", 32),
        (feeding, "SIZES", {"cpu": feeding.SIZES["cpu"] | {"photos": 8}}),
    ):
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr("benchmarks.machine.MATRIX", {"cpu": 64})
    monkeypatch.setattr("benchmarks.work.SHORTEST", 0.0)
    encode, background = main_cache.encode, main_cache.in_background
    call(feeding.main, "--repeats", "1", "--page", str(page))
    table = page.read_text().split(begin(feeding.MARK))[1]
    assert table.count("| fast |") == 5 and table.count("| encode and write in turn |") == 2
    assert "| PNG |" in table and "| 10 workers |" in table
    assert (main_cache.encode, main_cache.in_background) == (encode, background)
