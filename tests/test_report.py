"""The page about a run: whole, self-contained, true to what the folder holds, and safe to open."""

import argparse
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from torch.utils.tensorboard import SummaryWriter

import reconstruction
from tests.browser import chromium
from tests.measures import PIXELS
from tests.runs import COMMON, call, evaluate, flags, refused, train
from util.report import __main__ as report
from util.report.charts import POINTS, SIDE, Series, chart, limits, thinned, ticks
from util.report.html import Section, figure, page, picture, table, tabs
from util.report.run import find


@pytest.fixture(scope="module")
def whole(inputs, tmp_path_factory) -> Path:
    """A folder of a training, a sweep of four points and a reconstruction."""
    root = tmp_path_factory.mktemp("whole") / "run <1>"
    looking = dict(preview_freq=1, preview_images=2, preview_iter=1, holdout=4, log_freq=1)
    train(inputs, root / "model", vae_path="vae.ckpt", **looking)
    points = dict(cfg=[1.0, 2.0], temperature=[0.5, 1.0], num_images=30, eval_bsz=10)
    points |= dict(feature_extractor=PIXELS, fid_reference=inputs / "data", num_workers=0)
    evaluate(inputs, root / "drawn", root / "model", **points)
    settings = dict(image_dir="data", vae_path="vae.ckpt", latent_scale=1.0, no_metrics=True)
    settings |= dict(bits=[-1, 2, 4], output_dir=root / "reconstructed")
    call(reconstruction.main, *flags(inputs, COMMON, settings))
    return root


def made(root: Path, *argv: str) -> str:
    call(report.main, str(root), *argv)
    output = Path(argv[argv.index("--output") + 1]) if "--output" in argv else root / "report.html"
    return output.read_text()


@pytest.fixture(scope="module")
def html(whole) -> str:
    return made(whole)


def log(folder: Path, values: dict[int, float], **settings) -> None:
    with SummaryWriter(str(folder), **settings) as writer:
        for step, value in values.items():
            writer.add_scalar("train/loss", value, step)


def series_of(html: str, title: str) -> dict[str, list[list[float]]]:
    """What the page's script knows of a chart: points by the series' name."""
    (found,) = re.findall(
        rf"<figcaption>{re.escape(title)}</figcaption>.*?<script[^>]*>(.*?)</script>", html
    )
    return {one["name"]: one["points"] for one in json.loads(found)["series"]}


# --- the whole


def test_page_loads_nothing_and_holds_every_part(html):
    assert not re.search(r"https?://|<link|@import|url\(|src=\"(?!data:)", html)
    titles = re.findall(r"<h2>([^<]*)</h2>", html)
    assert titles == [
        *("Training", "Held-out loss", "Images over time", "Use of the levels"),
        *("Evaluation", "Reconstruction", "Configuration", "Environment"),
    ]
    for title, link in zip(titles, re.findall(r'<a href="#([^"]*)">', html), strict=True):
        assert f'<section id="{link}"><h2>{title}</h2>' in html
    sources = re.findall(r'src="data:image/(png|jpeg);base64,', html)
    assert len(sources) == 3 + 4 + 1  # previews, grids of the points, reconstructions
    assert "run &lt;1&gt;" in html and "run <1>" not in html


def test_curves_are_what_was_logged(whole, html):
    training = find(whole).trainings[0]
    found = series_of(html, "loss")
    assert list(found) == ["training", "held out, raw weights", "held out, averaged weights"]
    for name, tag in (
        ("training", "train/loss"),
        ("held out, averaged weights", "heldout/loss_ema"),
    ):
        expected = [[step, pytest.approx(v, rel=1e-5)] for step, v in training.scalars[tag]]
        assert found[name] == expected
    assert [step for step, _ in found["training"]] == [1, 2, 3, 4]


def test_channels_stand_in_the_head_s_order_and_in_their_own(whole, html):
    training = find(whole).trainings[0]
    order = training.model["channel_order"]
    charts = re.findall(
        r"<figcaption>held-out loss of each channel</figcaption>.*?<script[^>]*>(.*?)</script>",
        html,
    )
    first, second = map(json.loads, charts)
    assert first["names"] == [str(channel) for channel in order]
    assert second["names"] == ["0", "1", "2", "3"]
    for one, other in zip(first["series"], second["series"], strict=True):
        values = dict(other["points"])
        assert [y for _, y in one["points"]] == [values[channel] for channel in order]


def test_levels_are_shares_of_all_scalars(html):
    found = series_of(html, "use of the levels")
    assert set(found) == {
        *("training data", "generated, raw weights", "generated, averaged weights")
    }
    for points in found.values():
        assert sum(y for _, y in points) == pytest.approx(100, abs=0.01)


def test_sweep_is_a_table_with_the_best_point_marked(whole, html):
    paths = whole.glob("drawn/*/metrics.json")
    distances = [json.loads(p.read_text())["metrics"]["frechet_distance"] for p in paths]
    assert len(distances) == 4 and html.count('<tr class="best">') == 1
    (best,) = re.findall(r'<tr class="best">(.*?)</tr>', html)
    assert f"<td>{figure(min(distances))} ± " in best
    found = series_of(html, "Fréchet distance")
    assert set(found) == {"temperature 0.5", "temperature 1"} or set(found) == {"cfg 1", "cfg 2"}
    drawn = sorted(y for points in found.values() for _, y in points)
    assert drawn == pytest.approx(sorted(distances), rel=1e-5)


def test_reconstruction_goes_from_few_bits_to_none(whole, html):
    results = json.loads((whole / "reconstructed" / "results.json").read_text())["results"]
    psnr = {result["bits"]: result["psnr"] for result in results}
    rows = re.findall(r"<tr><td>(2 bits|4 bits|not quantized)</td><td>([\d.]+)</td>", html)
    assert rows == [
        (name, figure(psnr[bits]))
        for name, bits in (("2 bits", 2), ("4 bits", 4), ("not quantized", -1))
    ]


def test_configuration_tells_what_was_given_from_what_is_default(html):
    changed, rest = html.split("Flags that differ from the defaults")[1].split("the other ")[:2]
    assert "<th>--holdout</th><td>4</td>" in changed and "--weight_decay" not in changed
    assert "<th>weight_decay</th><td>0.02</td>" in rest
    assert "<th>torch</th>" in html.split("<h2>Environment</h2>")[1] or "torch" in html


def test_environment_has_a_column_for_every_start(inputs, tmp_path):
    train(inputs, tmp_path, epochs=1, save_last_freq=1)
    train(inputs, tmp_path, epochs=2, resume="auto")
    shown = made(tmp_path).split("<h2>Environment</h2>")[1]
    assert "<th>from step 0</th><th>from step 3</th>" in shown
    assert torch.__version__.split("+")[0] in shown and "cpu" in shown


# --- parts that are missing, damaged or hostile


def test_wrong_folder_is_one_line(tmp_path, capsys):
    line = refused(capsys, report.main, str(tmp_path / "nothing"))
    assert "no such folder" in line
    (tmp_path / "images").mkdir()
    assert "holds no events" in refused(capsys, report.main, str(tmp_path))
    (tmp_path / "metrics.json").write_text("{")
    assert "metrics.json cannot be read" in refused(capsys, report.main, str(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "metrics.json"]


def test_unwritable_place_is_one_line(tmp_path, capsys):
    log(tmp_path, {1: 4.0})
    root = str(tmp_path)
    line = refused(capsys, report.main, root, "--output", root)
    assert f"--output {root} is a folder" in line
    for length in (250, 300):  # too long with what the unfinished file's is more, and by itself
        line = refused(capsys, report.main, root, "--output", str(tmp_path / ("n" * length)))
        assert "File name too long" in line


def test_flags_of_a_published_checkpoint_are_read(tmp_path):
    saved = {"args": argparse.Namespace(blr=0.125), "epoch": 3}
    torch.save(saved, tmp_path / "checkpoint-last.pth")
    found = find(tmp_path)
    assert not found.left_out and found.trainings[0].flags == {"blr": 0.125}


def test_what_a_folder_lacks_is_left_out_with_a_word_why(tmp_path):
    log(tmp_path, {1: 4.0, 2: 3.0})
    html = made(tmp_path)
    assert "No held-out loss" in html and "No preview images" in html and "Neither a" in html
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
    (events,) = copy.glob("model/events*")
    events.write_bytes(events.read_bytes()[:-7])  # killed while it was written
    html = made(copy)
    left_out = html.split("<h2>Left out</h2>")[1]
    assert "metrics.json cannot be read" in left_out and "checkpoint-last.pth cannot" in left_out
    assert "grid.png cannot be shown" in html
    assert "--holdout" in html and series_of(html, "loss")["training"]


def test_checkpoints_are_not_unpickled_and_names_not_html(tmp_path):
    class Trap:
        def __reduce__(self):
            return Path.touch, (tmp_path / "sprung",)

    torch.save({"trap": Trap()}, tmp_path / "checkpoint-last.pth")
    evil = "</script><script>alert(1)</script>"
    record = {"metrics": {evil: 1.0}, "warnings": [evil], "settings": {"cfg": evil}}
    record |= {"classes": [evil], "settings": {"cfg": evil, "classes": [0]}}
    (tmp_path / "point").mkdir()
    (tmp_path / "point" / "grid.png").write_bytes(b"\x89PNG")
    (tmp_path / "point" / "metrics.json").write_text(json.dumps(record))
    with SummaryWriter(str(tmp_path)) as writer:
        writer.add_scalar(f"train/{evil}", 1.0, 1)
        writer.add_scalar("train/loss", 1.0, 1)
    html = made(tmp_path)
    assert not (tmp_path / "sprung").exists() and "checkpoint-last.pth cannot be read" in html
    assert "\x1b" not in html and "[1m" not in html
    assert "alert(1)" in html and "<script>alert" not in html
    assert len(re.findall(r"</script>", html)) == len(re.findall(r"<script", html))


def test_curves_of_a_killed_run_end_where_it_went_on(tmp_path):
    log(tmp_path, {1: 4.0, 2: 3.0, 3: 9.0, 4: 9.5})
    log(tmp_path, {3: 2.0}, purge_step=3)
    assert find(tmp_path).trainings[0].scalars["train/loss"] == [(1, 4.0), (2, 3.0), (3, 2.0)]


def test_events_elsewhere_are_found_by_the_flag(inputs, tmp_path):
    train(inputs, tmp_path / "out", log_dir=tmp_path / "logs", log_freq=1, epochs=1)
    assert len(series_of(made(tmp_path / "out"), "loss")["training"]) == 3


# --- pieces


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.31, 0.32), (-5, 123456), (1e-9, 3e-9)])
def test_ticks_are_round_and_within(low, high):
    found = ticks(low, high)
    assert 3 <= len(found) <= 11 and low <= found[0] * 1.0000001 and found[-1] <= high * 1.0000001
    steps = {f"{b - a:.6g}" for a, b in zip(found, found[1:], strict=False)}
    assert len(steps) == 1 and steps.pop().lstrip("0.")[0] in "125"


@pytest.mark.parametrize("zero", [False, True])
def test_limits_hold_all_values(zero):
    for values in ([1.0, 2.0], [3.0], [0.0], [-2.0, -1.0]):
        low, high = limits(values, zero)
        assert low < high and low <= min(values) and max(values) <= high
        assert not zero or low <= 0 <= high


def test_thinned_curve_keeps_the_mean_and_the_extremes():
    points = [(i, float((i * 7919) % 1000)) for i in range(3000)]
    kept, band = thinned(points)
    assert len(kept) == len(band) == POINTS
    assert sum(y for _, y in kept) / POINTS == pytest.approx(sum(y for _, y in points) / 3000)
    assert min(low for _, low, _ in band) == 0 and max(high for _, _, high in band) == 999
    assert thinned(points[:10]) == (points[:10], [])


def test_line_spans_the_drawing_in_proportion():
    html = chart("loss", [Series("a", [(0, 4.0), (25, 3.5), (100, 2.0)], "red")])
    (points,) = re.findall(r'<polyline points="([^"]*)"', html)
    (x0, y0), (x1, y1), (x2, y2) = (map(float, point.split(",")) for point in points.split())
    assert (x0, x1, x2) == (0, SIDE / 4, SIDE)
    assert (y1 - y0) / (y2 - y0) == pytest.approx(0.25, abs=1e-3) and 0 < y0 < y2 < SIDE


def test_values_that_are_not_finite_leave_a_gap():
    html = chart("loss", [Series("a", [(0, 1.0), (1, float("nan")), (2, 3.0)], "red")])
    assert "nan" not in html.lower().replace("nano", "") and series_of(html, "loss")["a"] == [
        [0, 1],
        [2, 3],
    ]
    assert "no values" in chart("loss", [Series("a", [(0, float("inf"))], "red")])


@pytest.mark.parametrize(
    ("value", "text"),
    [(1234567, "1,234,567"), (0.000012, "1.2e-05"), (2.0, "2"), (3.14159, "3.142"), ("a", "a")],
)
def test_figures_as_people_read_them(value, text):
    assert figure(value) == text


# --- in a browser


def test_page_answers_in_a_browser(whole, html):
    """No errors, no sideways scrolling on a phone; values under the pointer; slider; legend."""
    with chromium() as browser:
        page, errors = browser.new_page(viewport={"width": 360, "height": 800}), []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("request", lambda request: errors.append(request.url))
        page.goto((whole / "report.html").as_uri())
        errors = [found for found in errors if not found.startswith(("file:", "data:"))]
        width = page.evaluate("document.documentElement.scrollWidth")
        first = page.locator(".chart").first
        first.locator(".plot").hover()
        told = first.locator(".tip").inner_text()
        first.locator(".legend button").first.click()
        hidden = first.locator("svg g").first.is_hidden()
        before = page.locator(".viewer .now").first.inner_text()
        page.locator(".viewer input").first.fill("0")
        after = page.locator(".viewer .now").first.inner_text()
    assert errors == [] and width <= 360
    assert told.startswith("step 2") and "training" in told and hidden
    assert before.startswith("step 4") and after.startswith("step 1")


def test_pieces_are_escaped_where_they_are_text():
    made = page("a<b", "", "", [Section("x & y", table(["h"], [["<b>cell</b>"]]))], "")
    assert "<title>a&lt;b</title>" in made and "<h2>x &amp; y</h2>" in made
    assert 'href="#x---y"' in made and "<td><b>cell</b></td>" in made
    assert tabs([("one", "<p>1</p>")]) == "<p>1</p>"
    with pytest.raises((ValueError, OSError)):
        picture(b"no picture", "")
