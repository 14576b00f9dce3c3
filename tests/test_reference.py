"""References: files of statistics, read, refused and made; folders of real images."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import complaint
from tests.measures import FEATURES, PIXELS, prepare
from tests.runs import SIZE, call, on_processes
from util import fid_stats
from util.data.images import center_crop, read_image
from util.errors import UserError
from util.evaluation import reference
from util.evaluation.extractor import Extractor
from util.evaluation.metrics import Measure
from util.evaluation.reference import load_fid_statistics

CPU = torch.device("cpu")


class Payload:
    def __reduce__(self):
        return exec, ("raise SystemExit",)


def test_nothing_in_a_pt_file_is_run(tmp_path):
    torch.save({"mu": np.arange(4.0), "sigma": np.eye(4)}, tmp_path / "cached.pt")
    found = load_fid_statistics(tmp_path / "cached.pt", 4)  # of torch-fidelity's cache
    np.testing.assert_array_equal(found["mu"], np.arange(4))
    torch.save({"mu": Payload(), "sigma": np.eye(4)}, tmp_path / "evil.pt")
    with pytest.raises(UserError, match="--fid_stats .*evil.pt"):
        load_fid_statistics(tmp_path / "evil.pt", 4)


def test_bad_statistics_are_refused_in_one_line(tmp_path):
    for arrays, fragment in (
        (None, "no such file"),
        (dict(mu=np.zeros(4)), "mu and sigma"),
        (dict(mu=np.array([{}]), sigma=np.eye(2)), "mu and sigma"),
        (dict(mu=np.zeros(6), sigma=np.eye(6)), "4 features"),
        (dict(mu=np.zeros(4), sigma=np.eye(4) * np.nan), "not finite"),
        (dict(mu=np.zeros(4), sigma=np.tri(4)), "not symmetric"),
        (dict(mu=np.zeros(4), sigma=np.ones((4, 4)) - 2 * np.eye(4)), "negative"),
    ):
        path = tmp_path / "stats.npz"
        if arrays:
            np.savez(path, **arrays)
        line = complaint(load_fid_statistics, path, 4)
        assert line.startswith(f"--fid_stats {path}: ") and fragment in line


# --- made from a folder


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """23 images of various sizes in two class folders, and a file that is none."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for i in range(23):
        shape = (SIZE + i % 5, SIZE + i % 3, 3)
        pixels = rng.integers(0, rng.integers(40, 256), shape, np.uint8)
        (folder / "ab"[i % 2]).mkdir(exist_ok=True)
        Image.fromarray(pixels).save(folder / "ab"[i % 2] / f"{i}.png")
    (folder / "readme.txt").write_text("no image")
    return folder


def prepared(path: Path) -> Measure:
    return prepare(fid_stats=str(path), feature_extractor=PIXELS)


def flags(images: Path, output: str | Path) -> list[str]:
    settings = dict(image_dir=images, output=output, img_size=SIZE, batch_size=4, device="cpu")
    settings |= dict(num_workers=0, feature_extractor=PIXELS)
    return [str(part) for name, value in settings.items() for part in (f"--{name}", value)]


@pytest.fixture(scope="module")
def made(images, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("made") / "new" / "stats.npz"
    call(fid_stats.main, *flags(images, output))
    return output


def test_file_holds_mean_and_covariance_of_the_cropped_images_on_three_processes_too(
    array, made, images, tmp_path
):
    pixels = torch.from_numpy(np.load(array)["arr_0"]).permute(0, 3, 1, 2)
    features = Extractor("pixels", None, CPU)(pixels)["mixed"].numpy()
    found = load_fid_statistics(made, FEATURES)
    np.testing.assert_allclose(found["mu"], features.mean(axis=0), rtol=1e-5)
    expected = np.cov(features.astype(np.float64), rowvar=False)
    np.testing.assert_allclose(found["sigma"], expected, rtol=1e-5, atol=1e-9)
    said = prepared(made).record
    assert (said["count"], said["img_size"], said["extractor"]) == (23, SIZE, "pixels")
    assert said["weights_sha256"] == Extractor("pixels", None, CPU).weights_sha256

    output = tmp_path / "stats.npz"
    result = on_processes(3, "-m", "util.fid_stats", *flags(images, output))
    assert result.stdout.count("23 images of 16 px, 9 features") == 1
    one, three = (load_fid_statistics(path, FEATURES) for path in (made, output))
    for name in ("mu", "sigma"):
        np.testing.assert_allclose(three[name], one[name], rtol=1e-12, atol=1e-15)


# --- an npz file of images


@pytest.fixture(scope="module")
def array(images, tmp_path_factory) -> Path:
    """The images of the folder in one file, as ADM's evaluator takes them."""
    files = reference.open_images(images)
    crops = np.stack([np.array(center_crop(read_image(path), SIZE)) for path in files])
    path = tmp_path_factory.mktemp("array") / "batch.npz"
    np.savez(path, crops, np.zeros(len(crops)))
    return path


@pytest.mark.parametrize("form", ["compressed", "channels first"])
def test_statistics_of_an_npz_file_of_images_are_those_of_the_folder(array, made, tmp_path, form):
    pixels, path = np.load(array)["arr_0"], tmp_path / "images.npz"
    if form == "compressed":
        np.savez_compressed(path, pixels)
    else:
        np.savez(path, pixels.transpose(0, 3, 1, 2).copy())
    argv = flags(path, tmp_path / "stats.npz")
    del argv[argv.index("--img_size") : argv.index("--img_size") + 2]  # the array's own
    call(fid_stats.main, *argv)
    found, expected = (load_fid_statistics(p, FEATURES) for p in (tmp_path / "stats.npz", made))
    for name in ("mu", "sigma"):
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-12, atol=1e-15)
    assert prepared(tmp_path / "stats.npz").record["img_size"] == SIZE


def test_an_npz_file_of_images_is_a_reference_and_as_statistics_told_so(array, images, tmp_path):
    assert complaint(prepared, array) == (
        f"--fid_stats {array}: not an npz file with mu and sigma, but of 23 images; compare with "
        "them by --fid_reference, or make statistics with python -m util.fid_stats "
        f"--image_dir {array}"
    )
    measure = Measure(Extractor("pixels", None, CPU))
    first, second = (
        reference.compare_with_images(measure, source, SIZE, tmp_path) for source in (images, array)
    )
    assert torch.equal(first.features["mixed"], second.features["mixed"])
    np.testing.assert_array_equal(first.stats["sigma"], second.stats["sigma"])


def test_npz_files_that_hold_no_images_and_an_output_that_is_none_are_refused(tmp_path, images):
    for content, fragment in (
        ({"arr_0": np.zeros((2, 4, 4, 3), np.float32)}, "float32 (2, 4, 4, 3), not uint8"),
        ({"arr_0": np.array([{}])}, "never unpickled"),
        ({"images": np.zeros((2, 4, 4, 3), np.uint8)}, "arr_0"),
    ):
        path = tmp_path / "batch.npz"
        np.savez(path, **content)
        line = complaint(call, fid_stats.main, *flags(path, tmp_path / "stats.npz"))
        assert line.startswith(f"--image_dir {path}") and fragment in line
    with pytest.raises(UserError, match="--output stats.txt"):
        call(fid_stats.main, *flags(images, "stats.txt"))


def test_statistics_fit_the_extractor_and_the_size_they_were_made_with(made, tmp_path, capsys):
    assert prepared(made).stats["mu"].shape == (FEATURES,)
    assert capsys.readouterr().out == ""
    with np.load(made) as file:
        arrays = dict(file)
    np.savez(tmp_path / "large.npz", **arrays | {"img_size": 32})
    with pytest.raises(UserError, match="is of images of 32 px, these are of 16 px"):
        prepared(tmp_path / "large.npz")
    np.savez(tmp_path / "other.npz", **arrays | {"weights_sha256": "0" * 64})
    with pytest.raises(UserError, match="features of two networks"):
        prepared(tmp_path / "other.npz")
    np.savez(tmp_path / "few.npz", **arrays | {"count": 9})
    prepared(tmp_path / "few.npz")
    assert "9 images are not more than the 9 features" in capsys.readouterr().out


def test_adm_s_statistics_are_of_256_pixels(made, tmp_path):
    """They do not say so themselves."""
    path = tmp_path / reference.ADM_STATISTICS.name
    stats = {name: load_fid_statistics(made, FEATURES)[name] for name in ("mu", "sigma")}
    np.savez(path, **stats)
    _, other = reference.check_statistics(path, stats, {}, 64)
    _, same = reference.check_statistics(path, stats, {}, 256)
    assert "256 px images and these are of 64 px" in other[0] and same == []
