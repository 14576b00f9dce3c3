"""reconstruction.py against brute force, on one process and two, with and without bad images."""

import csv
import json
import shutil
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from torchmetrics.functional.image import structural_similarity_index_measure as similarity

from models.calibration import fit_levels
from models.quantizer import gaussian_levels
from models.tokenizers.kl16 import Posterior
from models.tokenizers.tokenizer import Tokenizer, from_uint8, to_uint8
from tests.conftest import complaint
from tests.measures import PIXELS
from tests.runs import CHANNELS, SIZE, command, contents, on_processes, use
from util.data.histogram import LatentHistogram
from util.data.images import ImageDataset
from util.data.listing import list_images
from util.evaluation.extractor import Extractor
from util.evaluation.folder import ImageFolder
from util.evaluation.metrics import Moments, frechet
from util.evaluation.reconstruction import draw_latents, ssim
from util.vae import load_vae

SCALE, RANGE, BITS = 4.0, 2.0, (2, 6)  # some scaled posterior means lie outside the range
VARIANTS = ("original", "continuous", *(f"bits{bits}" for bits in BITS))
SETTINGS = dict(latent_scale=SCALE, range=RANGE, bits=[-1, *BITS], batch_size=5)


@pytest.fixture(scope="module")
def done(inputs, tmp_path_factory) -> Path:
    """The output of one process."""
    output = tmp_path_factory.mktemp("done")
    reconstruct(inputs, output)
    return output


def reconstruct(inputs: Path, output: Path, **changes) -> None:
    use("reconstruct", inputs, output_dir=output, **SETTINGS | changes)


def files(output: Path) -> dict[str, bytes]:
    return {name: data for name, data in contents(output).items() if name.endswith(".png")}


def pixels(folder: Path) -> np.ndarray:
    """[N, H, W, 3] of a folder's images, in order."""
    return np.stack([np.asarray(Image.open(path), int) for path in sorted(folder.glob("*.png"))])


def results(output: Path) -> dict:
    return json.loads((output / "results.json").read_text())


def brute_force(inputs: Path, scale: float, levels: torch.Tensor) -> tuple:
    """(latents, values, indices, pixels [N, H, W, 3]) of the nearest levels, of [C, K]."""
    vae = load_vae(inputs / "vae.ckpt").eval()
    dataset = ImageDataset(list_images(inputs / "data").samples, SIZE)
    latents = vae.encode(from_uint8(torch.stack([image for image, _ in dataset]))).mean * scale
    indices = (latents[..., None] - levels[None, :, None, None]).abs().argmin(dim=-1)
    values = torch.stack([levels[c][indices[:, c]] for c in range(CHANNELS)], dim=1)
    images = to_uint8(vae.decode(values / scale).clamp(-1, 1)).permute(0, 2, 3, 1)
    return latents, values, indices, images.numpy().astype(int)


@torch.no_grad()
def test_images_and_figures_equal_brute_force(inputs, tmp_path):
    reconstruct(inputs, tmp_path, posterior="mode")
    record, original = results(tmp_path), pixels(tmp_path / "original")
    assert (record["images"], record["latent_scale"], record["range"]) == (24, SCALE, RANGE)
    assert [r["name"] for r in record["results"]] == list(VARIANTS[1:])
    for result in record["results"]:
        error = ((pixels(tmp_path / result["name"]) - original) ** 2).mean(axis=(1, 2, 3))
        assert result["psnr"] == pytest.approx(np.mean(10 * np.log10(255**2 / error)), rel=1e-6)
    for result, bits in zip(record["results"][1:], BITS, strict=True):
        levels = (gaussian_levels(2**bits)[1] / 3 * RANGE).expand(CHANNELS, -1)
        latents, _, indices, expected = brute_force(inputs, SCALE, levels)
        assert np.abs(pixels(tmp_path / f"bits{bits}") - expected).max() <= 1
        outside = (latents.abs() > RANGE).float().mean().item()
        assert 0 < outside < 1
        assert result["out_of_range_share"] == pytest.approx(outside, rel=1e-6)
        for channel in range(CHANNELS):
            counts = np.bincount(indices[:, channel].flatten())
            p = counts[counts > 0] / counts.sum()
            entropy = result["entropy_bits_by_channel"][channel]
            assert entropy == pytest.approx(-(p * np.log2(p)).sum(), rel=1e-3)
            assert result["levels_used_by_channel"][channel] == len(p)
    continuous = load_vae(inputs / "vae.ckpt").decode(latents / SCALE).clamp(-1, 1)
    expected = to_uint8(continuous).permute(0, 2, 3, 1).numpy().astype(int)
    assert np.abs(pixels(tmp_path / "continuous") - expected).max() <= 1


def test_dry_run_says_what_the_run_would_take_and_writes_nothing(inputs, tmp_path, capsys):
    output = tmp_path / "out"

    def printed() -> dict:
        capsys.readouterr()
        reconstruct(inputs, output, bits=[-1, 3], dry_run=True, json=True)
        return json.loads(capsys.readouterr().out)

    found = printed()
    assert not output.exists()
    assert found["batches_to_do"] == found["batches"] > 1 and found["hours"] > 0
    assert found["variants"] == ["original", "continuous", "bits3"]
    reconstruct(inputs, output, bits=[-1, 3])
    assert len(list(output.glob("*/*.png"))) == 3 * found["images"]
    assert printed()["batches_to_do"] == 0


def test_grid_table_and_plot_show_every_variant(inputs, done, tmp_path):
    rows = np.asarray(Image.open(done / "grid.png"))
    assert rows.shape == (len(VARIANTS) * (SIZE + 2) + 2, 8 * (SIZE + 2) + 2, 3)
    for row, name in enumerate(VARIANTS):
        top = row * (SIZE + 2) + 2
        shown = rows[top : top + SIZE, 2 : SIZE + 2]
        assert np.array_equal(shown, np.asarray(Image.open(done / name / "00000.png")))
    reconstruct(inputs, tmp_path, bits=[2, 6])
    found = np.asarray(Image.open(tmp_path / "grid.png"), dtype=int)
    assert np.abs(found - rows).max() <= 1  # another batch rounds otherwise
    assert not (tmp_path / "continuous").exists()

    rows = list(csv.DictReader((done / "results.csv").open()))
    assert [row["name"] for row in rows] == ["bits2", "bits6", "continuous"]
    for row, result in zip(rows, (results(done)["results"][k] for k in (1, 2, 0)), strict=True):
        scalars = {k: str(v) for k, v in result.items() if not isinstance(v, list)}
        assert {k: v for k, v in row.items() if v} == scalars
    with Image.open(done / "quality.png") as plot:
        assert plot.width > plot.height > 200


def test_unreadable_images_are_left_out_and_named_once(own, done, tmp_path, capsys):
    """No other takes their place; grid.png would show them where all can be read."""
    for name in ("0.png", "3.png"):
        (own / "data" / "train" / "ant" / name).write_bytes(b"broken")
    settings = dict(skip_bad_images=True, batch_size=1)
    reconstruct(own, tmp_path / "out", **settings)
    assert capsys.readouterr().err.count("skipped: ") == 2
    expected = [f"{i:05d}.png" for i in range(24) if i not in (0, 3)]
    for name in VARIANTS:
        assert sorted(path.name for path in (tmp_path / "out" / name).iterdir()) == expected
        others = np.delete(pixels(done / name), (0, 3), axis=0)
        assert np.abs(pixels(tmp_path / "out" / name) - others).max() <= 1
    reconstruct(own, tmp_path / "out", **settings)
    printed = capsys.readouterr()
    assert "24 of 24 batches are there already" in printed.out
    assert "22 images, rows of" in printed.out and "skipped: " not in printed.err


def test_one_image_is_enough_for_all_but_a_covariance(inputs, tmp_path):
    folder = tmp_path / "data" / "ant"
    folder.mkdir(parents=True)
    shutil.copy(inputs / "data" / "train" / "ant" / "0.png", folder)
    settings = dict(image_dir=tmp_path / "data", no_metrics=None, feature_extractor=PIXELS)
    reconstruct(inputs, tmp_path / "out", **settings)
    for result in results(tmp_path / "out")["results"]:
        assert result["images"] == 1 and result["psnr"] > 5
        assert not {name for name in result if "distance" in name}


# --- one folder, one run


def test_a_run_with_other_settings_is_not_mixed_in(inputs, done, tmp_path):
    folder = shutil.copytree(done, tmp_path / "done")
    for changes, fragment in (
        ({"images_per_class": 2}, "count 24 (now 6)"),
        ({"seed": 2}, "seed 1 (now 2)"),
        ({"range": 3.0}, "range 2.0 (now 3.0)"),
        ({"batch_size": 1, "dry_run": True}, "batch_size 5 (now 1)"),
        ({}, "holds images of unknown settings"),
    ):
        if not changes:
            (folder / "settings.json").unlink()
        line = complaint(reconstruct, inputs, folder, **changes)
        assert "--output_dir" in line and fragment in line
        assert files(folder) == files(done) and results(folder) == results(done)


def test_more_bits_join_later_and_stand_beside_the_others(inputs, done, tmp_path):
    reconstruct(inputs, tmp_path, bits=[2])
    reconstruct(inputs, tmp_path, bits=[-1, 6])
    found, expected = results(tmp_path)["results"], results(done)["results"]
    assert [r["name"] for r in found] == ["continuous", "bits6", "bits2"]
    assert {r["name"]: r for r in found} == {r["name"]: r for r in expected}
    for name in VARIANTS:
        assert np.array_equal(pixels(tmp_path / name), pixels(done / name))


@pytest.mark.parametrize("stopped_after,processes", [(0, 2), (6, 1)])
def test_killed_or_damaged_it_ends_the_same(inputs, done, tmp_path, stopped_after, processes):
    effects = [mock.DEFAULT] * stopped_after + [KeyboardInterrupt]
    write = mock.Mock(wraps=ImageFolder.save, side_effect=effects)
    patch = mock.patch.object(ImageFolder, "save", lambda *args: write(*args))
    with patch, pytest.raises(KeyboardInterrupt):
        reconstruct(inputs, tmp_path)
    assert not (tmp_path / "results.json").exists()
    asked = command("reconstruct", inputs, output_dir=tmp_path, **SETTINGS)
    result = on_processes(processes, *asked)
    assert result.stdout.count("24 images, rows of") == 1
    assert files(tmp_path) == files(done) and results(tmp_path) == results(done)
    (tmp_path / "bits2" / "00000.png").unlink()
    (tmp_path / "original" / "00007.png").write_bytes(b"")  # as a power cut may leave a file
    (tmp_path / "records" / "bits6" / "batch-000001.npz").unlink()
    reconstruct(inputs, tmp_path)
    assert files(tmp_path) == files(done) and results(tmp_path) == results(done)


# --- what is measured


def test_ssim_is_torchmetrics_own_of_each_image():
    images, others = torch.randint(0, 256, (2, 2, 3, 13, 14), dtype=torch.uint8)
    pairs = zip(images.double().split(1), others.double().split(1), strict=True)
    expected = [similarity(a, b, data_range=255.0).item() for a, b in pairs]
    assert ssim(images, others).tolist() == pytest.approx(expected)
    assert ssim(images, images).tolist() == pytest.approx([1, 1])


def test_figures_of_features_are_those_of_the_images(inputs, tmp_path):
    """Begun without them, measured later, on two processes: features of the very PNG files."""
    reconstruct(inputs, tmp_path)
    measuring = SETTINGS | dict(feature_extractor=PIXELS, no_metrics=False)
    on_processes(2, *command("reconstruct", inputs, output_dir=tmp_path, **measuring))
    extractor, moments = Extractor("pixels", None, torch.device("cpu")), {}
    for name in VARIANTS:
        images = torch.from_numpy(pixels(tmp_path / name)).permute(0, 3, 1, 2).to(torch.uint8)
        moments[name] = Moments().update(extractor(images)["mixed"]).statistics()
    for found in results(tmp_path)["results"]:
        expected = frechet(moments[found["name"]], moments["original"])
        distance = found["reconstruction_frechet_distance"]  # rfid is Inception's alone
        assert distance == pytest.approx(expected, rel=1e-3) and found["score_mean"] >= 1


@torch.no_grad()
def test_calibrated_levels_are_the_caches(inputs, done, tmp_path):
    """--cached_path knows the scale, too."""
    changes = {"cached_path": "cache", "latent_scale": None, "posterior": "mode", "bits": [3]}
    reconstruct(inputs, tmp_path / "out", quantizer="calibrated", **changes)
    manifest = json.loads((inputs / "cache" / "manifest.json").read_text())
    histogram, scale = LatentHistogram.from_dict(manifest["histogram"]), manifest["latent_scale"]
    _, levels = fit_levels(histogram.counts, histogram.bin_widths(scale), 8)
    latents, values, _, expected = brute_force(inputs, scale, levels.float())
    assert np.abs(pixels(tmp_path / "out" / "bits3") - expected).max() <= 1
    error = (values - latents).square().mean(dim=(0, 2, 3)).tolist()
    assert results(tmp_path / "out")["latent_scale"] == scale
    found = results(tmp_path / "out")["results"][0]
    assert found["latent_mse_by_channel"] == pytest.approx(error, rel=1e-4)
    line = complaint(reconstruct, inputs, tmp_path / "out", **changes)
    assert "quantizer calibrated (now published" in line
    line = complaint(reconstruct, inputs, tmp_path / "new", quantizer="calibrated")
    assert "needs --cached_path" in line


def test_noise_of_an_image_is_standard_normal_and_its_own():
    """Whichever batch it is in; and no two images or seeds share theirs."""
    tokenizer = Tokenizer(None, 1.0)  # mean 0, std 1
    tokenizer.posterior = lambda x: Posterior(torch.zeros(len(x), 8, 16, 16))
    drawn = draw_latents(tokenizer, torch.zeros(50, 3), list(range(50)), 3)
    assert drawn.mean().abs() < 0.02 and abs(drawn.std() - 1) < 0.02
    correlation = torch.corrcoef(drawn.flatten(1)) - torch.eye(50)
    assert correlation.abs().max() < 0.2
    again, other = (draw_latents(tokenizer, torch.zeros(2, 3), [7, 49], seed) for seed in (3, 4))
    assert torch.equal(again, drawn[[7, 49]]) and (again - other).abs().mean() > 1
