"""The panes *Learn* and *Runs* in a real browser, with stand-ins for the long work."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from browsing import TOKEN, serving, shoot, shoot_narrow, status

from kvpo.studio.library import Library, append_line
from kvpo.studio.server import new_app
from kvpo.studio.shared import Studio


@pytest.fixture
def address(pipeline, tmp_path, panes) -> Iterator[str]:
    with ThreadPoolExecutor(1) as worker:
        studio = Studio(pipeline, "tiny", Library(tmp_path / "studio"), worker, 40, 20, 2**26)
        with serving(new_app(studio, TOKEN, panes=panes)) as found:
            yield found


def test_learning_in_the_browser(address, page, panes, tmp_path):
    """Fit, align, leave and come back, stop, compare blindly by keyboard, and the win rate."""
    for story in "abc":
        line = {"kind": "pair", "story": story, "rater": "Ada"}
        append_line(tmp_path / "studio" / "preferences.jsonl", line)
    page.goto(address)
    status(page, "Ready")
    page.fill("#rater", "Ada")
    page.click("nav button:has-text('Learn')")
    page.wait_for_selector("#learn-answers:has-text('3 answers in 3 stories: Ada 3.')")
    assert page.is_disabled("#align-go") and page.is_disabled("#compare-go")
    assert page.is_hidden("#pane-tell")
    page.click("#fit-go")
    page.wait_for_selector("#taste-facts:has-text('82 % (95 % interval 70 % to 90 %)')")
    assert page.inner_text("#taste-bins").split() == ["94", "%", "92", "%", "25"]
    page.click("#align-go")
    page.wait_for_selector("#align-charts svg[aria-label^='KL to the start weights']")
    page.reload()
    page.wait_for_selector("#align-said:has-text('Training')")
    page.fill("#rater", "Ada")
    page.wait_for_selector(".curve[d*='L']")
    shoot(page, tmp_path, "learn")
    page.click("#align-stop")
    page.wait_for_selector("#align-resume:visible")
    page.click("#compare-go")
    page.wait_for_selector("#blind:visible")
    page.wait_for_function("() => document.getElementById('blind-right').readyState >= 2")
    page.focus("#blind")
    page.keyboard.press("ArrowLeft")
    page.wait_for_selector("#blind-hint:has-text('Pair 2 of 4')")
    shoot(page, tmp_path, "blind")
    for place, key in ((3, "ArrowRight"), (4, "s")):
        page.keyboard.press(key)
        page.wait_for_selector(f"#blind-hint:has-text('Pair {place} of 4')")
    assert page.is_hidden("#blind-result")
    page.keyboard.press("ArrowLeft")
    page.wait_for_selector("#blind-result:has-text('of 4 pairs')")
    assert page.evaluate("document.activeElement.id") == "blind-result"
    shoot(page, tmp_path, "learn-light")
    shoot_narrow(page, tmp_path, "learn-narrow")
    page.click("#align-resume")
    page.wait_for_selector("#align-report a")
    assert page.is_hidden("#message")


def write_run(folder, name: str, steps: int, scale: float) -> None:
    run = folder / "runs" / name
    run.mkdir(parents=True, exist_ok=True)
    (run / "config.resolved.yaml").write_text(
        "steps: 60\nobjective: {kind: tve_ppo}\nrewards: [{name: world_vq}]\n"
    )
    with (run / "metrics.jsonl").open("w") as log:
        for step in range(steps):
            facts = {
                f"reward/local/{k}/mean": 0.5 + scale * math.sin(step + i)
                for i, k in enumerate(("VQ", "MQ", "TA"))
            }
            facts |= {
                "loss/kl": scale * step,
                "time/total": 6.0 + step % 3,
                "optim/grad_norm": 1e-5,
            }
            log.write(json.dumps({"step": step, "unix_time": 1.0, **facts}) + "\n")


def test_runs_in_the_browser(address, page, tmp_path):
    """Two runs side by side by keyboard, at one scale; a curve grows; names are text; the report."""
    write_run(tmp_path, "first", 30, 0.1)
    write_run(tmp_path, "second", 10, 0.2)
    page.goto(address + "#runs")
    page.wait_for_selector("#run-sides section")
    page.focus("#run-list button:has-text('first')")
    if page.get_attribute("#run-list button:has-text('first')", "aria-pressed") != "true":
        page.keyboard.press("Enter")
    page.focus("#run-list button:has-text('second')")
    if page.get_attribute("#run-list button:has-text('second')", "aria-pressed") != "true":
        page.keyboard.press("Enter")
    page.locator("#run-sides section").nth(1).wait_for()  # a function in the page would be eval
    tops = page.evaluate(
        "[...document.querySelectorAll('#run-sides section')].map(s => s.querySelector('svg[aria-label^=KL] text').textContent)"
    )
    assert tops == ["2.9", "2.9"]
    write_run(tmp_path, "second", 40, 0.2)
    page.wait_for_selector("#run-list li:has-text('second') :text('step 40 of 60')")
    page.wait_for_selector("svg[aria-label*='KL'][aria-label*='to 40']")
    shoot(page, tmp_path, "runs")
    (tmp_path / "runs" / "first" / "report.html").write_text(
        "<!doctype html><p id=said>report</p><script>document.getElementById('said').textContent = 'script'</script>"
    )
    page.wait_for_selector("#run-sides a")
    with page.context.expect_page() as opened:
        page.click("#run-sides a")
    opened.value.wait_for_load_state()
    assert opened.value.inner_text("#said") == "report"
    opened.value.close()
    shoot_narrow(page, tmp_path, "runs-narrow")
    assert page.is_hidden("#message")
