"""The figures are torch-fidelity's or by definition; what is not measured is said in one line."""

import json
import shutil
from itertools import product
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch_fidelity
from PIL import Image
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from tests.conftest import complaint
from tests.measures import FEATURES, PIXELS, Pixels, prepare
from tests.runs import evaluate
from util.evaluation import metrics
from util.evaluation.extractor import INCEPTION, WEIGHTS_FILE, Extractor, published_weights
from util.evaluation.folder import FeatureFiles, batch_ranges
from util.evaluation.metrics import Measure, Moments, Scores, score
from util.evaluation.reference import compare_with_images
from util.files import sha256

CPU = torch.device("cpu")


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


def inception_features(weights: Path, images: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """[N, 2048], and [N, 2023]: 17 x 17 x 7 of what is mixed_6/conv in the TensorFlow graph."""
    network = FeatureExtractorInceptionV3(INCEPTION, ["2048"], str(weights))
    seen = []
    network.Mixed_6d.branch1x1.register_forward_hook(lambda *call: seen.append(call[2].clone()))
    (pooled,) = network(images)
    (branch,) = seen  # after batch norm and ReLU
    places = product(range(17), range(17), range(7))
    spatial = torch.stack([branch[:, c, y, x] for y, x, c in places], dim=1)
    return pooled.numpy(), spatial.double().numpy()


def definition(x: np.ndarray, y: np.ndarray) -> float:
    """|mu_x - mu_y|^2 + tr(S_x + S_y - 2 (S_x S_y)^1/2), of features [N, D].

    The trace of the root is the sum of the singular values of a product of [N_x, N_y].
    """
    a, b = ((z - z.mean(axis=0)) / np.sqrt(len(z) - 1) for z in (x, y))
    root = np.linalg.svd(a @ b.T, compute_uv=False).sum()
    return ((x.mean(axis=0) - y.mean(axis=0)) ** 2).sum() + (a**2).sum() + (b**2).sum() - 2 * root


def cheap_distance(own: dict, other: dict) -> float:
    """In the place of Frechet's, which takes seconds of 2,048 features."""
    return sum(np.abs(own[name] - other[name]).sum().item() for name in ("mu", "sigma"))


@pytest.fixture(scope="module")
def evaluated(inception, inputs, tmp_path_factory) -> tuple[Path, Path, dict]:
    """The folder, the real images and the flags of an evaluation in Inception's features."""
    root = tmp_path_factory.mktemp("evaluated")
    reference = save_noise(root / "reference", 11, seed=1)
    settings = dict(inception_weights=inception, fid_reference=reference, keep_images=True)
    settings |= dict(inputs=inputs, resume=inputs / "model")
    with mock.patch.object(metrics, "frechet", cheap_distance):
        evaluate(output=root / "eval", **settings)
    (folder,) = (root / "eval").glob("ariter*")
    return folder, reference, settings


def evaluate_again(folder: Path, settings: dict) -> dict:
    """metrics.json of the command, measured anew."""
    (folder / "metrics.json").unlink(missing_ok=True)
    evaluate(output=folder.parent, **settings)
    return json.loads((folder / "metrics.json").read_text())


def test_inception_figures_are_those_of_the_png_files(inception, evaluated, capsys):
    folder, reference, settings = evaluated
    found = evaluate_again(folder, settings)
    own = dict(feature_extractor=INCEPTION, feature_extractor_weights_path=str(inception))
    expected = fidelity(folder / "images", reference, kid_subset_size=11, **own)
    expected["fid"] = expected.pop("frechet_inception_distance")
    images = images_of(folder / "images"), images_of(reference)
    pooled, spatial = zip(*(inception_features(inception, x) for x in images), strict=True)
    expected |= {"sfid": definition(*spatial)} | density_and_coverage(*pooled)
    assert min(expected["fid"], expected["sfid"]) > 1 and expected["inception_score_mean"] > 1.001
    assert found["metrics"] == pytest.approx(expected, rel=1e-4)
    assert found["metric_settings"] == {"kid_subset_size": 11}
    printed = capsys.readouterr()
    assert f"FID-12: {found['metrics']['fid']:.4f}" in printed.out
    assert "12 images are not more than the 2048 features" in printed.err
    assert found["files"]["extractor"]["sha256"] == found["measured"]["weights_sha256"]


def test_sfid_of_files_with_and_without_it(inception, evaluated, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(metrics, "frechet", cheap_distance)
    folder, _, settings = evaluated
    before = evaluate_again(folder, settings)["metrics"]
    batch = min(folder.glob("features/*/batch-*.npz"))
    with np.load(shutil.copy(folder / "statistics.npz", tmp_path)) as file:
        own = dict(file)
    assert own["mu_s"].shape == (2023,) and own["sigma_s"].shape == (2023, 2023)
    path = tmp_path / "statistics.npz"
    settings = settings | dict(fid_reference=None, fid_stats=path)
    found = evaluate_again(folder, settings)["metrics"]
    inception_score = {n: before[n] for n in before if n.startswith("inception")}
    assert found == inception_score | {"fid": 0, "sfid": 0}
    np.savez(path, mu=own["mu"], sigma=own["sigma"])  # as all were
    capsys.readouterr()
    again = evaluate_again(folder, settings)["metrics"]
    assert again == {name: found[name] for name in found if name != "sfid"}
    assert capsys.readouterr().out.count("sFID is not computed") == 1
    np.savez(path, **own)
    with np.load(batch) as file:
        arrays = {name: file[name] for name in file.files if name != "mixed_6"}
    np.savez(batch, **arrays)  # as all were
    assert "features" in (line := complaint(evaluate_again, folder, settings))
    assert "remove it: 'mixed_6'" in line
    batch.unlink()
    np.savez(path, **own | {"mu_s": own["mu_s"][:9]})
    line = complaint(prepare, inception_weights=str(inception), fid_stats=str(path))
    assert "'mu_s': (9,)" in line and "not those of the extractor's 2023" in line


# --- the arithmetic, with an extractor of nine features


def pixels_measure(stats: dict | None = None) -> Measure:
    return Measure(Extractor("pixels", None, CPU), stats)


def images_of(folder: Path) -> torch.Tensor:
    pixels = [np.asarray(Image.open(path)) for path in sorted(folder.iterdir())]
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)


def scores_of(images: torch.Tensor, measure: Measure) -> Scores:
    sums = measure.sums()
    for part in images.split(7):
        sums.update(measure.extractor(part))
    return score(sums, measure)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("folders")
    return save_noise(root / "first", 43, seed=0), save_noise(root / "second", 37, seed=1)


def test_figures_equal_torch_fidelity_s_whichever_batch_came_first(folders, tmp_path, monkeypatch):
    """Nor does it matter into which parts chunks and matrices of distances are divided."""
    monkeypatch.setattr("util.evaluation.folder.CHUNK", 8)
    monkeypatch.setattr(metrics, "PRC_IN_MEMORY", 7)
    first, second = folders
    measure = compare_with_images(pixels_measure(), second, 16, tmp_path)
    images, batches = images_of(first), batch_ranges(43, 5)
    files = FeatureFiles(tmp_path / "own", batches)
    for number in torch.randperm(len(batches)).tolist():
        features = measure.extractor(images[list(batches[number])])
        files.write(number, batches[number], features)
    found = metrics.score(measure.sums(files), measure).figures
    assert found == pytest.approx(scores_of(images, measure).figures, rel=1e-5)  # from memory
    expected = fidelity(first, second, feature_extractor="pixels", kid_subset_size=37)
    error = found.pop("frechet_distance_standard_error")
    assert 0 < error < 10
    expected = {name.replace("inception_", ""): value for name, value in expected.items()}
    x, y = (pixels_measure().extractor(images_of(f))["mixed"].numpy() for f in folders)
    expected |= density_and_coverage(x, y)
    assert found == pytest.approx(expected, rel=1e-5)
    assert 0.1 < found["precision"] <= 1


def density_and_coverage(own: np.ndarray, real: np.ndarray) -> dict[str, float]:
    """By their definition, one real image after the other; errors by leaving every tenth out."""
    radii = [np.sort(np.linalg.norm(real - center, axis=1))[5] for center in real]
    distances = [np.linalg.norm(own - center, axis=1) for center in real]
    inside = np.array([d < radius for d, radius in zip(distances, radii, strict=True)])
    group, found = np.arange(len(own)) % 10, {}
    every = [inside, *(inside[:, group != g] for g in range(10))]
    for name, values in (
        ("density", [kept.sum() / 5 / kept.shape[1] for kept in every]),
        ("coverage", [kept.any(axis=1).mean() for kept in every]),
    ):
        found[name], found[f"{name}_standard_error"] = values[0], metrics.fid_error(values[1:])
    return found


def test_images_cover_themselves_and_few_real_ones_have_no_neighbours():
    x, scores = torch.randn(43, FEATURES), Scores()
    metrics._density_coverage(x, x, scores)  # in its own ball, and of five neighbours one is on it
    assert scores.figures["coverage"] == 1
    metrics._density_coverage(x, x[:5], scores)
    assert "need 6 real images" in scores.warnings[0]


def test_features_are_kept_of_so_many_images_at_most(folders, tmp_path, monkeypatch):
    """Moments are of all; KID, precision and recall of the first of every three."""
    monkeypatch.setattr(metrics, "MOST_KEPT", 15)
    found = compare_with_images(pixels_measure(), folders[1], 16, tmp_path)
    features = pixels_measure().extractor(images_of(folders[1]))["mixed"]
    assert torch.equal(found.features["mixed"], features[::3]) and found.record["images"] == 37
    np.testing.assert_allclose(found.stats["sigma"], np.cov(features.T.numpy()), rtol=1e-6)


def test_distances_and_their_replicates_are_by_definition(folders):
    """The five logits stand for the features of Inception's that sFID takes."""
    own, real = (pixels_measure().extractor(images_of(folder)) for folder in folders)
    stats, images = {}, images_of(folders[0])
    for layer, end in (("mixed", ""), ("logits", "_s")):
        y = real[layer].double().numpy()
        stats |= {f"mu{end}": y.mean(axis=0), f"sigma{end}": np.cov(y, rowvar=False)}
    measure = pixels_measure(stats)
    assert "sfid" not in scores_of(images, measure).figures
    measure.extractor.layers["sfid"] = "logits"
    scores = scores_of(images, measure)
    kept = [np.arange(43) % 10 != group for group in range(10)]
    for name, key, layer in (("frechet_distance", "fid", "mixed"), ("sfid", "sfid", "logits")):
        x, y = (features[layer].double().numpy() for features in (own, real))
        assert scores.figures[name] == pytest.approx(definition(x, y), rel=1e-6)
        expected = np.array([definition(x[k], y) for k in kept])
        assert scores.replicates[key] == pytest.approx(expected, rel=1e-6)
        error = np.sqrt(9 / 10 * ((expected - expected.mean()) ** 2).sum())
        assert scores.figures[f"{name}_standard_error"] == pytest.approx(error, rel=1e-4)
    parts = scores.replicates["inception_score"]
    assert np.mean(parts) == scores.figures["score_mean"] and len(parts) == 10
    few = scores_of(images[:10], pixels_measure(stats))
    assert "fid" not in few.replicates  # 9 features


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
    metrics._frechet_distance(moments, moments.statistics(), "fid", scores)
    assert "this is FID-20" in scores.warnings[0] and scores.figures["fid"] < 1e-6


def test_extractor_without_a_layer_for_fid_still_has_its_score(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(
        Pixels, "get_default_feature_layer_for_metric", staticmethod({"isc": "logits"}.__getitem__)
    )
    measure = compare_with_images(pixels_measure(), folders[1], 16, tmp_path)
    found = scores_of(images_of(folders[0]), measure).figures
    assert list(found) == ["score_mean", "score_std"]
    np.savez(tmp_path / "stats.npz", mu=np.zeros(FEATURES), sigma=np.eye(FEATURES))
    line = complaint(prepare, fid_stats=str(tmp_path / "stats.npz"), feature_extractor=PIXELS)
    assert "--fid_stats" in line and "no layer for a Frechet distance" in line


def test_reference_features_are_made_once(folders, tmp_path, monkeypatch, capsys):
    folder = shutil.copytree(folders[1], tmp_path / "images")
    cache = tmp_path / "cache"
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
    other = compare_with_images(pixels_measure(), folder, 16, cache, on_bad="drop")
    assert len(other.features["mixed"]) == other.record["images"] == 9
    assert other.identity() != first.identity()
    assert "9 images are not more than the 9 features" in capsys.readouterr().out


# --- what is missing


def test_missing_weights_and_statistics_are_said_in_one_line_each(inception, capsys, monkeypatch):
    monkeypatch.chdir(inception.parent)  # where there is no fid_stats/
    assert prepare() is None
    captured = capsys.readouterr()
    lines = [line for line in captured.out.splitlines() if "not computed" in line]
    assert len(lines) == 1 and WEIGHTS_FILE in lines[0] and "--inception_weights" in lines[0]
    measure = prepare(inception_weights=str(inception))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 and "--fid_stats" in lines[0] and measure.stats is None
    assert prepare(no_metrics=True, fid_stats="/nowhere") is None
    assert capsys.readouterr().out == ""


def test_weights_are_found_and_checked(inception, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    place = published_weights()
    place.parent.mkdir(parents=True)
    shutil.copy(inception, place)
    assert prepare().extractor.weights_sha256 == sha256(place)  # as downloaded earlier
    place.write_bytes(place.read_bytes()[:1000])
    assert "damaged" in (line := complaint(prepare)) and "--inception_weights" in line
    torch.save({"conv.weight": torch.ones(1)}, tmp_path / "other.pth")
    assert "other.pth" in complaint(prepare, inception_weights=str(tmp_path / "other.pth"))


def test_unknown_extractors_are_refused_in_one_line():
    for name, fragment in (
        ("nothing", "'nothing'"),
        ("no.such.module:pixels", "cannot import 'no.such.module'"),
        ("..measures:pixels", "cannot import '..measures'"),
    ):
        line = complaint(prepare, feature_extractor=name)
        assert line.startswith(f"--feature_extractor {name}") and fragment in line
