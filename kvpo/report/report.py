"""The report: a run's folder as one HTML page that opens offline.

It says what training changed, how sure that is, and what it cost.

Every section is made from its own part of the folder. A part that is not there, or cannot be read,
is said to be missing, with the reason, in its section's place: a report of half a run is still a
report.
"""

from __future__ import annotations

import html
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvpo.common.files import write_atomic
from kvpo.common.metric_log import read_metrics
from kvpo.common.metrics import PHASES
from kvpo.pages import html as page
from kvpo.pages.render import render
from kvpo.report import agreement as report_agreement
from kvpo.report import evaluation as report_evaluation
from kvpo.report import guards as report_guards
from kvpo.report import videos as report_videos
from kvpo.report.curves import (
    COLOURS,
    COST_CHARTS,
    POLICY_CHARTS,
    Line,
    Points,
    draw,
    figure,
    series,
    stacked,
)
from kvpo.report.glossary import glossary
from kvpo.report.read_run import (
    Missing,
    read_config,
    read_environment,
    read_evaluations,
    read_group,
    read_samples,
)

RARE = ("checkpoint", "evaluate", "sentinels")
"""Phases of some steps only, beside the step's total.

They would hide the others in a picture of time per step.
"""
Records = Sequence[Mapping[str, float]]


def write_report(run: Path) -> Path:
    """Writes ``run/report.html`` and returns its path. ValueError if ``run`` is no run's folder."""
    run = Path(run)
    if not ((run / "metrics.jsonl").exists() or (run / "config.resolved.yaml").exists()):
        raise ValueError(
            f"{run} is not a run's folder: it holds neither metrics.jsonl nor config.resolved.yaml; give the folder that `kvpo align` wrote"
        )
    records, problem = _records(run)
    evaluations, problems = read_evaluations(run)
    parts = [
        (
            "Before and after",
            lambda: report_videos.pairs(read_samples(run), report_evaluation.sentence(evaluations)),
        ),
        ("Result", lambda: report_evaluation.tables(evaluations)),
        ("Rewards", lambda: _rewards(_have(records))),
        (
            "Evaluation during training",
            lambda: report_evaluation.curves(_have(records), evaluations),
        ),
        ("Agreement of the rewards", lambda: report_guards.conflicts(_have(records))),
        ("Sentinels", lambda: report_guards.sentinels(_have(records))),
        ("Agreement of the gradients", lambda: report_agreement.gradients(_have(records), run)),
        ("Policy and optimisation", lambda: _policy(_have(records), run)),
        ("One group", lambda: report_videos.group(read_group(run))),
        ("Cost", lambda: _cost(_have(records))),
        ("Setup", lambda: _setup(run)),
        ("Words", glossary),
    ]
    text = render(
        "report.html",
        title=f"{run.resolve().name} - KVPO report",
        kicker="KVPO run report",
        name=run.resolve().name,
        facts=_facts(run, records),
        warnings=[*problem, *problems, *warnings(run, records, evaluations)],
        sections=[_section(*part) for part in parts],
        written=time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
        command="kvpo report",
    )
    return write_atomic(run / "report.html", text)


@dataclass(frozen=True)
class Section:
    """A section of the page."""

    title: str
    lead: str
    body: str
    """HTML below the lead."""


def _section(title: str, body: Callable[[], tuple[str, str]]) -> Section:
    """A section from ``body``'s (lead, HTML), or the reason why there is none.

    The files may come from an older program or an unlucky disk; a report that fails on one of them
    shows nothing of the others, so what reading foreign content raises is caught here, in this one
    place.
    """
    try:
        return Section(title, *body())
    except Missing as reason:
        said = str(reason)
    except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
        said = f"this part of the run's folder does not have the expected form ({error!r})"
    return Section(title, "", page.missing(said))


def _records(run: Path) -> tuple[Records, list[str]]:
    try:
        return read_metrics(run / "metrics.jsonl"), []
    except (ValueError, OSError) as error:
        return [], [f"the metrics cannot be read: {error}"]


def _have(records: Records) -> Records:
    if not records:
        raise Missing("no metrics were logged: metrics.jsonl is missing, empty or unreadable")
    return records


def last_step(records: Records) -> int | None:
    """The last step that was trained (steps count from 0), evaluation lines apart."""
    return max(
        (
            int(r["step"])
            for r in records
            if any(name.startswith(("loss/", "optim/", "group/")) for name in r)
        ),
        default=None,
    )


def planned_steps(run: Path) -> int | None:
    """Number of steps that the config asks for; None if it says nothing.

    It is `steps` at its top level or in its training section.
    """
    try:
        config = read_config(run)[1]
    except Missing:
        return None
    places = [config, *(config.get(name) for name in ("train", "training", "align", "run"))]
    return next(
        (
            place["steps"]
            for place in places
            if isinstance(place, dict) and isinstance(place.get("steps"), int)
        ),
        None,
    )


def warnings(run: Path, records: Records, evaluations: Sequence[Any]) -> list[str]:
    """Warnings that a reader must know before believing the page."""
    found, last, planned = [], last_step(records), planned_steps(run)
    if last is None:
        found.append("no training step was logged")
    elif planned is not None and last < planned - 1:
        found.append(f"training stopped early: {last + 1} of {planned} updates were made")
    found += report_guards.warnings(run) + report_evaluation.warnings(evaluations)
    broken: dict[str, list[int]] = {}
    for record in records:
        for name, value in record.items():
            if not math.isfinite(value):
                broken.setdefault(name, []).append(int(record["step"]) + 1)
    found += [
        f"{name} was not finite in {len(steps)} record{'s' * (len(steps) > 1)}, first at update {steps[0]}"
        for name, steps in sorted(broken.items())
    ]
    for name, limit, text in (
        ("group/skipped", 0.5, "of the groups gave no update"),
        (
            "advantage/tied",
            0.2,
            "of the groups had branches that all earned the same, and taught nothing",
        ),
        (
            "optim/grad_clipped",
            0.9,
            "of the groups had their gradient clipped: the learning rate acts on its direction only",
        ),
    ):
        share = _mean(records, name)
        if share > limit:
            found.append(f"{share:.0%} {text}")
    if _mean(records, "policy/evenness") > 0.999:
        found.append(
            "pi is uniform to three digits: tau is far above the energies' spread, and neither clip nor KL can act"
        )
    return found


def _mean(records: Records, name: str) -> float:
    values = [
        v for _, points in series(records, name).items() for v in points[1] if math.isfinite(v)
    ]
    return sum(values) / len(values) if values else math.nan


def _facts(run: Path, records: Records) -> str:
    last, planned = last_step(records), planned_steps(run)
    facts = (
        []
        if last is None
        else [f"{last + 1} updates" if planned is None else f"{last + 1} of {planned} updates"]
    )
    spent = [v for v in series(records, "time/total").get("", ([], []))[1] if math.isfinite(v)]
    facts += [f"{page.seconds(sum(spent))} of training"] if spent else []
    try:
        environment = read_environment(run)
        facts += [
            str(environment[key])
            for key in ("hardware", "device")
            if isinstance(environment.get(key), str)
        ]
        facts += (
            [f"commit {str(environment['git_commit'])[:12]}"]
            if environment.get("git_commit")
            else []
        )
    except (Missing, AttributeError):
        pass  # the section Setup says so
    return "  ·  ".join(facts)


def _rewards(records: Records) -> tuple[str, str]:
    charts = []
    for signal in ("local", "global"):
        means = series(records, f"reward/{signal}/{{component}}/mean")
        parts = {
            kind: series(records, f"reward/{signal}/{{component}}/{kind}")
            for kind in ("best", "anchor")
        }
        for component, points in means.items():
            lines = [Line("mean of branches", points, 1, smooth=True)]
            lines += [
                Line(kind, parts[kind][component], colour, smooth=True)
                for kind, colour in (("anchor", 2), ("best", 3))
                if component in parts[kind]
            ]
            charts.append(figure(f"{component}, {signal}", lines))
    if not charts:
        raise Missing("no reward was logged")
    lead = (
        "Rewards of the training groups. Every step draws other scripts, so these curves jump; whether training helped is read off the evaluations, "
        "which do not. Thin: every step; thick: a running mean."
    )
    return lead, f'<div class="charts">{"".join(charts)}</div>'


def _policy(records: Records, run: Path) -> tuple[str, str]:
    try:
        branches = len(read_group(run).record["pi"])
    except (Missing, LookupError, TypeError, AttributeError):
        branches = 0
    drawn, absent = [], []
    for chart in POLICY_CHARTS:
        level = (
            (math.log(branches), f"log {branches}")
            if branches > 1 and chart.title.startswith("Entropy")
            else None
        )
        text = draw(chart, records, level)
        drawn += [text] * bool(text)
        absent += [chart.title.lower()] * (not text)
    note = f'<p class="note">Not logged: {html.escape(", ".join(absent))}.</p>' if absent else ""
    return (
        "Thin: every step; thick: a running mean.",
        f'<div class="charts">{"".join(drawn)}</div>{note}',
    )


def _cost(records: Records) -> tuple[str, str]:
    charts = [text for text in (draw(chart, records) for chart in COST_CHARTS) if text]
    phases = {
        phase: points for phase in PHASES for points in series(records, f"time/{phase}").values()
    }
    if not charts and not phases:
        raise Missing("neither time nor memory was logged")
    lead, body = _time(phases) if phases else ("", page.missing("no time was logged"))
    return lead, f'{body}<div class="charts">{"".join(charts)}</div>'


def _time(phases: Mapping[str, Points]) -> tuple[str, str]:
    """Show the run's time by phase: in all, as a table, and step by step."""
    sums = {
        phase: sum(v for v in points[1] if math.isfinite(v)) for phase, points in phases.items()
    }
    total, beside = sums.pop("total", 0.0), sum(sums.get(phase, 0.0) for phase in RARE)
    sums["not measured"] = max(0.0, total + beside - sum(sums.values()))
    whole = sum(sums.values())
    steps = {phase: len(points[0]) for phase, points in phases.items()}
    colours = {phase: f"--k:var(--c{i % len(COLOURS) + 1})" for i, phase in enumerate(sums)}
    bar = "".join(
        f'<div style="{colours[p]};flex-grow:{s / (whole or 1.0):.5f}" title="{p} {page.seconds(s)}"></div>'
        for p, s in sums.items()
        if s > 0.0
    )
    rows = [
        [
            f'<span class="key" style="{colours[p]}">{p}</span>',
            page.seconds(s),
            f"{s / (whole or 1.0):.1%}",
            page.seconds(s / steps[p]) if p in steps else "",
        ]
        for p, s in sums.items()
    ]
    body = f'<div class="shares">{bar}</div>' + page.table(
        ["phase", "in all", "share", "each time"], rows
    )
    steady = {phase: points for phase, points in phases.items() if phase not in (*RARE, "total")}
    body += (
        stacked(steady, "Time of a step by phase", "s, without " + ", ".join(RARE))
        if steady
        else ""
    )
    return f"{page.seconds(whole)} in all.", body


def _setup(run: Path) -> tuple[str, str]:
    try:
        facts = [
            [html.escape(key), html.escape(value)] for key, value in _flat(read_environment(run))
        ]
        environment = page.table(["", ""], facts, "facts-table")
    except Missing as reason:
        environment = page.missing(str(reason))
    try:
        config = f"<pre>{html.escape(read_config(run)[0])}</pre>"
    except Missing as reason:
        config = page.missing(str(reason))
    return "", f"{environment}<details><summary>Resolved config</summary>{config}</details>"


def _flat(value: Any, name: str = "") -> list[tuple[str, str]]:
    """Nested JSON as (dotted name, text) pairs."""
    if isinstance(value, list) and value and isinstance(value[0], dict):
        value = dict(enumerate(value, 1))
    if isinstance(value, dict):
        return [
            pair
            for key, inner in value.items()
            for pair in _flat(inner, f"{name}.{key}" if name else str(key))
        ]
    values = value if isinstance(value, list) else [value]
    return [(name, " ".join("–" if v is None else str(v) for v in values))]
