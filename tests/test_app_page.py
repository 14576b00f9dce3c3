"""Somebody clicks through the page of demo/app.py, started as a user starts it."""

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


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return make_place(tmp_path_factory.mktemp("page"))


@pytest.fixture(scope="module")
def server(place):
    """The address of the page; in the end it stops when asked to, and has met no error."""
    port, log = free_port(), place / "page.log"
    command = [sys.executable, ROOT / "demo" / "app.py", "--resume", "run", "exported"]
    command += ["--port", port, "--device", "cpu", "--seed", "3"]
    env = environment(http_proxy="http://127.0.0.1:9", https_proxy="http://127.0.0.1:9")
    with open(log, "w") as file:
        words = [str(part) for part in command]
        process = subprocess.Popen(words, cwd=place, env=env, stdout=file, stderr=file)
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
    with chromium() as browser:
        yield browser


@pytest.fixture
def page(server, browser):
    """The page, opened; fails in the end if it fetched anything elsewhere or met an error."""
    wrong, found = [], browser.new_page(viewport={"width": 1280, "height": 900})

    def watch(request):
        if not request.url.startswith((server, "data:", "blob:")):
            wrong.append(request.url)

    found.on("pageerror", lambda error: wrong.append(str(error)))
    found.on("console", lambda m: wrong.append(m.text) if m.type == "error" else None)
    found.on("request", watch)
    found.set_default_timeout(60_000)
    found.goto(server)
    found.locator("#facts", has_text="parameters").wait_for()
    found.get_by_text("ant (0)").wait_for()
    yield found
    found.close()
    assert wrong == []


def message(page) -> str:
    """What pops up; it is closed."""
    toast = page.locator(".toast-body").first
    toast.wait_for()
    text = toast.inner_text()
    toast.locator(".toast-close").click()
    return text


def test_images_appear_step_by_step_and_are_those_of_generate(page, place):
    status = page.locator("#status")
    page.locator("#generate").click()
    for text in ("Iteration", "Done: 6 of 6, 16 of 16 positions filled"):
        status.get_by_text(text).wait_for()
    model, vae = TokenBridge.from_pretrained(place / "exported"), load_vae(place / "vae.ckpt")
    settings = dict(num_iter=6, cfg=2.0, temperature=0.5, seed=3)
    expected = generate(model, vae, [0, 1, 2, 0], **settings)
    call = page.locator("#call .cm-content").inner_text().replace("\n", "")
    again = eval(call, {"generate": generate, "model": model, "vae": vae})
    assert np.array_equal(again, expected)
    images = page.locator("#Image .grid-container img")
    page.wait_for_function("() => document.querySelectorAll('#Image img').length == 4")
    captions = page.locator("#Image .caption-label").all_inner_texts()
    assert [caption.strip() for caption in captions] == [*CLASSES, CLASSES[0]]
    png = page.request.get(images.nth(1).get_attribute("src")).body()
    (place / "shown.png").write_bytes(png)
    shown = np.asarray(Image.open(place / "shown.png"))
    assert np.array_equal(shown[::16, ::16], expected[1])


def test_drawing_can_be_stopped(page):
    page.get_by_text("More", exact=True).click()
    page.get_by_label("number input for Seconds to take, to watch").fill("20")
    page.keyboard.press("Tab")
    page.locator("#generate").click()
    page.locator("#status").get_by_text("Iteration").wait_for()
    page.locator("#stop").click()
    page.locator("#status").get_by_text("Stopped. Iteration").wait_for()
    page.set_viewport_size({"width": 360, "height": 800})  # a phone does not scroll sideways
    assert page.evaluate("document.documentElement.scrollWidth") <= 360


def test_a_picture_is_painted_over_and_drawn_anew_there(page, place):
    page.get_by_role("tab", name="Edit").click()
    page.locator("#edit").click()
    assert "no picture" in message(page)
    page.locator("#editor input[type=file]").first.set_input_files(place / "photo.png")
    page.locator("#editor").get_by_label("Brush", exact=True).wait_for()
    page.wait_for_timeout(1000)  # until the picture is on the canvas
    box = page.locator("#editor canvas").first.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + 30, y + 10, steps=8)
    page.mouse.up()
    page.wait_for_timeout(1000)  # until the page has sent it
    page.locator("#edit").click()
    page.locator("#edited-status").get_by_text("Done:").wait_for()
    call = page.locator("#edited-call").inner_text()
    assert "edit(model, vae, image, mask, [0, 1, 2, 0], " in call


def test_a_picture_is_taken_apart_and_what_is_none_is_told(page, place):
    page.get_by_role("tab", name="Reconstruct").click()
    remove = page.locator("#picture button[aria-label*=emove], #picture button[aria-label=Clear]")
    page.locator("#photos").get_by_text("china").click()
    page.locator("#pictures").get_by_text("Original").first.wait_for()
    remove.click()
    page.locator("#picture input[type=file]").set_input_files(place / "photo.png")
    for text in ("Original", "Continuous VAE: ", "2 bits, ", "3 bits, ", "4 bits, "):
        page.locator("#pictures").get_by_text(text).first.wait_for()
    remove.click()
    page.locator("#picture input[type=file]").set_input_files(place / "damaged.png")
    assert "damaged.png" in message(page)
