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
    *("Real and generated", "Mistakes", "Figures", "Training", "Validation loss"),
    *("Images over time", "Use of the levels", "Evaluation", "Reconstruction"),
    *("Configuration", "Environment", "Time"),
]


@pytest.fixture(scope="module")
def opened():
    """The page in the browser; fails if anything went wrong there."""
    with chromium() as browser:
        page, wrong = browser.new_page(viewport={"width": 1280, "height": 900}), []
        page.on("console", lambda message: wrong.append(message.text))
        page.on("requestfailed", lambda request: wrong.append(request.url[:100]))
        page.goto((DEMO / "report.html").as_uri(), wait_until="load")
        yield page
        assert wrong == []


def rows(page, title: str) -> list[str]:
    section = page.locator("section", has=page.get_by_role("heading", name=title, exact=True))
    return section.locator("tr:has(td)").all_inner_texts()


def test_every_section_says_something_in_figures(opened):
    assert opened.locator("section > h2").all_inner_texts() == SECTIONS
    assert all(len(text) > 20 for text in opened.locator("section").all_inner_texts())
    cards = opened.locator(".cards strong").all_inner_texts()
    assert len(cards) == 4 and all(re.search(r"\d", card) for card in cards)
    figures = [re.findall(r"\t[\d.]+", row) for row in rows(opened, "Figures")]
    assert [len(values) for values in figures] == [2, 2, 2, 2]
    assert len(rows(opened, "Time")) == STAGES  # without the report's own, with the sum


def test_every_picture_is_drawn_and_none_is_empty(opened):
    sources = opened.locator("img").evaluate_all("images => images.map(i => i.src)")
    assert len(sources) > 20
    for source in sources:
        pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(source.split(",", 1)[1]))))
        assert np.ptp(pixels) > 50
    assert opened.locator("svg").count() > 10
