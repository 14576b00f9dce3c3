"""The figures are torch-fidelity's own, and what cannot be measured is said in one line."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch_fidelity
from PIL import Image
from scipy.linalg import sqrtm

from tests.measures import FEATURES, PIXELS, Pixels, save_model, save_random_inception
from tests.runs import evaluate, make_inputs
from util.data.images import Loading
from util.errors import UserError
from util.evaluation import extractor, jackknife, metrics
from util.evaluation.extractor import WEIGHTS_FILE, Extractor, published_weights
from util.evaluation.features import FeatureStore, batch_ranges, folder_batches
from util.evaluation.metrics import Measure
from util.evaluation.reference import Reference

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    return save_random_inception(tmp_path_factory.mktemp("weights") / "inception.pth")


@pytest.fixture(autouse=True)
def no_network(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")


def save_noise(folder: Path, count: int, seed: int, side: int = 16) -> Path:
    """A folder of PNG files, each of its own brightness."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    for i in range(count):
        pixels = rng.integers(0, rng.integers(40, 256), (side, side, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:05d}.png")
    return folder


def fidelity(first: Path, second: Path, **settings) -> dict[str, float]:
    """torch-fidelity's own figures of two folders."""
    return torch_fidelity.calculate_metrics(
        **dict(input1=str(first), input2=str(second), cuda=False, cache=False, verbose=False),
        **dict(isc=True, fid=True, kid=True, prc=True, save_cpu_ram=True),
        **settings,
    )


def test_inception_figures_of_an_evaluation_are_those_of_its_png_files(weights, tmp_path, capsys):
    inputs = make_inputs(tmp_path / "inputs")
    reference = save_noise(tmp_path / "reference", 11, seed=1)
    settings = dict(inception_weights=weights, fid_reference=reference, keep_images=True)
    evaluate(inputs, tmp_path / "eval", save_model(tmp_path / "model"), **settings)
    (folder,) = (tmp_path / "eval").glob("ariter*")
    found = json.loads((folder / "metrics.json").read_text())
    expected = fidelity(
        folder / "images",
        reference,
        feature_extractor="inception-v3-compat",
        feature_extractor_weights_path=str(weights),
        kid_subset_size=11,
    )
    expected["fid"] = expected.pop("frechet_inception_distance")
    assert expected["fid"] > 1 and expected["inception_score_mean"] > 1.001
    assert found["metrics"] == pytest.approx(expected, rel=1e-4)
    assert found["metric_settings"] == {"kid_subset_size": 11}
    told = capsys.readouterr()
    assert f"FID-12: {found['metrics']['fid']:.4f}" in told.out
    assert "12 images are not more than the 2048 features: the covariance is singular" in told.err
    assert found["files"]["extractor"]["sha256"] == found["measured"]["weights_sha256"]


# --- the arithmetic, with an extractor of nine features


def pixels_measure(reference: Reference | None = None) -> Measure:
    return Measure(Extractor("pixels", None, CPU), reference or Reference(None, {}))


def images_of(folder: Path) -> torch.Tensor:
    files = sorted(folder.iterdir())
    ((_, ids, images),) = folder_batches(files, 16, batch_ranges(len(files), 1000), [0])
    assert ids == list(range(len(files)))
    return images


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("folders")
    return save_noise(root / "first", 43, seed=0), save_noise(root / "second", 37, seed=1)


def test_figures_equal_torch_fidelity_s_whichever_batch_came_first(folders, tmp_path):
    first, second = folders
    measure = metrics.compare_with_folder(pixels_measure(), second, 16, tmp_path)
    images, batches = images_of(first), batch_ranges(43, 5)
    store = FeatureStore(tmp_path)
    for number in torch.randperm(len(batches)).tolist():
        ids = list(batches[number])
        store.write(number, ids, measure.extractor(images[ids]))
    found = metrics.score(store.load(batches), measure).figures
    expected = fidelity(first, second, feature_extractor="pixels", kid_subset_size=37)
    for theirs, (_, ours) in metrics.NAMES.items():
        assert found.pop(ours) == pytest.approx(expected.pop(theirs), rel=1e-5), ours
    error = found.pop("frechet_distance_standard_error")
    assert 0 < error < 10
    assert found == pytest.approx(expected, rel=1e-6)
    assert 0.1 < found["precision"] <= 1


def definition(x: np.ndarray, y: np.ndarray) -> float:
    """|mu_x - mu_y|^2 + tr(S_x + S_y - 2 (S_x S_y)^1/2), of features [N, D]."""
    a, b = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    difference = x.mean(axis=0) - y.mean(axis=0)
    return difference @ difference + np.trace(a + b - 2 * sqrtm(a @ b)).real


def features_of(folder: Path) -> np.ndarray:
    return pixels_measure().extractor(images_of(folder))["mixed"].double().numpy()


def test_distances_are_frechets(folders):
    x, y = map(features_of, folders)
    stats = {"mu": y.mean(axis=0), "sigma": np.cov(y, rowvar=False)}
    measure = pixels_measure(Reference(stats, {}))
    found = metrics.score(measure.extractor(images_of(folders[0])), measure).figures
    assert found["frechet_distance"] == pytest.approx(definition(x, y), rel=1e-4)
    own, other = (metrics.statistics(torch.from_numpy(features)) for features in (x, y))
    assert metrics.frechet(own, other) == pytest.approx(definition(x, y), rel=1e-4)


def test_replicates_are_the_figures_without_a_group_and_of_each_split(folders):
    x, y = map(features_of, folders)
    stats = {"mu": y.mean(axis=0), "sigma": np.cov(y, rowvar=False)}
    found = jackknife.fid_replicates(torch.from_numpy(x), stats)
    kept = [np.arange(43) % 10 != group for group in range(10)]
    assert found == pytest.approx([definition(x[rows], y) for rows in kept], rel=1e-6)
    assert jackknife.fid_replicates(torch.from_numpy(x[:10]), stats) is None  # 9 features

    logits = torch.from_numpy(x)
    whole = torch_fidelity.metric_isc.isc_features_to_metric(logits)
    splits = jackknife.is_replicates(logits)
    assert np.mean(splits) == pytest.approx(whole["inception_score_mean"], rel=1e-9)
    assert np.std(splits) == pytest.approx(whole["inception_score_std"], rel=1e-6)


def test_jackknife_error_of_a_mean_is_the_known_one():
    """Of the mean of N numbers it is s / sqrt(N), where every group is one number."""
    values = np.random.default_rng(0).normal(size=10)
    replicates = [np.delete(values, i).mean() for i in range(10)]
    expected = values.std(ddof=1) / np.sqrt(10)
    assert jackknife.fid_error(replicates) == pytest.approx(expected)
    assert jackknife.is_error(list(values)) == pytest.approx(expected)


# --- what the numbers would mean


def warnings_of(count: int, measure: Measure) -> list[str]:
    images = torch.randint(0, 256, (count, 3, 16, 16), dtype=torch.uint8)
    return metrics.score(measure.extractor(images), measure).warnings


def test_too_few_images_are_warned_about():
    stats = {"mu": np.zeros(FEATURES), "sigma": np.eye(FEATURES)}
    measure = pixels_measure(Reference(stats, {}))
    few, enough = warnings_of(FEATURES, measure), warnings_of(FEATURES + 1, measure)
    assert any("9 images are not more than the 9 features" in w and "singular" in w for w in few)
    assert any("IS is not computed: 9 images" in w for w in few) and enough == []
    assert "FID-5000" in metrics._few_images(5000, 2048, inception=True)[0]
    assert metrics._few_images(50000, 2048, inception=True) == []
    assert any("a covariance takes two images" in w for w in warnings_of(1, measure))


def test_reference_counts_the_images_that_could_be_read(folders, tmp_path):
    folder = shutil.copytree(folders[1], tmp_path / "images")
    for path in list(folder.iterdir())[:3]:
        path.write_bytes(b"broken")
    found = metrics.compare_with_folder(
        pixels_measure(), folder, 16, tmp_path / "cache", Loading(skip_bad=True)
    )
    assert found.reference.record["images"] == 34


def test_reference_of_one_image_is_refused(tmp_path):
    single = save_noise(tmp_path / "single", 1, seed=0)
    with pytest.raises(UserError, match="--fid_reference .*two images"):
        metrics.compare_with_folder(pixels_measure(), single, 16, tmp_path / "cache")


def test_extractor_without_a_layer_for_fid_still_has_its_score(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(
        Pixels, "get_default_feature_layer_for_metric", staticmethod({"isc": "logits"}.__getitem__)
    )
    measure = metrics.compare_with_folder(pixels_measure(), folders[1], 16, tmp_path)
    found = metrics.score(measure.extractor(images_of(folders[0])), measure).figures
    assert list(found) == ["score_mean", "score_std"]
    np.savez(tmp_path / "stats.npz", mu=np.zeros(FEATURES), sigma=np.eye(FEATURES))
    with pytest.raises(UserError, match="--fid_stats .*no layer for a Frechet distance"):
        metrics.prepare(str(tmp_path / "stats.npz"), None, CPU, feature_extractor=PIXELS)


def test_small_references_are_warned_about(folders, tmp_path, capsys):
    small = save_noise(tmp_path / "small", 9, seed=3, side=12)
    metrics.compare_with_folder(pixels_measure(), small, 16, tmp_path / "cache")
    told = capsys.readouterr().out
    assert "9 of 9 images looked at are smaller than 16 px" in told
    assert "9 images are not more than the 9 features" in told
    metrics.compare_with_folder(pixels_measure(), folders[1], 16, tmp_path / "cache")
    assert "warning" not in capsys.readouterr().out


def test_reference_features_are_made_once_for_the_same_images(folders, tmp_path, monkeypatch):
    folder = shutil.copytree(folders[1], tmp_path / "images")
    first = metrics.compare_with_folder(pixels_measure(), folder, 16, tmp_path / "cache")
    seen = []
    measure = pixels_measure()
    monkeypatch.setattr(measure.extractor.network, "forward", seen.append)
    again = metrics.compare_with_folder(measure, folder, 16, tmp_path / "cache")
    assert torch.equal(again.reference.features["mixed"], first.reference.features["mixed"])
    assert not seen
    (folder / "00003.png").unlink()
    other = metrics.compare_with_folder(pixels_measure(), folder, 16, tmp_path / "cache")
    assert len(other.reference.features["mixed"]) == 36
    assert other.identity() != first.identity()


# --- what is missing


def test_missing_weights_and_statistics_are_said_in_one_line_each(weights, capsys, monkeypatch):
    monkeypatch.chdir(weights.parent)  # where there is no fid_stats/
    assert metrics.prepare(None, None, CPU) is None
    captured = capsys.readouterr()
    told = [line for line in captured.out.splitlines() if "not computed" in line]
    assert len(told) == 1 and WEIGHTS_FILE in told[0] and "--inception_weights" in told[0]
    assert len(captured.err.splitlines()) == 1
    measure = metrics.prepare(None, str(weights), CPU)
    told = capsys.readouterr().out.splitlines()
    assert len(told) == 1 and "--fid_stats" in told[0] and measure.stats is None


def test_metrics_may_be_unwanted(capsys):
    assert metrics.prepare("/nowhere", "/nowhere", CPU, wanted=False) is None
    assert capsys.readouterr().out == ""


def test_weights_downloaded_earlier_are_found_and_checked(weights):
    place = published_weights()
    place.parent.mkdir(parents=True)
    shutil.copy(weights, place)
    assert extractor.find_inception_weights(None) == place
    place.write_bytes(place.read_bytes()[:1000])
    with pytest.raises(UserError, match="--inception_weights .*damaged"):
        extractor.find_inception_weights(None)


def test_weights_of_another_network_are_refused(tmp_path):
    torch.save({"conv.weight": torch.ones(1)}, tmp_path / "other.pth")
    with pytest.raises(UserError) as error:
        metrics.prepare(None, str(tmp_path / "other.pth"), CPU)
    assert "other.pth" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "fragment"),
    [
        ("nothing", "'nothing'"),
        ("no.such.module:pixels", "cannot import 'no.such.module'"),
        ("tests.measures:nothing", "'nothing'"),
        ("..measures:pixels", "'..measures' is relative"),
    ],
)
def test_unknown_extractors_are_refused_in_one_line(name, fragment):
    with pytest.raises(UserError) as error:
        metrics.prepare(None, None, CPU, feature_extractor=name)
    line = str(error.value)
    assert line.startswith(f"--feature_extractor {name}") and fragment in line and "\n" not in line


def test_extractor_is_named_by_its_module_and_digested_by_its_tensors():
    measure = metrics.prepare(None, None, CPU, feature_extractor=PIXELS, folder_follows=True)
    assert measure.extractor.name == "pixels"
    assert measure.extractor.layers == dict(isc="logits", fid="mixed", kid="mixed", prc="mixed")
    before = measure.extractor.weights_sha256
    measure.extractor.network.mixed[0, 0] += 1
    assert extractor.digest(measure.extractor.network) != before


def test_deviation_of_kid_is_left_out_where_every_subset_is_the_whole(folders, tmp_path):
    measure = metrics.compare_with_folder(pixels_measure(), folders[1], 16, tmp_path)
    features = {name: rows + 0.1 for name, rows in measure.reference.features.items()}
    found = metrics.score(features, measure)
    assert "kernel_distance_mean" in found.figures and "kernel_distance_std" not in found.figures
