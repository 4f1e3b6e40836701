"""Headless Chromium for tests of pages; they skip where it or playwright is not installed."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

SCREENSHOTS = Path(__file__).parents[1] / "out" / "screenshots"
"""Kept to be looked at; git leaves the folder alone."""
VIEWS = {"light": ("light", 1200), "dark": ("dark", 1200), "narrow": ("dark", 390)}
"""Colour scheme and width in CSS pixels."""
_ARGUMENTS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)


@contextmanager
def chromium() -> Iterator["Browser"]:
    """Yields a browser, or skips the test."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    executable = shutil.which("chromium") or shutil.which("google-chrome")
    if executable is None:
        pytest.skip("chromium is not installed")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=executable, args=list(_ARGUMENTS))
        try:
            yield browser
        finally:
            browser.close()


def watched_page(browser: "Browser", view: str, problems: list[str]) -> "Page":
    """Returns a page whose errors, and whose requests to anywhere but this machine, are added to `problems`."""
    scheme, width = VIEWS[view]
    page = browser.new_page(
        viewport={"width": width, "height": 900}, color_scheme="dark" if scheme == "dark" else "light"
    )
    page.set_default_timeout(120_000)  # a busy machine scores slowly
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.on("request", lambda request: None if _is_local(request.url) else problems.append(request.url))
    return page


def _is_local(url: str) -> bool:
    return url.startswith(("http://127.0.0.1:", "file://", "data:"))


def keep_screenshot(page: "Page", name: str) -> Path:
    """Saves the whole page as PNG and returns the file; fails if the page is wider than its window."""
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    path = SCREENSHOTS / f"{name}.png"
    page.screenshot(path=path, full_page=True)
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    return path
