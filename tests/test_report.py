"""The page about a run: whole, self-contained, true to what the folder holds, and safe to open."""

import argparse
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from tests.conftest import chromium
from tests.measures import PIXELS
from tests.runs import call, evaluate, refused, train, use
from tests.test_latent_cache import Trap
from util.report import __main__ as report
from util.report import page, sections
from util.report.load import load


@pytest.fixture(scope="module")
def whole(inputs, tmp_path_factory) -> Path:
    """A folder of a training, a sweep of four points and a reconstruction."""
    root = tmp_path_factory.mktemp("whole") / "run <1>"
    validation = dict(preview_freq=1, preview_images=2, preview_iter=1, holdout=4, log_freq=1)
    train(inputs, root / "model", vae_path="vae.ckpt", **validation)
    points = dict(cfg=[1.0, 2.0], temperature=[0.5, 1.0], num_images=30, eval_bsz=10)
    points |= dict(feature_extractor=PIXELS, fid_reference=inputs / "data", num_workers=0)
    evaluate(inputs, root / "drawn", root / "model", **points)
    use("reconstruct", inputs, bits=[-1, 4, 2], output_dir=root / "reconstructed")
    return root


def made(root: Path) -> str:
    call(report.main, str(root))
    return (root / "report.html").read_text()


@pytest.fixture(scope="module")
def html(whole) -> str:
    return made(whole)


def log(folder: Path, tag: str) -> None:
    with SummaryWriter(str(folder)) as writer:
        writer.add_scalar(tag, 1.0, 1)


def test_page_loads_nothing_and_holds_every_part(whole, html):
    assert not re.search(r"https?://|<link|<script|@import|url\((?!#)|src=\"(?!data:)", html)
    assert re.findall(r"<h2>([^<]*)</h2>", html) == [
        *("Training", "Validation loss", "Images over time", "Use of the levels"),
        *("Evaluation", "Reconstruction", "Configuration", "Environment"),
    ]
    assert len(re.findall(r'src="data:image/(png|jpeg);base64,', html)) == 3 + 5 + 1
    assert "run &lt;1&gt;" in html and "run <1>" not in html
    assert made(whole) == html  # of the same files the same page


def test_curves_are_what_was_logged(whole, monkeypatch):
    """By the titles of their charts and their own names."""
    curves = {}

    def chart(title, points, *_, **__):
        curves[title] = {name: list(values) for name, values in points.items()}

    monkeypatch.setattr(sections, "chart", chart)
    sections.sections(load(whole))
    scalars = load(whole).trainings["model"].scalars
    assert curves["loss"] == {
        "training": scalars["train/loss"],
        "validation, raw weights": scalars["validation/loss_raw"],
        "validation, averaged weights": scalars["validation/loss_ema"],
    }
    assert [step for step, _ in curves["loss"]["training"]] == [1, 2, 3, 4]
    assert list(curves["by channel, raw weights"]) == ["00", "01", "02", "03"]
    for points in curves["use of the levels, %"].values():
        assert sum(share for _, share in points) == pytest.approx(100)


def test_tables_of_a_sweep_of_reconstruction_and_of_given_and_default_flags(whole, html):
    records = [json.loads(path.read_text()) for path in whole.glob("drawn/*/metrics.json")]
    distances = [record["metrics"]["frechet_distance"] for record in records]
    (best,) = re.findall(r'<tr class="best">(.*?)</tr>', html)
    assert len(distances) == 4 and f"<td>{page.figure(min(distances))} ± " in best
    results = json.loads((whole / "reconstructed" / "results.json").read_text())["results"]
    psnr = {result["name"]: page.figure(result["psnr"]) for result in results}
    rows = re.findall(r"<tr><td>(bits2|bits4|continuous)</td><td>([\d.]+)</td>", html)
    assert rows == [(name, psnr[name]) for name in ("bits2", "bits4", "continuous")]
    assert "original, continuous, bits4, bits2." in html
    changed, rest = html.split("<h2>Configuration</h2>")[1].split("the other flags")
    assert "<td>--holdout</td><td>4</td>" in changed and "--weight_decay" not in changed
    assert "<td>--weight_decay</td><td>0.02</td>" in rest


def test_environment_has_a_column_for_every_start(inputs, tmp_path):
    train(inputs, tmp_path, epochs=1, save_last_freq=1, log_dir=tmp_path / "elsewhere" / "logs")
    train(inputs, tmp_path, epochs=2, resume="auto", log_dir=tmp_path / "elsewhere" / "logs")
    shutil.move(tmp_path / "elsewhere" / "logs", tmp_path / ".logs")
    assert "<h2>Environment" not in made(tmp_path)
    logs = (tmp_path / ".logs").rename(tmp_path / "elsewhere" / "logs")  # named by --log_dir
    (first, _) = sorted(logs.iterdir(), key=lambda path: path.stat().st_mtime)
    first.rename(first.with_name(first.name.replace("tfevents.", "tfevents.9")))  # read last
    shown = made(tmp_path).split("<h2>Environment")[1]
    assert "<th>from step 0</th><th>from step 3</th>" in shown
    assert torch.__version__.split("+")[0] in shown


def test_wrong_folders_are_one_line_and_what_one_lacks_a_word_why(tmp_path, capsys):
    assert "no such folder" in refused(capsys, report.main, str(tmp_path / "nothing"))
    assert "holds nothing of a run" in refused(capsys, report.main, str(tmp_path))
    (tmp_path / "metrics.json").write_text("{")
    assert "metrics.json cannot be read" in refused(capsys, report.main, str(tmp_path))
    log(tmp_path, "train/loss")
    output = ("--output", str(tmp_path))
    assert "Is a directory" in refused(capsys, report.main, str(tmp_path), *output)
    (tmp_path / "metrics.json").unlink()
    html = made(tmp_path)
    assert "see --holdout" in html and "see --preview_freq" in html and "say the flags" in html
    assert "<h2>Evaluation" not in html and "<h2>Environment" not in html


def test_damaged_parts_are_named_and_the_others_shown(whole, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(whole, copy)
    (point, *_) = sorted(copy.glob("drawn/*/metrics.json"))
    point.write_text('{"metrics": ')
    (copy / "model" / "checkpoint-last.pth").write_bytes(b"PK\3\4 no more")
    for path in copy.glob("model/checkpoint-step*.pth"):
        path.unlink()
    (copy / "reconstructed" / "grid.png").write_bytes(b"\x89PNG")
    (copy / "other").mkdir()
    (copy / "other" / "results.json").write_text('{"results": [{"psnr": 1.0}]}')
    (events,) = copy.glob("model/events*")
    events.write_bytes(events.read_bytes()[:-7])  # killed while it was written
    html = made(copy)
    named = html.split("<h2>Not shown</h2>")[1]
    assert "metrics.json cannot be read" in named and "checkpoint-last.pth cannot" in named
    assert "other cannot be read: KeyError" in named
    assert "grid.png cannot be shown" in html and "--holdout" in html and "training: " in html


def test_checkpoints_are_not_unpickled_and_names_not_html(tmp_path):
    torch.save({"trap": Trap()}, tmp_path / "checkpoint-last.pth")
    evil = "</svg><script>alert(1)</script>"
    record = {"metrics": {evil: 1.0}, "warnings": [evil], "settings": {"cfg": evil}}
    (tmp_path / "metrics.json").write_text(json.dumps(record))
    log(tmp_path, f"train/{evil}")
    html = made(tmp_path)
    assert "checkpoint-last.pth cannot be read" in html
    assert "alert(1)" in html and "<script" not in html
    published = {"args": argparse.Namespace(blr=0.125), "epoch": 3}
    torch.save(published, tmp_path / "checkpoint-last.pth")
    assert "<td>--blr</td><td>0.125</td>" in made(tmp_path)


def test_charts_thin_long_curves_without_what_is_not_finite_and_figures_are_readable():
    points = [(i, float(i * 7919 % 1000)) for i in range(100_000)]
    svg = page.chart("loss", {"a": [(0, float("nan")), *points, (100_000, float("inf"))]})
    assert len(svg) < 30_000 and "a: inf" in svg and "nan" not in svg.lower()
    assert f"a: {page.figure(points[-1][1])}" in page.chart("loss", {"a": points})
    assert "loss: no values" in page.chart("loss", {"a": [(0, float("inf"))]})
    values = [1234567, 0.000012, 2.0, 3.14159, "a", None, [1, 0.5], {"cfg": 2.0}]
    texts = ["1,234,567", "1.2e-05", "2", "3.142", "a", "–", "1, 0.5", "cfg: 2"]
    assert list(map(page.figure, values)) == texts


def test_large_pictures_are_shrunk_and_packed_and_huge_ones_refused(tmp_path, monkeypatch):
    Image.effect_noise((2000, 1000), 100).save(tmp_path / "noise.png")
    assert 'src="data:image/jpeg' in (found := page.picture(tmp_path / "noise.png", "noise"))
    assert 'width="1400" height="700"' in found
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    assert page.picture(tmp_path / "noise.png", "noise").startswith("noise cannot be shown: Image")


def test_page_answers_in_a_browser(whole, html):
    """Nothing fails or is asked for, the newest image comes first, a phone scrolls down alone."""
    with chromium() as browser:
        opened, wrong = browser.new_page(viewport={"width": 360, "height": 800}), []
        opened.on("console", lambda message: wrong.append(message.text))
        opened.on("request", lambda request: wrong.append(request.url))
        opened.goto((whole / "report.html").as_uri())
        width = opened.evaluate("document.documentElement.scrollWidth")
        images = opened.locator("section", has=opened.get_by_role("heading", name="Images over"))
        (first, *_, last) = (image.get_attribute("alt") for image in images.locator("img").all())
    assert [url for url in wrong if not url.startswith(("file:", "data:"))] == [] and width <= 360
    assert first.endswith("after step 4") and last.endswith("after step 1")
