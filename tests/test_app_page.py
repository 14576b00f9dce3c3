"""Somebody clicks through the page of demo/app.py, started as a user starts it."""

import base64
import io
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from models.generate import generate
from models.tokenbridge import TokenBridge
from tests.browser import chromium
from tests.conftest import ROOT, environment
from tests.runs import free_port
from tests.test_app import CLASSES, make_place
from util.vae import load_vae

SECONDS = 60_000  # milliseconds at most for anything to appear
# What the stage shows, every time it changes: the iteration and how many positions the map has.
WATCH = """() => { window.seen = []; const look = () => {
  const stage = document.querySelector('#stage .tb-stage[data-step]');
  if (!stage) return;
  const now = [+stage.dataset.step, stage.querySelectorAll('figure:nth-child(2) rect').length];
  if (String(now) !== String(window.seen.at(-1))) window.seen.push(now); };
  new MutationObserver(look).observe(document.querySelector('#stage'),
    {childList: true, subtree: true, attributes: true, characterData: true}); }"""


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return make_place(tmp_path_factory.mktemp("page"))


@pytest.fixture(scope="module")
def server(place):
    """The address of the page, and a list to which all that it prints is added at its end."""
    port, log = free_port(), place / "page.log"
    command = [sys.executable, ROOT / "demo" / "app.py", "--resume", "run", "exported"]
    command += ["--port", str(port), "--device", "cpu", "--seed", "3"]
    env = environment(http_proxy="http://127.0.0.1:9", https_proxy="http://127.0.0.1:9")
    with open(log, "w") as file:
        process = subprocess.Popen(
            [str(part) for part in command], cwd=place, env=env, stdout=file, stderr=file
        )
        try:
            while "open http" not in log.read_text():
                assert process.poll() is None, log.read_text()
                time.sleep(0.1)
            yield f"http://127.0.0.1:{port}/"
            process.terminate()
            assert process.wait(30) == 0
        finally:
            process.kill()
    assert "Traceback" not in log.read_text(), log.read_text()


@pytest.fixture(scope="module")
def browser():
    with chromium() as started:
        yield started


@pytest.fixture
def page(server, browser):
    """The page, opened; fails in the end if it fetched anything elsewhere or met an error."""
    found, wrong = browser.new_page(viewport={"width": 1280, "height": 900}), []
    found.on("pageerror", lambda error: wrong.append(str(error)))
    found.on("console", lambda m: wrong.append(m.text) if m.type == "error" else None)
    found.on(
        "request",
        lambda r: None if r.url.startswith((server, "data:", "blob:")) else wrong.append(r.url),
    )
    found.on("response", lambda r: wrong.append(r.url) if r.status >= 400 else None)
    found.set_default_timeout(SECONDS)
    found.goto(server)
    found.locator("#facts", has_text="parameters").wait_for()
    found.locator("#classes", has_text="ant (0)").wait_for()
    yield found
    found.close()
    assert wrong == []


def told(page) -> str:
    """The message that pops up; it is closed."""
    toast = page.locator(".toast-body").first
    toast.wait_for()
    message = toast.inner_text()
    toast.locator(".toast-close").click()
    toast.wait_for(state="detached")
    assert "Traceback" not in page.content()
    return message


def finished(page) -> None:
    page.locator("#stage .tb-status", has_text="Done").wait_for()


def shown(page) -> np.ndarray:
    """uint8 [N, S, S, 4], the images on the stage."""
    sources = page.eval_on_selector_all("#stage img", "images => images.map(i => i.src)")
    data = [base64.b64decode(source.split(",", 1)[1]) for source in sources]
    return np.stack([np.asarray(Image.open(io.BytesIO(png))) for png in data])


def test_an_image_appears_step_by_step_and_is_the_one_of_generate(page, place):
    page.evaluate(WATCH)
    page.locator("#generate").click()
    finished(page)
    seen = page.evaluate("window.seen")
    steps, filled = zip(*seen, strict=True)
    assert len(seen) >= 4 and list(steps) == sorted(set(steps)) and steps[-1] == 6
    assert list(filled) == sorted(set(filled)) and filled[-1] == 4 * 16
    figures = page.locator("#stage figcaption").all_inner_texts()
    assert figures == ["Image", "Order", "Confidence"]
    assert page.locator("#stage figure:nth-child(3) rect").count() == 4 * 16
    captions = page.locator("#stage figure:nth-child(1) .tb-tile > span").all_inner_texts()
    assert captions == [*CLASSES, CLASSES[0]]
    found = shown(page)
    model, vae = TokenBridge.from_pretrained(place / "exported"), load_vae(place / "vae.ckpt")
    settings = dict(num_iter=6, cfg=2.0, temperature=0.5, seed=3)
    expected = generate(model, vae, [0, 1, 2, 0], **settings)
    assert np.array_equal(found[..., :3], expected) and (found[..., 3] == 255).all()
    with page.expect_download() as download:
        page.locator("#download").click()
    assert download.value.suggested_filename == "ant-bee-red-b-cat-b-x_seed3.png"
    sheet = np.asarray(Image.open(download.value.path()))
    assert np.array_equal(sheet[2:18, 2:18], expected[0])
    recipe = page.locator("#stage .tb-recipe code").text_content()
    again = eval(recipe, {"generate": generate, "model": model, "vae": vae})
    assert np.array_equal(again, expected)


def test_drawing_can_be_stopped_and_begun_again(page):
    page.get_by_text("More", exact=True).click()
    page.locator("#watch input[type=number]").fill("20")
    page.locator("#watch input[type=number]").press("Tab")
    page.locator("#generate").click()
    page.locator("#stage .tb-status", has_text="Iteration").wait_for()
    page.locator("#stop").click()
    page.locator("#stage .tb-status", has_text="Stopped after iteration").wait_for()
    page.locator("#watch input[type=number]").fill("0")
    page.locator("#watch input[type=number]").press("Tab")
    page.locator("#generate").click()
    finished(page)


def test_wrong_settings_are_told_and_the_page_goes_on(page):
    seed = page.locator("#seed input, #seed textarea").first
    seed.fill("abc")
    page.locator("#generate").click()
    assert "seed 'abc' is not a whole number" in told(page)
    page.locator("#another").click()
    page.wait_for_function("e => /^[0-9]+$/.test(e.value)", arg=seed.element_handle())
    classes = page.locator("#classes input")
    classes.fill("bea")
    classes.press("Enter")
    page.locator("#generate").click()
    assert "class 'bea' is unknown" in told(page)
    page.locator("#classes").get_by_label("Clear").or_(page.locator("#classes .remove-all")).click()
    page.locator("#generate").click()
    assert "no class is chosen" in told(page)
    classes.fill("BEE")
    classes.press("Enter")
    page.locator("#generate").click()
    finished(page)


def test_another_checkpoint_can_be_typed_and_a_wrong_one_is_told(page, place):
    checkpoint = page.locator("#checkpoint input")
    checkpoint.fill("/nowhere/model")
    checkpoint.press("Enter")
    assert "'/nowhere/model' does not exist" in told(page)
    page.locator("#generate").click()
    assert "'/nowhere/model' does not exist" in told(page)
    checkpoint.fill(str(place / "damaged.png"))
    checkpoint.press("Enter")
    assert "damaged" in told(page)
    checkpoint.fill(str(place / "exported"))
    checkpoint.press("Enter")
    page.locator("#facts .tb-facts", has_not_text="step 7").wait_for()
    page.get_by_label("raw", exact=True).check()
    assert "holds the ema weights alone" in told(page)


def test_a_photo_is_taken_apart_and_what_is_none_is_told(page, place):
    page.get_by_role("tab", name="Reconstruct").click()
    page.locator("#reconstruct").click()
    assert "no photo yet" in told(page)
    page.locator("#photo input[type=file]").set_input_files(place / "photo.png")
    comparison = page.locator("#comparison")
    comparison.locator(".tb-histogram").wait_for()
    assert comparison.locator("figcaption").all_inner_texts() == [
        *("Original", "Continuous VAE", "Quantized, 3 bits", "Use of the levels")
    ]
    assert comparison.get_by_text("dB PSNR").count() == 2
    assert (
        comparison.locator(".tb-histogram g").count() == 8
        and comparison.locator("polyline").count() == 1
    )
    bits = page.locator("#bits input[type=number]")
    bits.fill("2")
    bits.press("Tab")
    page.locator("#reconstruct").click()
    comparison.get_by_text("Quantized, 2 bits").wait_for()
    assert comparison.locator(".tb-histogram g").count() == 4
    page.locator("#photo").get_by_label("Remove Image").or_(
        page.locator("#photo button[aria-label=Clear]")
    ).first.click()
    page.locator("#photo input[type=file]").set_input_files(place / "damaged.png")
    assert "damaged.png cannot be read as a photo" in told(page)


def test_a_phone_does_not_scroll_sideways(page):
    page.set_viewport_size({"width": 360, "height": 800})
    page.locator("#generate").click()
    finished(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
