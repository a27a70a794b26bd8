"""Stand-ins for the studio's long work: plain Python processes that leave what the commands leave."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from starlette.testclient import TestClient
from tabs import OURS, TOKEN

from kvpo.common.video import write_mp4
from kvpo.preference.bradley_terry import Scale
from kvpo.preference.fit import Fitted
from kvpo.preference.saved import save
from kvpo.preference.validation import LIFE, Model, Option
from kvpo.studio.learning import Learning
from kvpo.studio.panes import Panes
from kvpo.studio.programs import Programs
from kvpo.studio.runs import Runs

NUMBERS = {
    "accuracy": 0.82,
    "interval": [0.7, 0.9],
    "judged": 60,
    "log_loss": 0.42,
    "chance_log_loss": 0.693,
    "bins": [
        {"from": 0.5, "to": 0.6, "comparisons": 0, "sure": None, "right": None},
        {"from": 0.9, "to": 1.0, "comparisons": 25, "sure": 0.94, "right": 0.92},
    ],
    "by_rater": {"Ada": {"answers": 60, "accuracy": 0.82}},
    "answers": 62,
    "stories": 10,
    "ties": 2,
    "spoilt_won": {"frozen": 1.0, "blank": 1.0},
    "agreement": {"compared": 0, "same": None},
}
COPY = "import shutil, sys; shutil.copytree(sys.argv[1], sys.argv[2], dirs_exist_ok=True)"
REFUSE = "import sys; print('measuring'); print('kvpo preference: 3 answers are too few; give more'); sys.exit(1)"
TRAIN = """
import json, pathlib, signal, sys, time
out, steps = pathlib.Path(sys.argv[1]), 200
out.mkdir(parents=True, exist_ok=True)
stopped = []
signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
(out / "config.resolved.yaml").write_text(f"steps: {steps}\\nobjective: {{kind: tve_ppo}}\\nrewards:\\n- {{name: 'preference:/x/taste'}}\\n")
log = (out / "metrics.jsonl").open("a")
for step in range(steps):
    facts = {"step": step, "unix_time": time.time(), "loss/kl": step / 100, "reward/local/preference-taste/mean": 0.5 + step / 1000}
    log.write(json.dumps(facts) + "\\n"); log.flush()
    for _ in range(20):
        if stopped: break
        time.sleep(0.02)
    if stopped: break
(out / "checkpoints" / "step-000001").mkdir(parents=True, exist_ok=True)
(out / "checkpoints" / "step-000001" / "state.json").write_text("{}")
print(f"stopped by SIGTERM; {step} steps are done and saved. Go on by the same command with --resume")
"""
FINISH = "import pathlib, sys; pathlib.Path(sys.argv[1], 'report.html').write_text('<!doctype html><title>report</title>')"


@dataclass(frozen=True)
class Fakes(Programs):
    """Programs that take no time; ``template`` has what a fit and a comparison would make."""

    template: Path = Path()
    refuses: bool = False
    program: tuple[str, ...] = (sys.executable, "-I", "-S", "-c")

    def fit(self, folder: Path, out: Path) -> list[str]:
        what = (REFUSE,) if self.refuses else (COPY, str(self.template / "taste"), str(out))
        return [*self.program, *what]

    def align(self, recipe: Path, out: Path) -> list[str]:
        return [*self.program, TRAIN, str(out), str(recipe)]

    def resume(self, run: Path) -> list[str]:
        return [*self.program, FINISH, str(run)]

    def compare(self, run: Path, seed: int, out: Path) -> list[str]:
        return [*self.program, COPY, str(self.template / "blind"), str(out)]


def write_template(folder: Path, pairs: int = 4) -> Path:
    """What the real commands would write: a preference, and the videos of a comparison."""
    names = ("frames.brightness", "frames.motion")
    scale = Scale(np.zeros(2), np.ones(2), np.full(2, 4.0))
    model = Model(Option(("frames",), 0.1), scale, np.array([1.0, 0.5]), dict(LIFE))
    save(folder / "taste", Fitted(model, names, {}, NUMBERS), {"raters": ["Ada"]})
    page = folder / "blind" / "page"
    for pair in range(pairs):
        for side, level in (("left", 80), ("right", 160)):
            frames = torch.full((8, 3, 32, 32), level + 10 * pair, dtype=torch.uint8)
            frames[:, 0, 8:16, 8:16] = 255
            write_mp4(page / f"{pair:03d}-{side}.mp4", frames, 16)
    key = {
        "study": "x",
        "a": "trained",
        "b": "start",
        "pairs": [
            {"script": f"s{i}", "seed": 7, "left": "ab"[i % 2], "prompts": ["a"]}
            for i in range(pairs)
        ],
    }
    (folder / "blind" / "key.json").write_text(json.dumps(key))
    (page / "index.html").write_text("")
    return folder


def new_panes(folder: Path, **changes: Any) -> Panes:
    """Both panes of a folder, with stand-ins for the long work."""
    template = folder / "template"
    if not template.exists():
        write_template(template)
    runs = Runs(folder / "runs")
    programs = Fakes(template=template, **changes)
    return Panes(Learning(folder / "studio", runs, "mini", programs=programs), runs)


def wait_for(true: Callable[[], Any], seconds: float = 60.0) -> Any:
    """Wait until something is true, and give it."""
    ends = time.monotonic() + seconds
    while not (found := true()):
        assert time.monotonic() < ends, "it took too long"
        time.sleep(0.05)
    return found


def ask(client: TestClient, do: str, **what: Any) -> Any:
    """Ask for work as the page does."""
    return client.post(f"/{TOKEN}/learn/{do}", json=what, headers=OURS)


def finish(learning: Learning) -> None:
    """End what still runs, and wait for it."""
    for process in learning.children._started.values():
        process.kill()
        process.wait()
