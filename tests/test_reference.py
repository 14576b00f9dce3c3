"""References: files of statistics, read, refused and made; folders of real images."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import ROOT, run_script
from tests.measures import FEATURES, PIXELS
from tests.runs import SIZE, call, free_port
from util import fid_stats, metrics, reference
from util.data import center_crop, read_image
from util.errors import UserError
from util.extractor import Extractor
from util.reference import load_fid_statistics

CPU = torch.device("cpu")


def save_stats(path: Path, **arrays) -> Path:
    np.savez(path, **arrays)
    return path


def test_statistics_are_read(tmp_path):
    mu, sigma = np.arange(2048, dtype=np.float32), np.eye(2048, dtype=np.float32)
    found = load_fid_statistics(save_stats(tmp_path / "s.npz", mu=mu, sigma=sigma, n=3))
    assert set(found) == {"mu", "sigma"} and found["mu"].dtype == np.float64
    np.testing.assert_array_equal(found["mu"], mu)


@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_statistics_of_torch_fidelity_s_cache_are_read(tmp_path, kind):
    mu, sigma = np.arange(4).astype(kind), np.eye(4)
    torch.save({"mu": mu, "sigma": sigma}, tmp_path / "cached.pt")
    found = load_fid_statistics(tmp_path / "cached.pt", 4)
    np.testing.assert_array_equal(found["mu"], mu)
    np.testing.assert_array_equal(found["sigma"], sigma)


class Payload:
    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


def test_nothing_in_a_pt_file_is_run(tmp_path):
    marker = tmp_path / "marker"
    torch.save({"mu": Payload(marker), "sigma": np.eye(4)}, tmp_path / "evil.pt")
    with pytest.raises(UserError, match="--fid_stats .*evil.pt"):
        load_fid_statistics(tmp_path / "evil.pt", 4)
    assert not marker.exists()


def indefinite(size: int) -> np.ndarray:
    sigma = np.eye(size)
    sigma[0, 1] = sigma[1, 0] = 2
    return sigma


@pytest.mark.parametrize(
    ("make", "fragment"),
    [
        (lambda path: None, "no such file"),
        (lambda path: path.write_bytes(b"<html>"), "mu and sigma"),
        (lambda path: path.write_bytes(b"PK\x03\x04"), "mu and sigma"),
        (lambda path: path.write_bytes(b""), "mu and sigma"),
        (lambda path: save_stats(path, mu=np.zeros(4)), "mu and sigma"),
        (lambda path: save_stats(path, mu=np.array([{}]), sigma=np.eye(2)), "mu and sigma"),
        (lambda path: save_stats(path, mu=np.zeros(6), sigma=np.eye(6)), "4 features"),
        (lambda path: save_stats(path, mu=np.zeros(4), sigma=np.eye(4) * np.nan), "not finite"),
        (lambda path: save_stats(path, mu=np.zeros(4), sigma=np.tri(4)), "not symmetric"),
        (lambda path: save_stats(path, mu=np.zeros(4), sigma=indefinite(4)), "negative"),
    ],
)
def test_bad_statistics_are_refused_in_one_line(tmp_path, make, fragment):
    path = tmp_path / "stats.npz"
    make(path)
    with pytest.raises(UserError) as error:
        load_fid_statistics(path, 4)
    line = str(error.value)
    assert line.startswith(f"--fid_stats {path}: ") and fragment in line and "\n" not in line


def test_covariance_of_fewer_images_than_features_is_one():
    features = np.random.default_rng(0).normal(size=(5, 64)).astype(np.float32)
    sigma = np.cov(features, rowvar=False).astype(np.float32).astype(np.float64)
    assert reference._defect(features.mean(axis=0), sigma) is None


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


def flags(images: Path, output: Path) -> list[str]:
    settings = dict(image_dir=images, output=output, img_size=SIZE, batch_size=4, device="cpu")
    settings |= dict(num_workers=0, feature_extractor=PIXELS)
    return [str(part) for name, value in settings.items() for part in (f"--{name}", value)]


@pytest.fixture(scope="module")
def made(images, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("made") / "new" / "stats.npz"
    call(fid_stats.main, *flags(images, output))
    return output


def test_file_holds_mean_and_covariance_of_the_cropped_images(images, made):
    crops = [center_crop(read_image(path), SIZE) for path in images.rglob("*.png")]
    pixels = torch.stack([torch.from_numpy(np.array(crop)).permute(2, 0, 1) for crop in crops])
    features = Extractor("pixels", None, CPU)(pixels)["mixed"].numpy()
    found = load_fid_statistics(made, FEATURES)
    np.testing.assert_allclose(found["mu"], features.mean(axis=0), rtol=1e-5)
    expected = np.cov(features.astype(np.float64), rowvar=False)
    np.testing.assert_allclose(found["sigma"], expected, rtol=1e-5, atol=1e-9)
    told = reference.statistics_record(made)
    assert (told["count"], told["img_size"], told["extractor"]) == (23, SIZE, "pixels")
    assert told["weights_sha256"] == Extractor("pixels", None, CPU).weights_sha256


def test_three_processes_write_the_statistics_of_one(images, made, tmp_path):
    launch = ("torchrun", "--nproc_per_node=3", f"--master_port={free_port()}", "-m")
    output = tmp_path / "stats.npz"
    result = run_script(*launch, "util.fid_stats", *flags(images, output), cwd=ROOT)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("23 images of 16 px, 9 features") == 1
    one, three = (load_fid_statistics(path, FEATURES) for path in (made, output))
    for name in one:
        np.testing.assert_allclose(three[name], one[name], rtol=1e-12, atol=1e-15)


def prepare(path: Path, **changes):
    return metrics.prepare(
        str(path), None, CPU, **{"feature_extractor": PIXELS, "size": SIZE} | changes
    )


def test_statistics_fit_the_extractor_and_the_size_they_were_made_with(made, tmp_path, capsys):
    assert prepare(made).stats["mu"].shape == (FEATURES,)
    assert capsys.readouterr().out == ""
    with pytest.raises(UserError, match="is of images of 16 px, these are of 32 px"):
        prepare(made, size=32)
    with np.load(made) as file:
        arrays = dict(file)
    changed = save_stats(tmp_path / "other.npz", **arrays | {"weights_sha256": "0" * 64})
    with pytest.raises(UserError, match="features of two networks"):
        prepare(changed)
    few = save_stats(tmp_path / "few.npz", **arrays | {"count": 9})
    prepare(few)
    assert "9 images, not more than the 9 features" in capsys.readouterr().out


def test_adm_s_statistics_are_of_256_pixels():
    """They do not say so themselves."""
    path = Path("anywhere") / reference.ADM_STATISTICS.name
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "statistics_record", lambda path: {})
        patch.setattr(reference, "sha256", lambda path: "")
        _, other = reference.check_statistics(path, {}, 64, 2048)
        _, same = reference.check_statistics(path, {}, 256, 2048)
    assert "256 px images and these are of 64 px" in other[0] and same == []


@pytest.mark.parametrize(
    ("changes", "fragment"),
    [
        ({"--image_dir": "/nowhere"}, "--image_dir /nowhere"),
        ({"--output": "stats.txt"}, "--output stats.txt"),
        ({"--feature_extractor": "nothing"}, "--feature_extractor nothing"),
        ({"--img_size": "0"}, "--img_size"),
    ],
)
def test_command_refuses_in_one_line(images, tmp_path, changes, fragment):
    argv = flags(images, tmp_path / "stats.npz")
    for name, value in changes.items():
        argv[argv.index(name) + 1] = value
    with pytest.raises((UserError, SystemExit)) as error:
        call(fid_stats.main, *argv)
    assert isinstance(error.value, SystemExit) or fragment in str(error.value)
    assert not (tmp_path / "stats.npz").exists()
