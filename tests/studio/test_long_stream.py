"""A thousand blocks in one page: the memory of the server and that of the page stay where they are."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from browsing import TOKEN, serving, status, type_number
from tiny import RED, with_geometry

from kvpo.studio.library import Library
from kvpo.studio.server import new_app
from kvpo.studio.shared import Studio

STORY = 500
"""Blocks of a story; the tiny generator has positions for 512."""
STORIES = 2
FULL = 250
"""Blocks after which the page holds all it may, 240, and the server all states of its budget."""
BUDGET = 2**22
MINUTES = 60_000


@pytest.fixture
def address(pipeline, tmp_path) -> Iterator[str]:
    """A studio whose blocks pass as fast as the page can draw them."""
    fast = with_geometry(pipeline, fps=2000)
    with ThreadPoolExecutor(1) as worker:
        studio = Studio(fast, "tiny", Library(tmp_path / "studio"), worker, STORY, 20, BUDGET)
        with serving(new_app(studio, TOKEN)) as found:
            yield found


def server_bytes() -> int:
    """Resident memory of this process, in which the server runs."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class PageMemory:
    """What a page of Chromium holds, told by its developer tools after a collection."""

    def __init__(self, page):
        self.tools = page.context.new_cdp_session(page)
        self.tools.send("Performance.enable")

    def __call__(self) -> dict[str, float]:
        self.tools.send("HeapProfiler.collectGarbage")
        found = self.tools.send("Performance.getMetrics")["metrics"]
        metrics = {metric["name"]: metric["value"] for metric in found}
        return {name: metrics[name] for name in ("JSHeapUsedSize", "Nodes", "JSEventListeners")}


@pytest.mark.slow
def test_a_thousand_blocks_take_no_more_memory_than_the_first_ones(address, page):
    """Two stories of 500 blocks, one after the other in one tab: after 240 blocks, which the page
    may keep, neither it nor the server grows."""
    memory = PageMemory(page)
    page.goto(address)
    status(page, "Ready")
    page.fill("#prompt", RED)
    looks = []
    for story in range(STORIES):
        type_number(page, "#seed", story)
        page.click("#new" if story else "#go")
        page.wait_for_selector(f"#fact-seed:text-is('{story}')")
        for block in range(FULL - 1, STORY, 50):
            page.wait_for_selector(f".block[data-number='{block}']", timeout=10 * MINUTES)
            assert page.locator(".block").count() <= 241
            looks.append({"block": story * STORY + block + 1, "server": server_bytes()} | memory())
        page.wait_for_selector("#message:has-text('has 500 blocks')", timeout=MINUTES)
    for look in looks:
        print({name: round(value) for name, value in look.items()})
    first, rest = looks[0], looks[1:]
    assert max(look["server"] for look in rest) < first["server"] + 2**25
    for name in ("JSHeapUsedSize", "Nodes", "JSEventListeners"):
        assert max(look[name] for look in rest) < 1.25 * first[name], name
