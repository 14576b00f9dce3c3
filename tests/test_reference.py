"""References: files of statistics, read, refused and made; folders of real images."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from tests import runs
from tests.conftest import complaint
from tests.measures import FEATURES, PIXELS, prepare
from tests.runs import SIZE, call, on_processes
from tests.test_latent_cache import Trap
from util import fid_stats
from util.data.images import center_crop, read_image
from util.evaluation import reference
from util.evaluation.extractor import INCEPTION, Extractor
from util.evaluation.metrics import Measure
from util.evaluation.reference import load_fid_statistics

CPU = torch.device("cpu")
compared_with = partial(prepare, feature_extractor=PIXELS)


def test_nothing_in_a_pt_file_is_run(tmp_path):
    torch.save({"mu": np.arange(4.0), "sigma": np.eye(4)}, tmp_path / "cached.pt")
    found = load_fid_statistics(tmp_path / "cached.pt", 4)  # of torch-fidelity's cache
    np.testing.assert_array_equal(found["mu"], np.arange(4))
    torch.save({"mu": Trap(), "sigma": np.eye(4)}, tmp_path / "evil.pt")
    line = complaint(load_fid_statistics, tmp_path / "evil.pt", 4)
    assert f"--fid_stats {tmp_path / 'evil.pt'}" in line


def test_bad_statistics_are_refused_in_one_line(tmp_path):
    """And those that are not there: test_errors.py."""
    path = tmp_path / "stats.npz"
    for arrays, fragment in (
        (dict(mu=np.zeros(4)), "mu and sigma"),
        (dict(mu=np.array([{}]), sigma=np.eye(2)), "mu and sigma"),
        (dict(mu=np.zeros(6), sigma=np.eye(6)), "4 features"),
        (dict(mu=np.zeros(4), sigma=np.eye(4) * np.nan), "not finite"),
        (dict(mu=np.zeros(4), sigma=np.tri(4)), "not symmetric"),
        (dict(mu=np.zeros(4), sigma=np.ones((4, 4)) - 2 * np.eye(4)), "negative"),
    ):
        np.savez(path, **arrays)
        line = complaint(load_fid_statistics, path, 4)
        assert line.startswith(f"--fid_stats {path}: ") and fragment in line


# --- made from a folder


@pytest.fixture(scope="module")
def images(inputs) -> Path:
    """24 images of various widths in three class folders."""
    return inputs / "data"


def flags(images: Path, output: str | Path, **changes) -> list[str]:
    own = dict(image_dir=images, output=output, batch_size=5, feature_extractor=PIXELS)
    return runs.flags(images, runs.COMMON, own, changes)


@pytest.fixture(scope="module")
def made(images, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("made") / "new" / "stats.npz"
    call(fid_stats.main, *flags(images, output))
    return output


def test_file_holds_mean_and_covariance_of_the_cropped_images(array, made):
    pixels = torch.from_numpy(np.load(array)["arr_0"]).permute(0, 3, 1, 2)
    features = Extractor("pixels", None, CPU)(pixels)["mixed"].numpy()
    found = load_fid_statistics(made, FEATURES)
    np.testing.assert_allclose(found["mu"], features.mean(axis=0), rtol=1e-5)
    expected = np.cov(features.astype(np.float64), rowvar=False)
    np.testing.assert_allclose(found["sigma"], expected, rtol=1e-5, atol=1e-9)
    said = compared_with(fid_stats=made).record
    assert (said["count"], said["img_size"], said["extractor"]) == (24, SIZE, "pixels")
    assert said["weights_sha256"] == Extractor("pixels", None, CPU).weights_sha256


def test_three_processes_write_the_statistics_of_one(images, made, tmp_path):
    output = tmp_path / "stats.npz"
    result = on_processes(3, "-m", "util.fid_stats", *flags(images, output))
    assert result.stdout.count("24 images of 16 px, 9 features") == 1
    one, three = (load_fid_statistics(path, FEATURES) for path in (made, output))
    for name in ("mu", "sigma"):
        np.testing.assert_allclose(three[name], one[name], rtol=1e-12, atol=1e-15)


def test_two_processes_write_sfid_s_statistics_of_one(array, inception, tmp_path):
    np.savez(tmp_path / "few.npz", np.load(array)["arr_0"][::4])
    changes = dict(feature_extractor=INCEPTION, inception_weights=inception)
    argv = flags(tmp_path / "few.npz", tmp_path / "two.npz", **changes)
    on_processes(2, "-m", "util.fid_stats", *argv)
    call(fid_stats.main, *argv, "--output", str(tmp_path / "one.npz"))
    one, two = (load_fid_statistics(tmp_path / name) for name in ("one.npz", "two.npz"))
    for name in ("mu", "sigma", "mu_s", "sigma_s"):
        np.testing.assert_allclose(two[name], one[name], rtol=1e-5, atol=1e-5)


# --- an npz file of images


@pytest.fixture(scope="module")
def array(images, tmp_path_factory) -> Path:
    """The images of the folder in one file, as ADM's evaluator takes them."""
    files = [path for path, _ in reference.open_images(images, SIZE).samples]
    crops = np.stack([np.array(center_crop(read_image(path), SIZE)) for path in files])
    path = tmp_path_factory.mktemp("array") / "batch.npz"
    np.savez(path, crops, np.zeros(len(crops)))
    return path


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_an_npz_file_of_images_is_measured_as_the_folder(images, array, made, tmp_path, save):
    path = tmp_path / "images.npz"
    save(path, np.load(array)["arr_0"])
    call(fid_stats.main, *flags(path, tmp_path / "stats.npz", img_size=None))  # the array's own
    found, expected = (load_fid_statistics(p, FEATURES) for p in (tmp_path / "stats.npz", made))
    for name in ("mu", "sigma"):
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-12, atol=1e-15)
    assert compared_with(fid_stats=tmp_path / "stats.npz").record["img_size"] == SIZE
    measure = Measure(Extractor("pixels", None, CPU))  # such a file is a reference, too
    sources = (reference.compare_with_images(measure, f, SIZE, tmp_path) for f in (images, path))
    first, second = sources
    assert torch.equal(first.features["mixed"], second.features["mixed"])
    np.testing.assert_array_equal(first.stats["sigma"], second.stats["sigma"])


def test_npz_files_without_images_are_refused_and_with_them_as_statistics(images, array, tmp_path):
    path = tmp_path / "batch.npz"
    for content, fragment in (
        ({"arr_0": np.zeros((2, 4, 4, 3), np.float32)}, "float32 (2, 4, 4, 3), not uint8"),
        ({"arr_0": np.array([{}])}, "arr_0 is object (1,), not uint8"),
        ({"images": np.zeros((2, 4, 4, 3), np.uint8)}, "arr_0"),
    ):
        np.savez(path, **content)
        line = complaint(call, fid_stats.main, *flags(path, tmp_path / "stats.npz"))
        assert line.startswith(f"--image_dir {path}") and fragment in line
    line = complaint(call, fid_stats.main, *flags(images, "stats.txt"))
    assert "--output stats.txt" in line
    assert f"{array}: no mu and sigma in it; of" in complaint(compared_with, fid_stats=array)
    np.savez(path, arr_0=np.zeros((1, 4, 4, 3), np.uint8))
    assert "two images" in complaint(call, fid_stats.main, *flags(path, tmp_path / "one.npz"))


def test_statistics_fit_the_extractor_and_the_size_they_were_made_with(made, tmp_path, capsys):
    assert compared_with(fid_stats=made).stats["mu"].shape == (FEATURES,)
    assert capsys.readouterr().out == ""
    line = complaint(compared_with, fid_stats=made, size=32)
    assert "is of images of 16 px, these are of 32 px" in line
    with np.load(made) as file:
        arrays = dict(file)
    np.savez(tmp_path / "other.npz", **arrays | {"weights_sha256": "0" * 64})
    assert "of two networks" in complaint(compared_with, fid_stats=tmp_path / "other.npz")
    np.savez(tmp_path / "few.npz", **arrays | {"count": 9})
    compared_with(fid_stats=tmp_path / "few.npz")
    assert "9 images are not more than the 9 features" in capsys.readouterr().out
    path = tmp_path / reference.ADM_STATISTICS.name  # of 256 pixels, which it does not say itself
    stats = {name: load_fid_statistics(made, FEATURES)[name] for name in ("mu", "sigma")}
    np.savez(path, **stats)
    for size, warned in ((64, True), (256, False)):
        reference.check_statistics(path, stats, {}, size)
        said = capsys.readouterr().out
        assert ("256 px images and these are of 64 px" in said) == warned
