"""Headless Chromium for tests of pages. Where it is missing they are skipped; in CI they fail."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@contextmanager
def chromium() -> Iterator:
    """A browser of playwright."""
    if CHROMIUM is None:
        if os.environ.get("CI"):
            pytest.fail("no chromium, which .ci/run installs: apt-get install chromium")
        pytest.skip("no chromium: apt-get install chromium")
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()
