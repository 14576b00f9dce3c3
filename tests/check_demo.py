"""The page that `make demo ARGS=--quick` left, read and opened in a browser; not in `make test`.

python -m pytest tests/check_demo.py
"""

import base64
import io
import re

import numpy as np
import pytest
from PIL import Image

from tests.browser import chromium
from tests.conftest import ROOT

DEMO = ROOT / "output" / "demo-quick"
STAGES = 10
SECTIONS = [
    *("Real and generated", "Figures", "Training", "Held-out loss", "Images over time"),
    *("Use of the levels", "Evaluation", "Reconstruction", "Configuration", "Environment", "Time"),
]


@pytest.fixture(scope="module")
def opened():
    """The page in the browser, after its scripts ran; fails if anything went wrong there."""
    with chromium() as browser:
        page, wrong = browser.new_page(viewport={"width": 1280, "height": 900}), []
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda m: wrong.append(m.text) if m.type == "error" else None)
        page.on("requestfailed", lambda request: wrong.append(request.url[:100]))
        page.goto((DEMO / "report.html").as_uri(), wait_until="load")
        yield page
        assert wrong == []


def section(page, title: str):
    return page.locator("section", has=page.get_by_role("heading", name=title, exact=True))


def numbers(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"\d+(?:\.\d+)?", text)]


def test_every_section_is_there_and_says_something(opened):
    assert opened.locator("section > h2").all_inner_texts() == SECTIONS
    assert all(len(text) > 20 for text in opened.locator("section").all_inner_texts())


def test_the_headline_and_the_figures_are_numbers(opened):
    cards = opened.locator(".cards strong").all_inner_texts()
    assert len(cards) == 4 and all(len(numbers(card)) == 1 for card in cards)
    rows = section(opened, "Figures").locator("tbody tr").all_inner_texts()
    figures = {name: numbers(" ".join(values)) for name, *values in (r.split("\t") for r in rows)}
    assert [len(values) for values in figures.values()] == [2, 2, 2, 2], figures


def test_every_stage_has_its_time(opened):
    rows = section(opened, "Time").locator("tbody tr").count()
    assert rows == STAGES  # without the report's own, with the sum
    assert len((DEMO / "timings.tsv").read_text().splitlines()) == STAGES


def test_every_picture_is_drawn_and_none_is_empty(opened):
    pictures = opened.locator("img")
    assert pictures.count() > 20
    assert opened.evaluate("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
    for source in pictures.evaluate_all("images => images.map(i => i.src)"):
        pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(source.split(",", 1)[1]))))
        assert np.ptp(pixels) > 50
    assert section(opened, "Training").locator("svg polyline").count() >= 1
