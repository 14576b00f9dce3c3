"""FID and IS are torch-fidelity's own, and what cannot be measured is said in one line."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch_fidelity
from scipy.linalg import sqrtm
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from tests.runs import evaluate, make_inputs, train
from util import metrics
from util.errors import UserError
from util.metrics import ImageFeatures

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """Random weights of torch-fidelity's network, in the form of its own file."""
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:  # the constructor wants a file of weights
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        patch.setattr(torch, "load", lambda *args, **kwargs: None)
        network = FeatureExtractorInceptionV3("random", ["2048"], "none")
    for parameter in network.parameters():
        if parameter.ndim > 1:  # the default initialisation forgets the image on its way
            torch.nn.init.kaiming_normal_(parameter)
    network.fc.weight.mul_(50)
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(network.state_dict(), path)
    return path


@pytest.fixture(autouse=True)
def no_network(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")


def test_evaluation_measures_what_torch_fidelity_measures(weights, tmp_path):
    """On the folder of PNG files, against statistics of another folder."""
    inputs = make_inputs(tmp_path / "inputs")
    train(inputs, tmp_path / "out", epochs=1)
    reference = tmp_path / "reference"
    reference.mkdir()
    for i, path in enumerate(sorted((inputs / "data").rglob("*0.png"))):
        shutil.copy(path, reference / f"{i}.png")
    network = metrics.load_extractor(weights, CPU)
    features = torch.cat(
        [
            network(torch_fidelity.datasets.ImagesPathDataset([str(path)])[0][None])[0]
            for path in sorted(reference.iterdir())
        ]
    ).numpy()
    stats = tmp_path / "stats.npz"
    np.savez(stats, mu=features.mean(axis=0), sigma=np.cov(features, rowvar=False))

    evaluate(
        inputs, tmp_path / "eval", tmp_path / "out", inception_weights=weights, fid_stats=stats
    )
    (folder,) = (tmp_path / "eval").iterdir()
    found = json.loads((folder / "metrics.json").read_text())["metrics"]
    expected = torch_fidelity.calculate_metrics(
        **dict(input1=str(folder / "images"), input2=str(reference), cuda=False, cache=False),
        **dict(isc=True, fid=True, verbose=False, save_cpu_ram=True),
        feature_extractor_weights_path=str(weights),
    )
    fid = expected["frechet_inception_distance"]
    mean, std = (expected[f"inception_score_{name}"] for name in ("mean", "std"))
    assert fid > 1 and mean - 1 > 1e-4 and std > 1e-4
    assert found["fid"] == pytest.approx(fid, rel=1e-4)
    assert found["inception_score_mean"] - 1 == pytest.approx(mean - 1, rel=1e-2)
    assert found["inception_score_std"] == pytest.approx(std, rel=1e-2)


# --- the arithmetic, on features of four numbers


class Stub:
    """An Inception whose features and logits are the pixels."""

    def __init__(self, stats: dict | None = None):
        self.stats = stats

    def __call__(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        pixels = images.flatten(1).float()
        return pixels, pixels / 50


def collect(images: torch.Tensor, batches: list[list[int]], stats=None) -> ImageFeatures:
    features = ImageFeatures(Stub(stats))
    for ids in batches:
        features.add(ids, images[ids])
    return features


def random_images(count: int, top: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, top, (count, 4, 1, 1), generator=generator, dtype=torch.uint8)


def frechet(x: np.ndarray, y: np.ndarray) -> float:
    """|mu_x - mu_y|^2 + tr(S_x + S_y - 2 (S_x S_y)^1/2), of features [N, D]."""
    a, b = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    difference = x.mean(axis=0) - y.mean(axis=0)
    return difference @ difference + np.trace(a + b - 2 * sqrtm(a @ b)).real


def test_distances_are_frechets():
    images, reference = random_images(40, 200), random_images(30, 256, seed=1)
    x, y = (t.flatten(1).numpy().astype(float) for t in (images, reference))
    stats = {"mu": y.mean(axis=0), "sigma": np.cov(y, rowvar=False)}
    other = collect(reference, [list(range(30))])
    found = collect(images, [list(range(40))], stats).compute(reference=other)
    assert found["fid"] == pytest.approx(frechet(x, y), rel=1e-6)
    assert found["rfid"] == pytest.approx(frechet(x, y), rel=1e-6)
    alone = collect(images, [list(range(40))]).compute()
    assert set(alone) == {"inception_score_mean", "inception_score_std"}


def test_figures_do_not_depend_on_who_made_which_image(monkeypatch):
    """IS is taken over splits of the images in their order."""
    images = random_images(40, 256)
    whole = collect(images, [list(range(40))]).compute()
    parts = [
        collect(images, [[30, 31], list(range(5))]),
        collect(images, [list(range(5, 30)), list(range(32, 40))]),
    ]
    assert parts[0].compute() != whole
    monkeypatch.setattr(
        metrics.dist, "gather_to_main", lambda value: [(part.ids, part.rows) for part in parts]
    )
    assert parts[1].compute() == whole


# --- what is missing


def test_missing_weights_and_statistics_are_said_in_one_line_each(weights, capsys, monkeypatch):
    monkeypatch.chdir(weights.parent)  # where there is no fid_stats/
    assert metrics.prepare(None, None, CPU) is None
    captured = capsys.readouterr()
    told = [line for line in captured.out.splitlines() if "not computed" in line]
    assert len(told) == 1 and metrics.WEIGHTS_FILE in told[0] and "--inception_weights" in told[0]
    assert len(captured.err.splitlines()) == 1
    inception = metrics.prepare(None, str(weights), CPU)
    told = capsys.readouterr().out.splitlines()
    assert len(told) == 1 and "--fid_stats" in told[0] and inception.stats is None


def test_metrics_may_be_unwanted(capsys):
    assert metrics.prepare("/nowhere", "/nowhere", CPU, wanted=False) is None
    assert capsys.readouterr().out == ""


def test_weights_downloaded_earlier_are_found_and_checked(weights):
    place = metrics.published_weights()
    place.parent.mkdir(parents=True)
    shutil.copy(weights, place)
    assert metrics.find_inception_weights(None) == place
    place.write_bytes(place.read_bytes()[:1000])
    with pytest.raises(UserError, match="--inception_weights .*damaged"):
        metrics.find_inception_weights(None)


def test_weights_of_another_network_are_refused(tmp_path):
    torch.save({"conv.weight": torch.ones(1)}, tmp_path / "other.pth")
    with pytest.raises(UserError) as error:
        metrics.prepare(None, str(tmp_path / "other.pth"), CPU)
    assert "other.pth" in str(error.value) and "\n" not in str(error.value)


def save_stats(path: Path, **arrays) -> Path:
    np.savez(path, **arrays)
    return path


def test_statistics_are_read(tmp_path):
    mu, sigma = np.arange(2048, dtype=np.float32), np.eye(2048, dtype=np.float32)
    found = metrics.load_fid_statistics(save_stats(tmp_path / "s.npz", mu=mu, sigma=sigma, n=3))
    assert set(found) == {"mu", "sigma"} and found["mu"].dtype == np.float64
    np.testing.assert_array_equal(found["mu"], mu)


@pytest.mark.parametrize(
    "make",
    [
        lambda path: None,
        lambda path: path.write_bytes(b"<html>"),
        lambda path: path.write_bytes(b"PK\x03\x04"),
        lambda path: path.write_bytes(b""),
        lambda path: save_stats(path, mu=np.zeros(2048)),
        lambda path: save_stats(path, mu=np.zeros(64), sigma=np.eye(64)),
        lambda path: save_stats(path, mu=np.array([{}]), sigma=np.eye(2)),
    ],
)
def test_bad_statistics_are_refused_in_one_line(tmp_path, make):
    path = tmp_path / "stats.npz"
    make(path)
    with pytest.raises(UserError) as error:
        metrics.load_fid_statistics(path)
    assert str(error.value).startswith(f"--fid_stats {path}: ") and "\n" not in str(error.value)
