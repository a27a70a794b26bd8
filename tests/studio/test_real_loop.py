"""The whole way through the page with nothing faked: stream, fork, choose, rate, fit, align, judge.

The studio is the command itself, the rater a script that looks at the page's pictures, and takes
those in which more is coloured. The training is short and the evaluations small, so what is asked of them is that
they happen and that the page tells it, and not that anybody would prefer their result.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from browsing import shoot, shoot_narrow, status, type_number

from kvpo.config import load_config, recipe_path, to_dict
from kvpo.preference.records import read_lines
from kvpo.studio.library import read_preferences

RATER = "script"
STORIES = (
    "a small red circle moves right slowly in the night",
    "a large blue square moves up quickly on paper",
    "a small yellow triangle bounces slowly in the night",
    "a large green cross circles slowly on stripes",
    "a small purple square sinks slowly on paper",
)
PAIRS = 6
"""Pairs that are answered of each story's fork, beside the branch that is chosen."""
MINUTES = 60_000
LONG = 20 * MINUTES
"""Milliseconds that a fit, a training or the videos may take on cores that others use as well."""
COLOURED = """async ([ids, times]) => {
  const canvas = document.createElement("canvas"), sums = ids.map(() => 0);
  const pen = canvas.getContext("2d", { willReadFrequently: true });
  for (let i = 0; i < times; i += 1) {
    await new Promise((go) => setTimeout(go, 60));
    ids.forEach((id, k) => {
      const shown = document.querySelector(id);
      Object.assign(canvas, { width: shown.videoWidth || shown.width, height: shown.videoHeight || shown.height });
      pen.drawImage(shown, 0, 0);
      const found = pen.getImageData(0, 0, canvas.width, canvas.height).data;
      for (let j = 0; j < found.length; j += 4) {
        const rgb = [found[j], found[j + 1], found[j + 2]];
        sums[k] += (Math.max(...rgb) - Math.min(...rgb) > 50) / (canvas.width * canvas.height * times);
      }
    });
  }
  return sums;
}"""
"""What the rater sees: share of coloured pixels of some pictures of the page while they play."""


@pytest.fixture
def recipe(tmp_path) -> Path:
    """The miniature's recipe, short: every part of it runs."""
    content = to_dict(load_config(recipe_path("mini")))
    content |= {"steps": 4, "groups": 1}
    content["rewards"] = [r for r in content["rewards"] if r["name"].startswith("world_")]
    content["data"] |= {"blocks": 6, "segments": 2}
    content["rollout"] |= {"branches": 4}
    content["evaluate"] |= {"scripts": 2, "videos": 1, "every": 4}
    content["sentinels"] |= {"every": 0}
    path = tmp_path / "short.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture
def address(tmp_path, recipe) -> Iterator[str]:
    """The command, on a port that is free; ends by ctrl-C."""
    options = ["--port", "0", "--out", tmp_path / "studio", "--runs", tmp_path / "runs"]
    with studio("mini", *options, "--recipe", recipe) as found:
        yield found


@contextlib.contextmanager
def studio(*argv: object) -> Iterator[str]:
    process = subprocess.Popen(
        [sys.executable, "-m", "kvpo", "studio", *map(str, argv)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )
    said: list[str] = []
    assert process.stdout is not None
    try:
        for line in process.stdout:
            said.append(line)
            if match := re.search(r"http://\S+", line):
                yield match[0]
                break
        else:
            pytest.fail("".join(said))
    finally:
        process.send_signal(signal.SIGINT)
        rest, _ = process.communicate(timeout=60)
        print("the studio says:", *said, rest)
    assert process.returncode == 0 and "the studio has ended" in rest


def tell_and_rate(page, number: int, prompt: str, tmp_path: Path) -> None:
    """Tell a story, fork it, answer pairs by keyboard, and go on from the branch that is liked best."""
    page.fill("#prompt", prompt)
    type_number(page, "#seed", number)
    page.click("#new" if number else "#go")
    page.wait_for_selector(f"#fact-seed:text-is('{number}')")  # until then the strip is the old one
    page.wait_for_selector(".block[data-number='5']")
    page.fill("#prompt", "it turns cyan")
    page.click("#go")
    page.wait_for_selector(".block[data-number='8']")
    page.click("#pause")
    status(page, "Paused")
    page.click(".block[data-number='7']")
    type_number(page, "#fork-window", 2)
    type_number(page, "#fork-branches", 4)
    page.click("#fork-go")
    status(page, "Choose a branch")
    page.locator(".branch").nth(1).hover()
    shoot(page, tmp_path, f"real-fork-{number}")
    page.click("#compare")
    for pair in range(PAIRS):
        page.wait_for_selector(f"#pair-hint:has-text('Pair {pair + 1} of')")
        left, right = page.evaluate(COLOURED, [["#pair-left", "#pair-right"], 25])
        page.keyboard.press("ArrowLeft" if left > right else "ArrowRight")
        status(page, "Recorded")
    page.click("#pair-end")
    tiles = [f".branch:nth-child({i + 1}) canvas" for i in range(5)]
    shares = page.evaluate(COLOURED, [tiles, 25])
    page.locator(".branch button").nth(shares.index(max(shares))).click()
    page.wait_for_selector("#fork", state="hidden")
    page.wait_for_selector(".block[data-number='9']")


@pytest.mark.slow
def test_a_taste_goes_all_the_way_through_the_page(address, page, tmp_path):
    """Stories are told and forked, pairs rated by what is seen, the choices fitted, the generator
    aligned to them with its metrics live, and the result judged blindly by the same taste."""
    page.goto(address)
    status(page, "Ready")
    page.fill("#rater", RATER)
    for number, prompt in enumerate(STORIES):
        tell_and_rate(page, number, prompt, tmp_path)
    page.click("#pause")
    shoot(page, tmp_path, "real-story")
    lines, broken = read_preferences(tmp_path / "studio")
    kinds = [line["kind"] for line in lines]
    assert broken == 0 and {line["rater"] for line in lines} == {RATER}
    assert kinds.count("pair") == PAIRS * len(STORIES) and kinds.count("pick") == len(STORIES)

    page.click("nav button:has-text('Learn')")
    page.wait_for_selector(f"#learn-answers:has-text('{len(lines)} answers in 5 stories')")
    page.click("#fit-go")
    page.wait_for_selector("#fit-said:has-text('Fitting')")
    shoot(page, tmp_path, "real-fitting")
    page.wait_for_selector("#fit-stop", state="hidden", timeout=LONG)
    assert page.inner_text("#fit-said") == "", page.inner_text("#fit-said")
    page.wait_for_selector("#taste-facts:has-text('Accuracy, unseen stories')")
    shoot(page, tmp_path, "real-taste")

    page.click("#align-go")
    page.wait_for_selector("#align-said:has-text('Training')")
    page.wait_for_selector("#align-charts svg", timeout=LONG)
    shoot(page, tmp_path, "real-training")
    page.wait_for_selector("#align-said:has-text('Trained.')", timeout=LONG)
    page.wait_for_selector("#align-step:has-text('Step 4 of 4')")
    page.wait_for_selector("#align-report a")
    shoot(page, tmp_path, "real-trained")

    page.click("#compare-go")
    page.wait_for_selector("#blind:visible", timeout=LONG)
    for pair in range(16):
        page.wait_for_selector(f"#blind-hint:has-text('Pair {pair + 1} of 16')")
        page.wait_for_function(
            "() => ['left', 'right'].every((s) => document.getElementById(`blind-${s}`).readyState >= 2)"
        )
        if pair == 1:
            shoot(page, tmp_path, "real-blind")
        left, right = page.evaluate(COLOURED, [["#blind-left", "#blind-right"], 20])
        page.focus("#blind")
        page.keyboard.press("s" if left == right else "ArrowLeft" if left > right else "ArrowRight")
    page.wait_for_selector("#blind-result:has-text('of 16 pairs')")
    print(page.inner_text("#taste-facts"), page.inner_text("#blind-result"), sep="\n")
    shoot(page, tmp_path, "real-result")
    page.emulate_media(color_scheme="dark")
    shoot(page, tmp_path, "real-result-dark")
    page.click("nav button:has-text('Runs')")
    page.wait_for_selector("#run-sides svg")
    shoot(page, tmp_path, "real-runs")
    shoot_narrow(page, tmp_path, "real-runs-narrow")
    page.click("nav button:has-text('Learn')")
    shoot_narrow(page, tmp_path, "real-learn-narrow")
    page.click("nav button:has-text('Stories')")
    shoot_narrow(page, tmp_path, "real-story-narrow")
    assert page.is_hidden("#message"), page.inner_text("#message")

    run = next((tmp_path / "runs").iterdir())
    steps = [value["step"] for _, value in read_lines(run / "metrics.jsonl")[0]]
    assert sorted(set(steps)) == [0, 1, 2, 3]
    answers = json.loads(next((tmp_path / "studio" / "blind").glob("*/answers.json")).read_text())
    assert len(answers["answers"]) == 16 and answers["result"]["answers"] == 16
