"""The studio in a real browser: play, switch, fork, choose, undo, rate, and how it looks.

Screenshots lie in the test's folder, or in that of KVPO_SCREENSHOTS. Without Playwright or a
Chromium these tests skip.
"""

from __future__ import annotations

import os
import shutil
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tiny import BLUE, RED

from kvpo.studio.library import Library, read_preferences
from kvpo.studio.server import LARGEST_MESSAGE, new_app
from kvpo.studio.shared import Studio

TOKEN = "secret-token"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chromium-headless-shell")
SLOW = 60_000
"""Milliseconds that anything may take on a machine that does other things as well."""


def browser() -> str | None:
    found = filter(None, map(shutil.which, BROWSERS))
    return os.environ.get("KVPO_CHROMIUM") or next(found, None)


@pytest.fixture
def address(pipeline, tmp_path) -> Iterator[str]:
    """A studio with the tiny generator, behind a real server on a free port."""
    import uvicorn

    with ThreadPoolExecutor(1) as worker, socket.create_server(("127.0.0.1", 0)) as listener:
        studio = Studio(pipeline, "tiny", Library(tmp_path / "studio"), worker, 40, 20, 2**26)
        studio.branches = 3
        config = uvicorn.Config(
            new_app(studio, TOKEN),
            ws="websockets-sansio",
            ws_max_size=LARGEST_MESSAGE,
            log_level="warning",
            timeout_graceful_shutdown=5,
        )
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/{TOKEN}/"
        server.should_exit = True
        thread.join(30)


@pytest.fixture
def page(tmp_path):
    """A page of headless Chromium; anything that it complains of fails the test."""
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    if browser() is None:
        pytest.skip("no Chromium in PATH or KVPO_CHROMIUM: apt-get install chromium-headless-shell")
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(
            executable_path=browser(), args=["--no-sandbox", "--disable-dev-shm-usage"]
        )
        page = chromium.new_page(viewport={"width": 1200, "height": 1000})
        page.set_default_timeout(SLOW)
        complaints: list[str] = []
        page.on("console", lambda m: complaints.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        yield page
        print("the page says:", page.inner_text("#status"), page.inner_text("#message"), complaints)
        chromium.close()
    assert not complaints


def shoot(page, tmp_path: Path, name: str) -> None:
    folder = Path(os.environ.get("KVPO_SCREENSHOTS", tmp_path))
    folder.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=folder / f"{name}.png", full_page=True)


def play_to(page, block: int) -> None:
    page.wait_for_selector(f".block[data-number='{block}']")


def status(page, text: str) -> None:
    page.wait_for_function(
        "text => document.getElementById('status').textContent.includes(text)", arg=text
    )


def test_a_story_in_the_browser(address, page, tmp_path):
    """Play, switch, pause, fork, look, rate by keyboard, choose, undo, save, reload and replay."""
    page.goto(address)
    status(page, "Ready")
    shoot(page, tmp_path, "begin")
    page.fill("#prompt", RED)
    page.keyboard.press("Enter")
    play_to(page, 2)
    page.fill("#prompt", BLUE)
    page.click("#go")
    page.wait_for_selector(f".prompt:has-text('{BLUE}')")
    play_to(page, 5)
    page.click("#pause")
    status(page, "Paused")
    assert page.inner_text("#fact-first").endswith(" s")
    assert page.inner_text("#fact-rate").endswith("frames/s")
    made = page.locator(".block").count()
    page.focus("#scrub")
    page.keyboard.press("Home")
    page.wait_for_selector(".block[data-number='0'][aria-pressed='true']")
    page.keyboard.press("End")
    page.wait_for_selector(f".block[data-number='{made - 1}'][aria-pressed='true']")

    page.click(".block[data-number='4']")
    page.fill("#fork-window", "2")
    page.click("#fork-go")
    status(page, "Choose a branch")
    assert page.locator(".branch").count() == 4
    page.locator(".branch").nth(0).hover()
    reads = page.locator("#reads-0").inner_text()
    lit = page.evaluate(
        "[...document.querySelectorAll('.block')].flatMap(b => [...b.querySelectorAll('i')].flatMap((t, i) => t.classList.contains('lit') ? [2 * Number(b.dataset.number) + i] : []))"
    )
    assert lit and str(lit[0]) in reads
    shoot(page, tmp_path, "fork")

    page.click("#compare")
    page.keyboard.press("ArrowLeft")
    status(page, "Recorded: left")
    page.keyboard.press("s")
    status(page, "Recorded: same")
    shoot(page, tmp_path, "pair")
    page.click("#pair-end")
    page.get_by_role("button", name="Choose branch 2").focus()
    page.keyboard.press("Enter")
    play_to(page, 7)
    page.click("#pause")
    status(page, "Paused")
    page.wait_for_selector("#tree button[aria-current]:has-text('branch 2 of 3')")

    page.click("#undo")
    page.wait_for_selector("#tree button[aria-current]:has-text('red circle')")
    assert page.locator(".block").count() >= made
    page.click("#tree button:has-text('branch 2')")
    page.wait_for_selector("#tree button[aria-current]:has-text('branch 2 of 3')")
    page.click("#save")
    page.wait_for_selector("#saved:not([hidden])")
    assert page.locator("#message").is_hidden()
    with page.expect_download() as download:
        page.click("#saved")
    assert Path(download.value.path()).read_bytes()[4:8] == b"ftyp"
    shoot(page, tmp_path, "light")
    page.emulate_media(color_scheme="dark")
    shoot(page, tmp_path, "dark")
    page.set_viewport_size({"width": 380, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= 380
    shoot(page, tmp_path, "narrow")

    page.reload()
    status(page, "Ready")
    page.click("#stories button")
    page.wait_for_selector("#message:not([hidden])")
    said = page.inner_text("#message")
    assert said.endswith("as before, bit for bit."), said
    (left, same, pick), broken = read_preferences(tmp_path / "studio")
    assert (left["answer"], same["answer"], pick["chosen"], broken) == ("left", "same", 1, 0)


def test_prompts_are_text(address, page, tmp_path):
    """Markup in a prompt is shown as it was typed; a refusal is said, and the page goes on."""
    page.goto(address)
    status(page, "Ready")
    page.fill("#prompt", "<img src=x> <b>zzz</b>")
    page.click("#go")
    page.wait_for_selector("#message:has-text('knows no word')")
    page.fill("#prompt", f"{RED} <b>zzz</b>")
    page.click("#go")
    page.wait_for_selector("#message.note:has-text('the generator does not know')")
    play_to(page, 0)
    page.click("#pause")
    assert "<b>zzz</b>" in page.locator(".prompt").first.inner_text()
    assert page.locator(".prompt b").count() == 0


def test_a_lost_studio_is_gone_on_with(address, page):
    """The connection breaks in the middle: the page comes back and replays its story."""
    page.add_init_script(
        "window.WebSocket = class extends WebSocket { constructor(a) { super(a); window.last = this; } }"
    )
    page.goto(address)
    status(page, "Ready")
    page.fill("#prompt", RED)
    page.click("#go")
    play_to(page, 1)
    page.evaluate("window.last.close()")
    page.wait_for_selector("#message:has-text('bit for bit')")
    page.click("#pause")
    there = page.locator(".block").count()
    play_to(page, there)
