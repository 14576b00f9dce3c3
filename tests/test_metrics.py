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

from tests.measures import FEATURES, PIXELS, Pixels, prepare, save_model, save_random_inception
from tests.runs import evaluate, make_inputs
from util.data.images import Loading
from util.errors import UserError
from util.evaluation import extractor, metrics
from util.evaluation.evaluator import Evaluator
from util.evaluation.extractor import INCEPTION, WEIGHTS_FILE, Extractor, published_weights
from util.evaluation.folder import FeatureFiles, batch_ranges
from util.evaluation.metrics import Measure, Moments, Scores
from util.evaluation.reference import compare_with_images, image_batches

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    return save_random_inception(tmp_path_factory.mktemp("weights") / "inception.pth")


def save_noise(folder: Path, count: int, seed: int) -> Path:
    """A folder of PNG files, each of its own brightness."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    for i in range(count):
        pixels = rng.integers(0, rng.integers(40, 256), (16, 16, 3), np.uint8)
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
    own = dict(feature_extractor=INCEPTION, feature_extractor_weights_path=str(weights))
    expected = fidelity(folder / "images", reference, kid_subset_size=11, **own)
    expected["fid"] = expected.pop("frechet_inception_distance")
    assert expected["fid"] > 1 and expected["inception_score_mean"] > 1.001
    assert found["metrics"] == pytest.approx(expected, rel=1e-4)
    assert found["metric_settings"] == {"kid_subset_size": 11}
    printed = capsys.readouterr()
    assert f"FID-12: {found['metrics']['fid']:.4f}" in printed.out
    assert "12 images are not more than the 2048 features" in printed.err
    assert found["files"]["extractor"]["sha256"] == found["measured"]["weights_sha256"]


# --- the arithmetic, with an extractor of nine features


def pixels_measure(stats: dict | None = None) -> Measure:
    return Measure(Extractor("pixels", None, CPU), stats)


def images_of(folder: Path) -> torch.Tensor:
    files = sorted(map(str, folder.iterdir()))
    ((_, ids, images),) = image_batches(files, 16, batch_ranges(len(files), 1000), [0])
    assert ids == list(range(len(files)))
    return images


def scores_of(images: torch.Tensor, measure: Measure) -> Scores:
    evaluator = Evaluator(None, None, CPU, measure=measure)
    for part in images.split(7):
        evaluator.update(part)
    return evaluator.result()


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("folders")
    return save_noise(root / "first", 43, seed=0), save_noise(root / "second", 37, seed=1)


def test_figures_equal_torch_fidelity_s_whichever_batch_came_first(folders, tmp_path, monkeypatch):
    monkeypatch.setattr("util.evaluation.folder.CHUNK", 8)
    first, second = folders
    measure = compare_with_images(pixels_measure(), second, 16, tmp_path)
    images, batches = images_of(first), batch_ranges(43, 5)
    evaluator = Evaluator(None, None, CPU, measure=measure)
    evaluator.begin(FeatureFiles(tmp_path / "own", batches))
    for number in torch.randperm(len(batches)).tolist():
        evaluator.update(images[list(batches[number])], number, batches[number])
    found = evaluator.result().figures
    assert found == pytest.approx(scores_of(images, measure).figures, rel=1e-5)  # from memory
    expected = fidelity(first, second, feature_extractor="pixels", kid_subset_size=37)
    error = found.pop("frechet_distance_standard_error")
    assert 0 < error < 10
    expected = {name.replace("inception_", ""): value for name, value in expected.items()}
    assert found == pytest.approx(expected, rel=1e-5)
    assert 0.1 < found["precision"] <= 1


def test_features_are_kept_of_so_many_images_at_most(folders, tmp_path, monkeypatch):
    """Moments are of all; KID, precision and recall of the first of every three."""
    monkeypatch.setattr(metrics, "MOST_KEPT", 15)
    found = compare_with_images(pixels_measure(), folders[1], 16, tmp_path)
    features = pixels_measure().extractor(images_of(folders[1]))["mixed"]
    assert torch.equal(found.features["mixed"], features[::3]) and found.record["images"] == 37
    np.testing.assert_allclose(found.stats["sigma"], np.cov(features.T.numpy()), rtol=1e-6)


def definition(x: np.ndarray, y: np.ndarray) -> float:
    """|mu_x - mu_y|^2 + tr(S_x + S_y - 2 (S_x S_y)^1/2), of features [N, D]."""
    a, b = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    difference = x.mean(axis=0) - y.mean(axis=0)
    return difference @ difference + np.trace(a + b - 2 * sqrtm(a @ b)).real


def test_distance_and_its_replicates_are_frechets(folders):
    x, y = (pixels_measure().extractor(images_of(f))["mixed"].double().numpy() for f in folders)
    stats = {"mu": y.mean(axis=0), "sigma": np.cov(y, rowvar=False)}
    scores = scores_of(images_of(folders[0]), pixels_measure(stats))
    assert scores.figures["frechet_distance"] == pytest.approx(definition(x, y), rel=1e-6)
    kept = [np.arange(43) % 10 != group for group in range(10)]
    assert scores.replicates["fid"] == pytest.approx([definition(x[k], y) for k in kept], rel=1e-6)
    few = scores_of(images_of(folders[0])[:10], pixels_measure(stats))
    assert "fid" not in few.replicates  # 9 features
    parts = scores.replicates["inception_score"]
    assert np.mean(parts) == scores.figures["score_mean"] and len(parts) == 10


# --- what the numbers would mean


def test_too_few_images_are_warned_about():
    stats = {"mu": np.zeros(FEATURES), "sigma": np.eye(FEATURES)}
    measure = pixels_measure(stats)

    def warnings_of(count: int) -> str:
        images = torch.randint(0, 256, (count, 3, 16, 16), dtype=torch.uint8)
        return " ".join(scores_of(images, measure).warnings)

    few = warnings_of(FEATURES)
    assert "9 images are not more than the 9 features" in few and "singular" in few
    assert "IS is not computed: 9 images" in few and warnings_of(FEATURES + 1) == ""
    assert "a covariance takes two images" in warnings_of(1)
    moments, scores = Moments(), Scores()
    moments.update(torch.randn(20, 2))
    metrics._frechet_distance(moments, moments.statistics(), True, scores)
    assert "this is FID-20" in scores.warnings[0] and scores.figures["fid"] < 1e-6


def test_extractor_without_a_layer_for_fid_still_has_its_score(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(
        Pixels, "get_default_feature_layer_for_metric", staticmethod({"isc": "logits"}.__getitem__)
    )
    measure = compare_with_images(pixels_measure(), folders[1], 16, tmp_path)
    found = scores_of(images_of(folders[0]), measure).figures
    assert list(found) == ["score_mean", "score_std"]
    np.savez(tmp_path / "stats.npz", mu=np.zeros(FEATURES), sigma=np.eye(FEATURES))
    with pytest.raises(UserError, match="--fid_stats .*no layer for a Frechet distance"):
        prepare(fid_stats=str(tmp_path / "stats.npz"), feature_extractor=PIXELS)


def test_reference_features_are_made_once_for_the_same_images(
    folders, tmp_path, monkeypatch, capsys
):
    folder = shutil.copytree(folders[1], tmp_path / "images")
    loading, cache = Loading(skip_bad=True), tmp_path / "cache"
    first = compare_with_images(pixels_measure(), folder, 16, cache)
    measure = pixels_measure()
    with monkeypatch.context() as patch:
        patch.setattr(measure.extractor.network, "forward", lambda _: pytest.fail("made again"))
        again = compare_with_images(measure, folder, 16, cache)
    assert torch.equal(again.features["mixed"], first.features["mixed"])
    assert "warning" not in capsys.readouterr().out
    figures = scores_of(images_of(folder).flip(3), first).figures  # every subset is the whole
    assert "kernel_distance_mean" in figures and "kernel_distance_std" not in figures
    for path in list(folder.iterdir())[:28]:
        path.write_bytes(b"broken")
    other = compare_with_images(pixels_measure(), folder, 16, cache, loading)
    assert len(other.features["mixed"]) == other.record["images"] == 9
    assert other.identity() != first.identity()
    assert "9 images are not more than the 9 features" in capsys.readouterr().out


# --- what is missing


def test_missing_weights_and_statistics_are_said_in_one_line_each(weights, capsys, monkeypatch):
    monkeypatch.chdir(weights.parent)  # where there is no fid_stats/
    assert prepare() is None
    captured = capsys.readouterr()
    lines = [line for line in captured.out.splitlines() if "not computed" in line]
    assert len(lines) == 1 and WEIGHTS_FILE in lines[0] and "--inception_weights" in lines[0]
    assert len(captured.err.splitlines()) == 1
    measure = prepare(inception_weights=str(weights))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 and "--fid_stats" in lines[0] and measure.stats is None
    assert prepare(no_metrics=True, fid_stats="/nowhere") is None
    assert capsys.readouterr().out == ""


def test_weights_are_found_and_checked(weights, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    place = published_weights()
    place.parent.mkdir(parents=True)
    shutil.copy(weights, place)
    assert extractor.find_inception_weights(None) == place  # as downloaded earlier
    place.write_bytes(place.read_bytes()[:1000])
    with pytest.raises(UserError, match="--inception_weights .*damaged"):
        prepare()
    torch.save({"conv.weight": torch.ones(1)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"^[^\n]*other.pth[^\n]*$"):
        prepare(inception_weights=str(tmp_path / "other.pth"))


def test_unknown_extractors_are_refused_in_one_line():
    for name, fragment in (
        ("nothing", "'nothing'"),
        ("no.such.module:pixels", "cannot import 'no.such.module'"),
        ("..measures:pixels", "cannot import '..measures'"),
    ):
        with pytest.raises(UserError, match=rf"^--feature_extractor {name}[^\n]*{fragment}[^\n]*$"):
            prepare(feature_extractor=name)
