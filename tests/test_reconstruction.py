"""reconstruction.py against brute force, on one process and two, with and without bad images."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from PIL import Image

import reconstruction
from models.calibration import fit_levels
from models.generate import to_uint8
from models.quantizer import gaussian_levels
from models.tokenizers.tokenizer import from_uint8
from tests.measures import PIXELS
from tests.runs import (
    CHANNELS,
    COMMON,
    SIZE,
    STRIDE,
    call,
    flags,
    on_processes,
    refused,
)
from util.data.histogram import LatentHistogram
from util.data.images import ImageDataset, psnr
from util.data.listing import list_images
from util.errors import UserError
from util.evaluation.extractor import Extractor
from util.evaluation.reconstruction import ReconstructionFolder, ssim
from util.vae import load_vae

SCALE, RANGE, BITS = 4.0, 2.0, (2, 6)  # some scaled posterior means lie outside the range
VARIANTS = ("original", "continuous", *(f"bits{bits}" for bits in BITS))
FLAGS = {
    **COMMON,
    **dict(image_dir="data", vae_path="vae.ckpt", latent_scale=SCALE, range=RANGE),
    **dict(bits=[-1, *BITS], batch_size=5, no_metrics=True),
}


@pytest.fixture(scope="module")
def done(inputs, tmp_path_factory) -> Path:
    """The output of one process."""
    output = tmp_path_factory.mktemp("done")
    reconstruct(inputs, output)
    return output


def reconstruct(inputs: Path, output: Path, **changes) -> None:
    call(reconstruction.main, *flags(inputs, FLAGS, output_dir=output, **changes))


def files(output: Path) -> dict[str, bytes]:
    """Everything but the record of the settings."""
    paths = (path for path in sorted(output.rglob("*.png")))
    return {str(path.relative_to(output)): path.read_bytes() for path in paths}


def pixels(folder: Path) -> np.ndarray:
    """[N, H, W, 3] of a folder's images, in order."""
    return np.stack([np.asarray(Image.open(path), int) for path in sorted(folder.glob("*.png"))])


def results(output: Path) -> dict:
    return json.loads((output / "results.json").read_text())


@torch.no_grad()
def test_images_and_figures_equal_brute_force(inputs, tmp_path):
    """Level by level: the nearest of all, by distance, where the script searches midpoints."""
    reconstruct(inputs, tmp_path, posterior="mode")
    vae = load_vae(inputs / "vae.ckpt").eval()
    dataset = ImageDataset(list_images(inputs / "data").samples, SIZE)
    images = from_uint8(torch.stack([image for image, _ in dataset]))
    latents = vae.encode(images).mean * SCALE
    decoded = {"original": images, "continuous": vae.decode(latents / SCALE)}
    indices = {}
    for bits in BITS:
        levels = gaussian_levels(2**bits)[1] / 3 * RANGE
        indices[bits] = (latents[..., None] - levels).abs().argmin(dim=-1)
        decoded[f"bits{bits}"] = vae.decode(levels[indices[bits]] / SCALE)
    for name, expected in decoded.items():
        expected = to_uint8(expected.clamp(-1, 1)).permute(0, 2, 3, 1).numpy().astype(int)
        assert np.abs(pixels(tmp_path / name) - expected).max() <= 1, name

    record = results(tmp_path)
    assert (record["images"], record["latent_scale"], record["range"]) == (24, SCALE, RANGE)
    assert [r["name"] for r in record["results"]] == list(VARIANTS[1:])
    original = pixels(tmp_path / "original")
    for result in record["results"]:
        error = ((pixels(tmp_path / result["name"]) - original) ** 2).mean(axis=(1, 2, 3))
        assert result["psnr"] == pytest.approx(np.mean(10 * np.log10(255**2 / error)), rel=1e-6)
    outside = (latents.abs() > RANGE).float().mean().item()
    assert 0 < outside < 1
    for result, bits in zip(record["results"][1:], BITS, strict=True):
        assert result["out_of_range_share"] == pytest.approx(outside, rel=1e-6)
        for channel in range(CHANNELS):
            counts = np.bincount(indices[bits][:, channel].flatten())
            p = counts[counts > 0] / counts.sum()
            entropy = result["entropy_bits_by_channel"][channel]
            assert entropy == pytest.approx(-(p * np.log2(p)).sum(), rel=1e-3)
            assert result["levels_used_by_channel"][channel] == len(p)


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
    argv = flags(inputs, FLAGS, output_dir=output, dry_run=True, batch_size=1)
    assert "was begun with" in refused(capsys, reconstruction.main, *argv)


def test_grid_shows_every_variant_of_the_same_images(done):
    rows = np.asarray(Image.open(done / "grid.png"))
    assert rows.shape == (len(VARIANTS) * (SIZE + 2) + 2, 8 * (SIZE + 2) + 2, 3)
    for row, name in enumerate(VARIANTS):
        top = row * (SIZE + 2) + 2
        shown = rows[top : top + SIZE, 2 : SIZE + 2]
        assert np.array_equal(shown, np.asarray(Image.open(done / name / "00000.png")))


def test_two_processes_write_the_bytes_and_figures_of_one(inputs, done, tmp_path):
    argv = flags(inputs, FLAGS, output_dir=tmp_path, num_workers=1)
    result = on_processes(2, "reconstruction.py", *argv)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("24 images, rows of") == 1
    assert files(tmp_path) == files(done) and results(tmp_path) == results(done)


def test_unreadable_images_are_left_out_and_named_once(inputs, done, tmp_path, capsys):
    """No other takes their place; grid.png would show them where all can be read."""
    data = shutil.copytree(inputs / "data", tmp_path / "data")
    for name in ("0.png", "3.png"):
        (data / "train" / "ant" / name).write_bytes(b"broken")
    settings = dict(image_dir=data, skip_bad_images=True, batch_size=1)
    reconstruct(inputs, tmp_path / "out", **settings)
    assert capsys.readouterr().err.count("skipped: ") == 2
    expected = [f"{i:05d}.png" for i in range(24) if i not in (0, 3)]
    for name in VARIANTS:
        assert sorted(path.name for path in (tmp_path / "out" / name).iterdir()) == expected
        others = np.delete(pixels(done / name), (0, 3), axis=0)
        assert np.abs(pixels(tmp_path / "out" / name) - others).max() <= 1
    reconstruct(inputs, tmp_path / "out", **settings)
    printed = capsys.readouterr()
    assert "24 of 24 batches are there already" in printed.out
    assert "22 images, rows of" in printed.out and "skipped: " not in printed.err


def test_one_image_is_enough(inputs, tmp_path):
    """For everything but a covariance."""
    folder = tmp_path / "data" / "ant"
    folder.mkdir(parents=True)
    shutil.copy(inputs / "data" / "train" / "ant" / "0.png", folder)
    settings = dict(image_dir=tmp_path / "data", no_metrics=None, feature_extractor=PIXELS)
    np.savez(tmp_path / "stats.npz", mu=np.zeros(9), sigma=np.eye(9))
    reconstruct(inputs, tmp_path / "out", **settings, fid_stats=tmp_path / "stats.npz")
    for result in results(tmp_path / "out")["results"]:
        assert result["images"] == 1 and result["psnr"] > 5
        assert not {name for name in result if "distance" in name}


def test_first_images_of_each_class_are_taken(inputs, done, tmp_path):
    """Of a folder of class folders, with or without train/ around it."""
    chosen = pixels(done / "original")[[0, 1, 8, 9, 16, 17]]
    for name, data in (("outer", "data"), ("inner", "data/train")):
        reconstruct(inputs, tmp_path / name, images_per_class=2, bits=[-1], image_dir=inputs / data)
        assert np.array_equal(pixels(tmp_path / name / "original"), chosen)
    assert {path.parent.name for path in tmp_path.glob("*/*/*.png")} == {"original", "continuous"}


def test_seed_moves_samples_but_not_modes(inputs, done, tmp_path):
    for posterior in ("sample", "mode"):
        for seed in (1, 2):
            output = tmp_path / f"{posterior}{seed}"
            reconstruct(inputs, output, posterior=posterior, seed=seed, bits=[-1])
    one, two, mode_one, mode_two = (
        pixels(tmp_path / name / "continuous") for name in ("sample1", "sample2", "mode1", "mode2")
    )
    assert np.array_equal(one, pixels(done / "continuous"))
    assert np.array_equal(mode_one, mode_two)
    assert not np.array_equal(one, two) and not np.array_equal(one, mode_one)


# --- one folder, one run


@pytest.mark.parametrize(
    "changes,fragment",
    [
        ({"images_per_class": 2}, "count 24 (now 6)"),
        ({"seed": 2}, "seed 1 (now 2)"),
        ({"posterior": "mode"}, "posterior sample (now mode)"),
        ({"range": 3.0}, "range 2.0 (now 3.0)"),
        ({"latent_scale": 1.0}, "latent_scale 4.0 (now 1.0)"),
        ({"batch_size": 4}, "batch_size 5 (now 4)"),
        (None, "holds images of unknown settings"),
    ],
)
def test_a_run_with_other_settings_is_not_mixed_in(inputs, done, tmp_path, changes, fragment):
    folder = shutil.copytree(done, tmp_path / "done")
    if changes is None:
        (folder / "settings.json").unlink()
    before = contents(folder)
    with pytest.raises(UserError) as error:
        reconstruct(inputs, folder, **changes or {})
    assert "--output_dir" in str(error.value) and fragment in str(error.value)
    assert contents(folder) == before


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_more_bits_join_later_and_stand_beside_the_others(inputs, done, tmp_path):
    reconstruct(inputs, tmp_path, bits=[2])
    reconstruct(inputs, tmp_path, bits=[-1, 6])
    found, expected = results(tmp_path)["results"], results(done)["results"]
    assert [r["name"] for r in found] == ["continuous", "bits6", "bits2"]
    assert {r["name"]: r for r in found} == {r["name"]: r for r in expected}
    for name in VARIANTS:
        assert np.array_equal(pixels(tmp_path / name), pixels(done / name))


@pytest.mark.parametrize("stopped_after,processes", [(1, 1), (6, 2), (13, 1)])
def test_killed_anywhere_it_goes_on_with_any_processes(
    inputs, done, tmp_path, monkeypatch, stopped_after, processes
):
    """The same bytes and figures as undisturbed."""
    write, count = ReconstructionFolder.write, 0

    def write_some(*args, **kwargs):
        nonlocal count
        count += 1
        if count > stopped_after:
            raise KeyboardInterrupt
        write(*args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ReconstructionFolder, "write", write_some)
        reconstruct(inputs, tmp_path)
    unfinished = tmp_path / "original" / ".00003.png.ab.tmp"
    unfinished.write_bytes(b"of a killed process")
    assert not (tmp_path / "results.json").exists()
    if processes == 1:
        reconstruct(inputs, tmp_path)
    else:
        argv = flags(inputs, FLAGS, output_dir=tmp_path)
        result = on_processes(2, "reconstruction.py", *argv)
        assert result.returncode == 0, result.stderr
    assert files(tmp_path) == files(done) and results(tmp_path) == results(done)
    assert not unfinished.exists()


@pytest.mark.parametrize(
    ("path", "content"),
    [
        ("bits2/00007.png", None),
        ("original/00007.png", None),
        ("records/bits2/batch-000001.npz", None),
        ("bits2/00007.png", b""),  # as a power cut may leave a file
    ],
)
def test_what_is_missing_or_empty_is_made_again(inputs, done, tmp_path, path, content):
    folder = shutil.copytree(done, tmp_path / "done")
    (folder / path).unlink() if content is None else (folder / path).write_bytes(content)
    reconstruct(inputs, folder)
    assert files(folder) == files(done) and results(folder) == results(done)


# --- what is measured


def test_ssim_equals_brute_force():
    """Window by window: weighted means, variances, covariance; edges mirrored as torchmetrics has
    it, constants 0.01 and 0.03 as the paper has them."""
    image = torch.randint(0, 256, (2, 3, 13, 14), dtype=torch.uint8)
    other = (image.int() + torch.randint(-30, 31, image.shape)).clamp(0, 255).to(torch.uint8)
    line = np.exp(-((np.arange(11) - 5) ** 2) / (2 * 1.5**2))
    window = np.outer(line, line) / np.outer(line, line).sum()
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    a, b = (
        np.pad(t.double().numpy(), ((0, 0), (0, 0), (5, 5), (5, 5)), "reflect")
        for t in (image, other)
    )
    for i, found in enumerate(ssim(image, other)):
        values = []
        for channel, top, left in np.ndindex(3, 13, 14):
            x, y = (t[i, channel, top : top + 11, left : left + 11] for t in (a, b))
            mx, my = (window * x).sum(), (window * y).sum()
            vx, vy = (window * x * x).sum() - mx**2, (window * y * y).sum() - my**2
            upper = (2 * mx * my + c1) * (2 * ((window * x * y).sum() - mx * my) + c2)
            values.append(upper / ((mx**2 + my**2 + c1) * (vx + vy + c2)))
        assert found.item() == pytest.approx(np.mean(values), rel=1e-9)
    assert ssim(image, image).tolist() == pytest.approx([1, 1])


def test_a_csv_row_for_each_variant_and_a_plot(done):
    rows = list(csv.DictReader((done / "results.csv").open()))
    expected = {r["name"]: r for r in results(done)["results"]}
    assert [row["name"] for row in rows] == ["bits2", "bits6", "continuous"]
    for row in rows:
        scalars = {k: v for k, v in expected[row["name"]].items() if not isinstance(v, list)}
        assert {k: v for k, v in row.items() if v} == {k: str(v) for k, v in scalars.items()}
    with Image.open(done / "quality.png") as plot:
        assert plot.width > plot.height > 200


def test_the_grid_shows_the_continuous_images_even_if_not_asked_for(inputs, done, tmp_path):
    reconstruct(inputs, tmp_path, bits=[2, 6])
    found, expected = (np.asarray(Image.open(f / "grid.png"), dtype=int) for f in (tmp_path, done))
    assert np.abs(found - expected).max() <= 1  # another batch rounds otherwise
    assert not (tmp_path / "continuous").exists()
    assert [r["name"] for r in results(tmp_path)["results"]] == ["bits2", "bits6"]


def test_figures_of_features_are_those_of_the_images(inputs, tmp_path):
    """Begun without them, measured later, on two processes: features of the very PNG files."""
    reconstruct(inputs, tmp_path)
    measuring = {"feature_extractor": PIXELS, "no_metrics": False}
    argv = flags(inputs, FLAGS, output_dir=tmp_path, **measuring)
    result = on_processes(2, "reconstruction.py", *argv)
    assert result.returncode == 0, result.stderr
    extractor, features = Extractor("pixels", None, torch.device("cpu")), {}
    for name in VARIANTS:
        images = torch.from_numpy(pixels(tmp_path / name)).permute(0, 3, 1, 2).to(torch.uint8)
        features[name] = extractor(images)
    for found in results(tmp_path)["results"]:
        own, crops = (
            features[found["name"]]["mixed"].double(),
            features["original"]["mixed"].double(),
        )
        covariances = np.cov(own.T.numpy()), np.cov(crops.T.numpy())
        root = scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real
        expected = (own.mean(0) - crops.mean(0)).square().sum().item()
        expected += np.trace(covariances[0] + covariances[1] - 2 * root)
        distance = found["reconstruction_frechet_distance"]  # rfid is Inception's alone
        assert distance == pytest.approx(expected, rel=1e-3)
        assert found["score_mean"] >= 1
    header = (tmp_path / "results.csv").read_text().splitlines()[0]
    assert "reconstruction_frechet_distance" in header


@torch.no_grad()
def test_calibrated_levels_are_the_caches(inputs, done, tmp_path):
    """--cached_path knows the scale, too; nearest levels by brute force, channel by channel."""
    changes = {"cached_path": "cache", "latent_scale": None, "posterior": "mode", "bits": [3]}
    reconstruct(inputs, tmp_path / "out", quantizer="calibrated", **changes)
    manifest = json.loads((inputs / "cache" / "manifest.json").read_text())
    histogram = LatentHistogram.from_dict(manifest["histogram"])
    scale = manifest["latent_scale"]
    _, values = fit_levels(histogram.counts, histogram.bin_widths(scale), 8)
    vae = load_vae(inputs / "vae.ckpt").eval()
    dataset = ImageDataset(list_images(inputs / "data").samples, SIZE)
    images = from_uint8(torch.stack([image for image, _ in dataset]))
    latents = vae.encode(images).mean * scale
    levels = values.float()[None, :, None, None]  # [1, C, 1, 1, K]
    indices = (latents[..., None] - levels).abs().argmin(dim=-1)
    quantized = torch.stack([values[c].float()[indices[:, c]] for c in range(CHANNELS)], dim=1)
    expected = to_uint8(vae.decode(quantized / scale).clamp(-1, 1)).permute(0, 2, 3, 1).numpy()
    assert np.abs(pixels(tmp_path / "out" / "bits3") - expected.astype(int)).max() <= 1
    error = (quantized - latents).square().mean(dim=(0, 2, 3)).tolist()
    found = results(tmp_path / "out")["results"][0]
    assert found["latent_mse_by_channel"] == pytest.approx(error, rel=1e-4)
    assert results(tmp_path / "out")["latent_scale"] == scale
    with pytest.raises(UserError, match="quantizer calibrated .now published"):
        reconstruct(inputs, tmp_path / "out", **changes)
    with pytest.raises(UserError, match="needs --cached_path"):
        reconstruct(inputs, tmp_path / "new", quantizer="calibrated")


def test_kl16_is_the_vae_whose_scale_is_known(inputs, tmp_path):
    assert STRIDE != 16
    with pytest.raises(UserError, match="--latent_scale"):
        reconstruct(inputs, tmp_path / "new", latent_scale=None)
    assert not (tmp_path / "new").exists()


def test_noise_of_an_image_is_standard_normal_and_its_own():
    """Whichever batch it is in; and no two images share theirs."""
    tokenizer = reconstruction.Tokenizer(None, 1.0)
    posterior = reconstruction.Posterior(torch.zeros(50, 8, 16, 16))  # mean 0, std 1
    tokenizer.posterior = lambda images: posterior
    drawn = reconstruction.draw_latents(tokenizer, torch.zeros(50, 3), list(range(50)), 3)
    assert drawn.mean().abs() < 0.02 and abs(drawn.std() - 1) < 0.02
    correlation = torch.corrcoef(drawn.flatten(1)) - torch.eye(50)
    assert correlation.abs().max() < 0.2
    posterior = reconstruction.Posterior(torch.zeros(2, 8, 16, 16))
    again = reconstruction.draw_latents(tokenizer, torch.zeros(2, 3), [7, 49], 3)
    assert torch.equal(again, drawn[[7, 49]])


def test_psnr_of_known_errors():
    """10 log10(255^2 / mse): 48.13 dB for an error of one level, capped at 100."""
    images = torch.full((3, 3, 2, 2), 100, dtype=torch.uint8)
    other = images + torch.tensor([0, 1, 255 - 100], dtype=torch.uint8)[:, None, None, None]
    expected = [100.0, 48.1308, 20 * np.log10(255 / 155)]
    assert psnr(other, images).tolist() == pytest.approx(expected, rel=1e-5)
