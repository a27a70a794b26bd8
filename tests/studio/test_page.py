"""The studio in a real browser: play, switch, fork, choose, undo, rate, and how it looks.

Screenshots lie in the test's folder, or in that of KVPO_SCREENSHOTS. Without Playwright or a
Chromium these tests skip (`browsing`).
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from browsing import TOKEN, serving, shoot, shoot_narrow, status, type_number
from tiny import BLUE, RED

from kvpo.studio.library import Library, read_preferences
from kvpo.studio.server import new_app
from kvpo.studio.shared import Studio


@pytest.fixture
def address(pipeline, tmp_path) -> Iterator[str]:
    """A studio with the tiny generator, behind a real server on a free port."""
    with ThreadPoolExecutor(1) as worker:
        studio = Studio(pipeline, "tiny", Library(tmp_path / "studio"), worker, 40, 20, 2**26)
        studio.branches = 3
        with serving(new_app(studio, TOKEN)) as found:
            yield found


def play_to(page, block: int) -> None:
    page.wait_for_selector(f".block[data-number='{block}']")


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
    type_number(page, "#fork-window", 2)
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
    shoot_narrow(page, tmp_path, "narrow")

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
