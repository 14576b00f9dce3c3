"""The demo's own parts, small and short; `make demo` is the whole of it."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from demo import classifier, digits, emoji, report
from demo import train_vae as vae_training
from models.tokenizers.kl16 import AutoencoderKL
from models.tokenizers.vq import VQModel
from tests.conftest import ROOT
from tests.runs import call, refused, stand_in
from util import fid_stats
from util.errors import UserError
from util.evaluation.extractor import load_extractor
from util.evaluation.metrics import Accumulator, Measure, score
from util.evaluation.reference import compare_with_statistics
from util.vae import load_vae


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """All digits, as the demo writes them."""
    folder = tmp_path_factory.mktemp("digits")
    call(digits.main, "--output", str(folder))
    return folder


@pytest.fixture
def few(data, tmp_path) -> Path:
    """Eight training and four held-out digits of each class."""
    for folder in data.glob("*/*"):
        kept = tmp_path / "data" / folder.relative_to(data)
        kept.mkdir(parents=True)
        for path in sorted(folder.iterdir())[: 8 if folder.parent.name == "train" else 4]:
            shutil.copy(path, kept)
    return tmp_path / "data"


def test_digits_are_small_grey_images_in_class_folders(data):
    counts = {"train": 1437, "val": 360}
    names = {part: [path.name for path in data.glob(f"{part}/*/*.png")] for part in counts}
    assert {part: len(found) for part, found in names.items()} == counts
    assert len({name for found in names.values() for name in found}) == 1797  # none in both
    per_class = [len(list(path.iterdir())) for path in sorted((data / "val").iterdir())]
    assert len(per_class) == 10 and max(per_class) - min(per_class) <= 2
    with Image.open(next(data.glob("val/3/*.png"))) as image:
        assert (image.mode, image.size) == ("L", (32, 32))


@pytest.mark.parametrize("vq", [[], ["--vq"]])
def test_vae_training_is_a_function_of_the_seed_and_its_file_is_read(few, tmp_path, capsys, vq):
    def trained(seed: int) -> torch.Tensor:
        path = tmp_path / f"vae{seed}.ckpt"
        argv = ["--data_path", few, "--output", path, "--steps", 2, "--seed", seed, *vq]
        call(vae_training.main, *map(str, argv))
        vae = load_vae(path, 8)
        assert vae.stride == 8 and vae.encode(torch.zeros(1, 3, 32, 32)).mean.shape[1:] == (8, 4, 4)
        return torch.cat([tensor.flatten() for tensor in vae.state_dict().values()])

    first, again, other = trained(1), trained(1), trained(2)
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert re.search(r"stride 8, [0-9.]+ dB on", capsys.readouterr().out)
    argv = ["--data_path", str(few), "--output", str(tmp_path / "vae.ckpt"), "--img_size", "33"]
    assert "--img_size 33" in refused(capsys, vae_training.main, *argv)
    assert not (tmp_path / "vae.ckpt").exists()


def test_the_tokenizers_that_come_with_the_demo_know_digits_that_they_never_saw(data, few):
    vae = load_vae(ROOT / "demo" / "digits_vq.ckpt", 8).eval().requires_grad_(False)
    images = vae_training.load_part(data, "val", 32)
    assert vae.codebook.shape == (512, 8) and vae.indices(images[:2]).shape == (2, 4, 4)
    assert vae_training.psnr(vae, images) > 27
    assert len(vae.indices(images).unique()) > 480
    vae = load_vae(ROOT / "demo" / "digits_vae.ckpt").eval()
    assert vae_training.psnr(vae, vae_training.load_part(few, "val", 32)) > 29


def test_codes_that_nothing_chooses_are_restarted():
    torch.manual_seed(0)
    vae = VQModel(codebook_size=64, embed_dim=4, ch_mult=(1, 1), ch=32, z_channels=4)
    codebook, z = vae.quantize.embedding.weight, torch.randn(2, 4, 3, 3)
    loss, before = vae_training.VQLoss(len(codebook), steps=10), codebook.detach().clone()
    loss.idle[5:9] = vae_training.PATIENCE
    loss.restart(codebook, z)
    outputs = torch.nn.functional.normalize(z, dim=1).movedim(1, -1).flatten(0, 2)
    assert all(any(torch.equal(code, z) for z in outputs) for code in codebook[5:9])
    others = [i for i in range(64) if not 5 <= i < 9]
    assert torch.equal(codebook[others], before[others]) and not loss.idle.any()


def test_classifier_learns_digits_whose_grey_is_pillow_s(few):
    images, labels = classifier.labelled_images(few / "train")
    model = classifier.train_classifier("digits", images, labels, epochs=20)
    with torch.no_grad():
        predictions = model.output(model.features(model.prepared(images))).argmax(1)
    assert (predictions == labels).float().mean() > 0.9
    pixels = np.random.default_rng(0).integers(0, 256, (2, 40, 40, 3), dtype=np.uint8)
    expected = [np.asarray(Image.fromarray(image).convert("L")) for image in pixels]
    found = classifier.grey(torch.from_numpy(pixels).permute(0, 3, 1, 2))
    assert np.array_equal((found[:, 0] * 255).round().numpy(), np.stack(expected))


@pytest.mark.parametrize(("network", "width"), [("digits", 64), ("emoji", 1280)])
def test_demo_s_distance_comes_from_the_evaluation_s_own_path(few, tmp_path, network, width):
    """Train the judge, make statistics, measure images: the stages of demo/run.sh."""
    name, cpu = "demo.classifier:judge", torch.device("cpu")
    with pytest.raises(UserError, match="demo/classifier.py train"):
        load_extractor(name, None, cpu)
    weights, stats = tmp_path / "classifier.pth", tmp_path / "statistics.npz"
    call(classifier.main, "train", "--root", str(tmp_path), "--epochs", "2", "--network", network)
    argv = ["--image_dir", few / "train", "--output", stats, "--img_size", 32, "--device", "cpu"]
    argv += ["--feature_extractor", name, "--inception_weights", weights, "--num_workers", 0]
    call(fid_stats.main, *map(str, argv))
    extractor = load_extractor(name, str(weights), cpu)
    measure = compare_with_statistics(Measure(extractor), str(stats), 32)
    images, labels = classifier.labelled_images(few / "val")
    sums = Accumulator(extractor.layers)
    sums.update(extractor(images))
    found = score(sums, measure).figures["frechet_distance"]
    judged = classifier.judge(measure, images, images, labels)
    assert judged["frechet"] == pytest.approx(found)
    assert judged["nearest_training_image"] == pytest.approx(0, abs=1e-3)
    assert measure.stats["mu"].shape == (width,)
    assert judged["nearest"] == list(range(len(images)))


STAND_IN = """
echo "$*" >>asked
case "$*" in
*util.export*) [ ! -e fails ] ;;
*demo.report*) touch output/gallery/report.html ;;
esac
"""


def test_an_interrupted_demo_goes_on_and_a_finished_one_begins_anew(tmp_path):
    """demo/run.sh alone: of its commands it is known what was asked for."""
    shutil.copytree(ROOT / "demo", tmp_path / "demo", ignore=shutil.ignore_patterns("*.py"))
    for name in ("python", "torchrun"):
        stand_in(tmp_path / "bin", name, STAND_IN)
    env = {"PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin"}

    def stages() -> tuple[int, int, str]:
        (tmp_path / "asked").unlink(missing_ok=True)
        command = ["bash", "demo/run.sh", "--gallery"]
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
        return done.returncode, (tmp_path / "asked").read_text().count("\n"), done.stdout

    (tmp_path / "fails").touch()
    *done, printed = stages()
    assert done == [1, 4] and "4/10 Export" in printed
    timings = (tmp_path / "output" / "gallery" / "timings.tsv").read_text()
    assert timings.count("\n") == 4 and ", interrupted\t" in timings
    (tmp_path / "fails").unlink()
    *done, printed = stages()
    assert done == [0, 7] and "Going on" in printed and "3/10" not in printed
    *done, printed = stages()
    assert done == [0, 10] and "Going on" not in printed


def test_report_is_the_judge_s_above_that_of_any_run(few, tmp_path):
    """Of 20 digits, two of them mistaken, and not as many of each class."""
    images = tmp_path / "generated" / "point" / "images"
    images.mkdir(parents=True)
    for path in sorted(few.glob("val/*/*.png"))[::2]:
        shutil.copy(path, images / f"{path.parent.name}-{path.name}")
    (images.parent / "metrics.json").write_text('{"metrics": {"frechet_distance": 1.25}}')
    labels = [0, 0, 0, *(i // 2 for i in range(3, 20))]
    figures = {"images": 20, "frechet": 1.5, "nearest_training_image": 0.1, "accuracy": 1}
    generated = figures | {"labels": labels, "predictions": [9, 9, *labels[2:]], "accuracy": 0.9}
    scores = {"held_out": figures, "generated": generated | {"nearest": [3 * i for i in range(20)]}}
    (tmp_path / "scores.json").write_text(json.dumps(scores))
    with SummaryWriter(str(tmp_path / "model")) as writer:
        writer.add_scalar("train/loss", 4, 10)
    (tmp_path / "timings.tsv").write_text("Make <digits>\t3\nTrain\t57\n")
    call(report.main, "--root", str(tmp_path))
    page = (tmp_path / "report.html").read_text()
    assert page.count('src="data:image/png;base64,') == 10 * 2  # strips of classes
    with Image.open(tmp_path / "samples.png") as sheet:
        assert sheet.height == 10 * 32
    titles = re.findall(r"<h2>([^<]*)</h2>", page)
    assert titles[:3] == ["Real and generated", "Figures", "Training"] and titles[-1] == "Time"
    for text in ("90.0%", "1.50", "<td>60</td>", "Make &lt;digits&gt;", "<svg", "<td>1.25</td>"):
        assert text in page, text


def test_gallery_holds_out_emoji_with_all_their_variants(tmp_path):
    counts = emoji.cut(tmp_path)
    assert counts == {"train": 2576, "val": 310}
    held_out = {path.name for path in tmp_path.glob("val/*/*.png")}
    codes = "1F6B5-200D-2640-FE0F", "1F6B5-200D-2642-FE0F", "1F6B5"  # on a mountain bike
    bikes = {emoji.is_held_out(f"{code}-{vendor}") for code in codes for vendor in "ab"}
    assert len(bikes) == 1
    pairs = {name.rsplit("-", 1)[0] for name in held_out}
    assert len(held_out) == 2 * len(pairs) and len(list(tmp_path.glob("train/*"))) == 11
    with Image.open(next(tmp_path.glob("train/face/1F600-noto.png"))) as face:
        assert face.size == (64, 64) and face.convert("RGBA").getpixel((0, 0))[3] == 0
        red, green, blue, alpha = face.convert("RGBA").getpixel((32, 20))
        assert alpha == 255 and red > 200 > blue  # yellow
    vae = load_vae(ROOT / "demo" / "emoji_vae.ckpt", 16).eval()
    both = vae_training.load_part(tmp_path, "val", 64), vae_training.foreground(tmp_path, 64)
    assert vae_training.psnr(vae, *(each[::5] for each in both)) > 24


def test_perceptual_distance_trains_and_the_foreground_alone_counts(tmp_path):
    vae = AutoencoderKL(4, ch=32, ch_mult=(1, 1), num_res_blocks=1)
    images, loss_of = torch.rand(2, 3, 32, 32) * 2 - 1, vae_training.KLLoss(1e-3, 0.1)
    assert loss_of.distance(images, images) == 0 < loss_of.distance(-images, images)
    loss_of(vae, images).backward()
    assert vae.decoder.conv_in.weight.grad.abs().sum() > 0
    for name in ("train", "val"):
        (tmp_path / name / "a").mkdir(parents=True)
        Image.new("RGBA", (8, 8), (9, 9, 9, 0)).save(tmp_path / name / "a" / "0.png")
    assert not vae_training.foreground(tmp_path, 8).any()
