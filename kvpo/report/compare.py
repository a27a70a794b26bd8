"""Several runs side by side: what each gained and what it cost, in a table and on one page.

Gains are those of each run's own evaluation against its start weights, so runs can be set beside
each other where their evaluations ask for the same scripts with the same noise. Where they do not,
the page says so first.
"""

from __future__ import annotations

import html
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvpo.common.files import write_atomic
from kvpo.common.metric_log import read_metrics
from kvpo.common.pictures import html_video
from kvpo.evaluation.intervals import TOTAL
from kvpo.pages import html as page
from kvpo.pages.render import render
from kvpo.report.curves import Line, distinct, figure
from kvpo.report.read_run import Missing, Row, Sample, read_config, read_evaluation, read_samples

WEIGHTS = ("ema", "online")
"""Weights whose gain is shown: the first of these that a run has evaluated."""
UNINTERESTING = ("steps", "patience", "show_every", "checkpoint", "device")
"""Settings that differ between runs for reasons that are no part of a method."""
MAX_STORIES = 4
"""Largest number of stories whose videos are shown side by side."""


@dataclass(frozen=True)
class Gain:
    """Differences from the start weights that one evaluation found."""

    step: int
    rows: Mapping[str, Row]
    asked: tuple[Any, ...]
    """Facts that must be equal where two evaluations are compared: scripts, seed, videos of each."""


@dataclass(frozen=True)
class Compared:
    """One run, as far as a comparison needs it."""

    name: str
    config: Mapping[str, Any]
    gains: tuple[Gain, ...]
    """By step, ascending; at least one."""
    seconds: float
    """Wall time of its training steps; NaN where it was not logged."""
    calls: float
    """Network calls of its training steps, counted on one rank; likewise."""
    clock: Mapping[int, float]
    """Step -> wall time of training until then, seconds."""
    samples: tuple[Sample, ...]

    @property
    def last(self) -> Gain:
        return self.gains[-1]

    @property
    def method(self) -> str:
        """Objective and explorer; runs from before there were several name no kind."""
        objective = (self.config.get("objective") or {}).get("kind", "tve_ppo")
        return f"{objective} by {self.config.get('explorer', 'kv_routing')}"


def read_runs(folders: Sequence[Path]) -> list[Compared]:
    """Read the runs, named by their folders.

    ValueError where there are fewer than two, one is given twice, or one has nothing to compare.
    """
    if len(folders) < 2:
        raise ValueError(
            f"{len(folders)} run can not be compared with itself; give two or more folders that `kvpo align` wrote"
        )
    whole = [folder.resolve() for folder in folders]
    twice = [str(f) for f, path in zip(folders, whole) if whole.count(path) > 1]
    if twice:
        raise ValueError(f"{twice[0]} is given twice; give every run once")
    names = [path.name for path in whole]
    if len(set(names)) < len(names):
        names = [str(folder) for folder in folders]
    return [_read(folder, name) for folder, name in zip(folders, names)]


def _read(folder: Path, name: str) -> Compared:
    if not (folder / "config.resolved.yaml").exists():
        raise ValueError(
            f"{folder} is no run's folder: it has no config.resolved.yaml; give the folder that `kvpo align` wrote"
        )
    gains = _gains(folder)
    if not gains:
        raise ValueError(
            f"{folder} has no evaluation of its trained weights against its start; let the run end, or compare the others without it"
        )
    try:
        samples = tuple(read_samples(folder))
    except Missing:
        samples = ()
    records = [r for r in read_metrics(folder / "metrics.jsonl") if "time/total" in r]
    clock, passed = {}, 0.0
    for record in {
        r["step"]: r for r in records
    }.values():  # of a step that was made anew, the last
        passed += record["time/total"]
        clock[int(record["step"]) + 1] = passed
    calls = sum(r.get("calls/generator", math.nan) for r in records) if records else math.nan
    seconds = passed if records else math.nan
    return Compared(name, read_config(folder)[1], gains, seconds, calls, clock, samples)


def _gains(folder: Path) -> tuple[Gain, ...]:
    """A run's evaluations against its start by step, of the first of `WEIGHTS` that it has."""
    for weights in WEIGHTS:
        found = {}
        for path in (folder / "evaluation").glob(f"{weights}-step-*.json"):
            step = path.stem.rpartition("-")[2]
            try:
                rows = {row.component: row for row in read_evaluation(path).rows}
                found[int(step)] = Gain(int(step), rows, _asked(path))
            except ValueError:  # a file that can not be read, or no evaluation by a run
                continue
        if found:
            return tuple(found[step] for step in sorted(found))
    return ()


def _asked(path: Path) -> tuple[Any, ...]:
    data = json.loads(path.read_text(encoding="utf-8"))
    return str(data.get("scripts")), data.get("seed"), data.get("videos", 1)


def warnings(runs: Sequence[Compared]) -> list[str]:
    """Why these runs may not be set beside each other."""
    found = []
    if len({run.last.asked for run in runs}) > 1:
        found.append(
            "These runs were evaluated on different scripts, seeds or numbers of videos: their gains are of different questions."
        )
    for setting in ("pipeline", "rewards", "seed"):
        if len({json.dumps(run.config.get(setting), sort_keys=True) for run in runs}) > 1:
            found.append(f"These runs differ in {setting}, beside the method.")
    if any(run.last.rows.get(TOTAL) and run.last.rows[TOTAL].verdict == "few" for run in runs):
        found.append("Some evaluations have too few scripts to call anything better or worse.")
    found.append(
        "One run has one training seed: intervals are over scripts, and say nothing of what another seed would have given."
    )
    return found


def setting_differences(runs: Sequence[Compared]) -> list[tuple[str, list[str]]]:
    """Settings in which not all runs agree: name, and its value in every run."""
    flat = [_leaves(run.config) for run in runs]
    names = sorted({name for settings in flat for name in settings})
    rows = [(name, [settings.get(name, "–") for settings in flat]) for name in names]
    return [
        (name, values)
        for name, values in rows
        if len(set(values)) > 1 and name.partition(".")[0] not in UNINTERESTING
    ]


def _leaves(value: Any, name: str = "") -> dict[str, str]:
    """Dotted name -> its value as text."""
    if not isinstance(value, Mapping):
        return {name: json.dumps(value, ensure_ascii=False)}
    found: dict[str, str] = {}
    for key, inner in value.items():
        found |= _leaves(inner, f"{name}.{key}" if name else str(key))
    return found


def components(runs: Sequence[Compared]) -> list[tuple[str, str]]:
    """(component, kind) of everything that all runs evaluated, the total first."""
    first = runs[0].last.rows
    return [
        (name, row.kind) for name, row in first.items() if all(name in r.last.rows for r in runs)
    ]


def text_table(runs: Sequence[Compared]) -> str:
    """The comparison for a terminal: a row a run."""
    shared = components(runs)
    head = ["run", "method", "updates", "wall time", "calls", *(name for name, _ in shared)]
    rows = [
        [
            run.name,
            run.method,
            str(run.last.step),
            page.seconds(run.seconds),
            page.num(run.calls),
            *(_gain_text(run.last.rows[name]) for name, _ in shared),
        ]
        for run in runs
    ]
    widths = [max(map(len, column)) for column in zip(head, *rows)]
    lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths)).rstrip() for row in (head, *rows)]
    return "\n".join(lines)


def _gain_text(row: Row) -> str:
    return f"{page.num(row.diff, sign=True)} [{page.num(row.low, sign=True)}, {page.num(row.high, sign=True)}]"


def write_comparison(runs: Sequence[Compared], out: Path) -> Path:
    """Write the page to ``out``; returns its path."""
    parts = {
        "Gains": _gains_table(runs),
        "Gain against cost": _charts(runs),
        "Settings that differ": _settings(runs),
        "The same stories and seeds": _videos(runs),
    }
    text = render(
        "report.html",
        title="Comparison - KVPO",
        kicker="KVPO comparison",
        name=", ".join(run.name for run in runs),
        facts=f"{len(runs)} runs side by side",
        warnings=[line.removesuffix(".") for line in warnings(runs)],
        sections=[{"title": title, "lead": "", "body": body} for title, body in parts.items()],
        written=time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
        command="kvpo compare",
    )
    return write_atomic(out, text)


def _gains_table(runs: Sequence[Compared]) -> str:
    head = ["run", "updates", "wall time", "network calls"]
    rows = []
    shared = components(runs)
    for name, kind in shared:
        badge = page.SHORT.get(kind, kind)
        head.append(f'{html.escape(name)} <span class="badge {kind}">{html.escape(badge)}</span>')
    for run in runs:
        cells = []
        for name, _ in shared:
            row = run.last.rows[name]
            cells.append(f'<span class="{row.verdict}">{_gain_text(row)}</span>')
        method = f'{html.escape(run.name)} <span class="unit">{html.escape(run.method)}</span>'
        cost = [str(run.last.step), page.seconds(run.seconds), page.num(run.calls)]
        rows.append([method, *cost, *cells])
    return page.table(head, rows) + (
        '<p class="note">Mean difference of the trained weights from the start weights, paired over scripts and seeds, with its 95 % interval. Wall time and network calls are of the training steps, not of evaluations; '
        "wall time depends on what else the machine did.</p>"
    )


def _charts(runs: Sequence[Compared]) -> str:
    """The gain of the trained rewards against updates, and against wall time."""
    by_update, by_time = [], []
    for number, run in enumerate(runs):
        known = [g for g in run.gains if TOTAL in g.rows]
        gains = [0.0, *(g.rows[TOTAL].diff for g in known)]
        steps = [0.0, *(float(g.step) for g in known)]
        by_update.append(Line(run.name, (steps, gains), *distinct(number)))
        if all(g.step in run.clock for g in known):
            minutes = [0.0, *(run.clock[g.step] / 60.0 for g in known)]
            by_time.append(Line(run.name, (minutes, gains), *distinct(number)))
    charts = figure("Gain against updates", by_update, TOTAL)
    if by_time:
        charts += figure("Gain against minutes of training", by_time, TOTAL)
    return f'<div class="charts">{charts}</div>'


def _settings(runs: Sequence[Compared]) -> str:
    found = setting_differences(runs)
    if not found:
        return "<p>None, beside how far the runs went and what they show.</p>"
    rows = [[html.escape(name), *map(html.escape, values)] for name, values in found]
    return page.table(["setting", *(html.escape(run.name) for run in runs)], rows)


def _videos(runs: Sequence[Compared]) -> str:
    """Every run's last video of a story and seed, beside the first run's start weights."""
    trained = [_last_videos(run.samples) for run in runs]
    common = [key for key in trained[0] if all(key in videos for videos in trained)]
    if not common:
        return page.missing("no story and seed was sampled by all of these runs")
    before = {(s.script_id, s.seed): s for s in runs[0].samples if s.which == "start"}
    cards = []
    for key in common[:MAX_STORIES]:
        sides = [("start weights", before[key])] if key in before else []
        sides += [(run.name, videos[key]) for run, videos in zip(runs, trained)]
        shown = "".join(
            f"<figure><figcaption>{html.escape(name)}</figcaption>{html_video(sample.path, name)}</figure>"
            for name, sample in sides
        )
        prompts = "".join(f"<li>{html.escape(text)}</li>" for text in sides[0][1].texts)
        note = f"script {html.escape(key[0])}, seed {key[1]}"
        cards.append(
            f'<div class="pair"><div class="sides">{shown}</div><ol>{prompts}</ol><p class="note">{note}</p></div>'
        )
    return f'<div class="pairs">{"".join(cards)}</div>'


def _last_videos(samples: Sequence[Sample]) -> dict[tuple[str, int], Sample]:
    """(story, seed) -> the last video of trained weights, averaged ones rather than online."""
    ranked = sorted(samples, key=lambda s: (s.step, s.which == "ema"))
    return {(s.script_id, s.seed): s for s in ranked if s.which != "start" and s.step > 0}
