"""The pages that `make demo ARGS=--quick` and `make gallery ARGS=--quick` left.

Not in `make test`; tests/test_report.py opens one.

python -m pytest tests/check_demo.py
"""

import base64
import io
import re

import numpy as np
import pytest
from PIL import Image

from tests.conftest import ROOT, chromium

PAGES = [ROOT / "output" / f"{name}-quick" / "report.html" for name in ("demo", "gallery")]
pytestmark = pytest.mark.parametrize("path", PAGES, ids=lambda path: path.parent.name)
STAGES = 10
SECTIONS = [
    *("Real and generated", "Figures", "Training", "Validation loss"),
    *("Images over time", "Use of the levels", "Evaluation", "Reconstruction"),
    *("Configuration", "Environment", "Time"),
]


def test_the_page_of_the_demo_has_every_part_and_no_empty_picture(path):
    html = path.read_text()
    parts = dict(re.findall(r"<section.*?<h2>(.*?)</h2>(.*?)</section>", html, flags=re.DOTALL))
    assert list(parts) == SECTIONS
    assert [text for text in parts.values() if not re.search("<svg|<img|<td>", text)] == []
    assert len(re.findall(r"<td>[\d.]+%?</td>", parts["Figures"])) == 4 * 2
    assert len(re.findall(r"<td>\d+</td>", parts["Time"])) == STAGES  # the sum, not the report's
    pictures = re.findall(r'src="data:image/\w+;base64,([^"]*)"', html)
    assert len(pictures) > 20 and html.count("<svg") > 10
    for picture in pictures:
        assert np.ptp(np.asarray(Image.open(io.BytesIO(base64.b64decode(picture))))) > 50


def test_the_page_opens_on_a_phone_without_an_error(path):
    with chromium() as browser:
        page, wrong = browser.new_page(viewport={"width": 360, "height": 800}), []
        page.on("console", lambda message: wrong.append(message.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.goto(path.as_uri())
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        assert wrong == []
