"""reconstruction.py against brute force, on one process and two, with and without bad images."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import reconstruction
from models.quantizer import gaussian_levels
from tests.conftest import run_script
from tests.runs import CHANNELS, COMMON, SIZE, STRIDE, call, flags, free_port, make_inputs
from util.checkpoint import load_vae
from util.data import ImageDataset, list_images
from util.errors import UserError
from util.images import psnr, to_uint8

SCALE, RANGE, BITS = 4.0, 2.0, (2, 6)  # some scaled posterior means lie outside the range
VARIANTS = ("original", "continuous", *(f"bits{bits}" for bits in BITS))
FLAGS = {
    **COMMON,
    **dict(image_dir="data", vae_path="vae.ckpt", latent_scale=SCALE, range=RANGE),
    **dict(bits=[-1, *BITS], batch_size=5, no_metrics=True),
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


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
    images = torch.stack([image for image, _ in dataset])
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


def test_more_bits_come_closer_to_the_continuous_images(inputs, tmp_path):
    reconstruct(inputs, tmp_path, posterior="mode", range=4.0, bits=[-1, 2, 4, 6])
    continuous = pixels(tmp_path / "continuous")
    errors = [np.abs(pixels(tmp_path / f"bits{b}") - continuous).mean() for b in (2, 4, 6)]
    assert errors[1] < errors[0] / 2 and errors[2] < errors[1] / 2


def test_grid_shows_every_variant_of_the_same_images(done):
    rows = np.asarray(Image.open(done / "grid.png"))
    assert rows.shape == (len(VARIANTS) * (SIZE + 2) + 2, 8 * (SIZE + 2) + 2, 3)
    for row, name in enumerate(VARIANTS):
        top = row * (SIZE + 2) + 2
        shown = rows[top : top + SIZE, 2 : SIZE + 2]
        assert np.array_equal(shown, np.asarray(Image.open(done / name / "00000.png")))


def test_command_line_on_one_process_and_on_two_writes_the_same_bytes(inputs, done, tmp_path):
    launch = ("torchrun", "--nproc_per_node=2", f"--master_port={free_port()}")
    for name, command in (("one", ()), ("two", launch)):
        argv = flags(inputs, FLAGS, output_dir=tmp_path / name, num_workers=1)
        result = run_script(*command, "reconstruction.py", *argv)
        assert result.returncode == 0, result.stderr
        assert result.stdout.count("24 images, rows of") == 1
        assert files(tmp_path / name) == files(done)
        for found, expected in zip(
            results(tmp_path / name)["results"], results(done)["results"], strict=True
        ):
            assert list(found) == list(expected)
            for key in set(found) - {"name"}:
                assert found[key] == pytest.approx(expected[key], rel=1e-9)


def test_unreadable_image_is_left_out_and_no_other_takes_its_place(inputs, done, tmp_path, capfd):
    data = shutil.copytree(inputs / "data", tmp_path / "data")
    (data / "train" / "ant" / "3.png").write_bytes(b"broken")
    reconstruct(inputs, tmp_path / "out", image_dir=data, skip_bad_images=True, num_workers=1)
    assert capfd.readouterr().err.count("skipped: ") == 1
    expected = [f"{i:05d}.png" for i in range(24) if i != 3]
    for name in VARIANTS:
        assert sorted(path.name for path in (tmp_path / "out" / name).iterdir()) == expected
        others = np.delete(pixels(done / name), 3, axis=0)
        assert np.abs(pixels(tmp_path / "out" / name) - others).max() <= 1
    assert results(tmp_path / "out")["images"] == 23


def test_folder_of_classes_will_do(inputs, done, tmp_path):
    reconstruct(inputs, tmp_path, image_dir=inputs / "data" / "train")
    assert files(tmp_path) == files(done)


def test_first_images_of_each_class_are_taken(inputs, done, tmp_path):
    reconstruct(inputs, tmp_path, images_per_class=2, bits=[-1])
    chosen = pixels(done / "original")[[0, 1, 8, 9, 16, 17]]
    assert np.array_equal(pixels(tmp_path / "original"), chosen)
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == [
        "continuous",
        "original",
    ]


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


def test_images_of_a_larger_run_are_not_mixed_in(inputs, tmp_path):
    reconstruct(inputs, tmp_path, bits=[-1])
    reconstruct(inputs, tmp_path, bits=[-1])  # the same run may be repeated
    before = files(tmp_path)
    with pytest.raises(UserError, match="--output_dir .* another run"):
        reconstruct(inputs, tmp_path, bits=[-1], images_per_class=2)
    assert files(tmp_path) == before


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


def test_pixels_are_rounded_and_clipped():
    found = to_uint8(torch.tensor([-2.0, -1.0, -0.9999, 0.0, 0.0041, 1.0, 2.0]))
    assert found.tolist() == [0, 0, 0, 128, 128, 255, 255]
