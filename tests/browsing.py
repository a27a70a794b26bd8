"""The studio in a real browser: a server on a free port, a page of a headless browser, pictures of it.

The browser is Chromium, or the Firefox that KVPO_FIREFOX names. Without Playwright or a browser the
tests that ask for a page skip.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from starlette.types import ASGIApp

from kvpo.studio.server import LARGEST_MESSAGE

TOKEN = "secret-token"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chromium-headless-shell")
SLOW = 60_000
"""Milliseconds that anything may take on a machine that does other things as well."""
NARROW = {"width": 380, "height": 800}
OUTSIDE = """[...document.querySelectorAll('section')].filter((section) => section.offsetParent).flatMap((section) => {
  const end = section.getBoundingClientRect().right - parseFloat(getComputedStyle(section).paddingRight) + 1.5;
  return [...section.querySelectorAll('button, input, select, p, dl, svg, video')]
    .filter((e) => !e.closest('.strip, .unseen, [hidden]') && e.getBoundingClientRect().right > end)
    .map((e) => e.id || e.textContent || e.tagName);
})"""
"""What lies beyond the inner edge of its panel; the strip scrolls."""


@contextlib.contextmanager
def serving(app: ASGIApp) -> Iterator[str]:
    """Serve an application whose token is TOKEN; gives the address of its page."""
    import uvicorn

    with socket.create_server(("127.0.0.1", 0)) as listener:
        config = uvicorn.Config(
            app,
            ws="websockets-sansio",
            ws_max_size=LARGEST_MESSAGE,
            log_level="warning",
            timeout_graceful_shutdown=5,
        )
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}/{TOKEN}/"
        finally:
            server.should_exit = True
            thread.join(30)


def browser() -> str | None:
    found = filter(None, map(shutil.which, BROWSERS))
    return os.environ.get("KVPO_CHROMIUM") or next(found, None)


def firefox() -> str | None:
    """An installed Firefox that is to be used; Playwright drives it by WebDriver BiDi."""
    return os.environ.get("KVPO_FIREFOX")


def launched(driver):
    """The browser, started."""
    if firefox():
        return driver.firefox.launch(channel="moz-firefox", executable_path=firefox())
    return driver.chromium.launch(
        executable_path=browser(), args=["--no-sandbox", "--disable-dev-shm-usage"]
    )


@contextlib.contextmanager
def opened_page() -> Iterator:
    """A page of a headless browser; anything that it complains of fails the test."""
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    if firefox() is None and browser() is None:
        pytest.skip("no Chromium in PATH or KVPO_CHROMIUM: apt-get install chromium-headless-shell")
    with playwright.sync_playwright() as driver:
        started = launched(driver)
        page = started.new_page(viewport={"width": 1200, "height": 1000})
        page.set_default_timeout(SLOW)
        complaints: list[str] = []
        page.on("console", lambda m: complaints.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        yield page
        print("the page says:", page.inner_text("#status"), page.inner_text("#message"), complaints)
        started.close()
    # Playwright's pictures of Firefox add a style to the page, which its policy refuses
    own = [text for text in complaints if not (firefox() and "inline style" in text)]
    assert not own


def type_number(page, element: str, value: int) -> None:
    """Type a number over what stands in a field; `fill` appends to numbers in Firefox."""
    page.focus(element)
    page.keyboard.press("Control+a")
    page.keyboard.type(str(value))


def shoot(page, tmp_path: Path, name: str) -> None:
    folder = Path(os.environ.get("KVPO_SCREENSHOTS", tmp_path))
    folder.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=folder / f"{name}.png", full_page=True)


def shoot_narrow(page, tmp_path: Path, name: str) -> None:
    """A picture at phone width in the dark, at which nothing may lie outside."""
    page.emulate_media(color_scheme="dark")
    page.set_viewport_size(NARROW)
    assert page.evaluate("document.documentElement.scrollWidth") <= NARROW["width"]
    assert page.evaluate(OUTSIDE) == []
    shoot(page, tmp_path, name)


def status(page, text: str) -> None:
    page.wait_for_function(
        "text => document.getElementById('status').textContent.includes(text)", arg=text
    )
