"""The report's guards against rewards that disagree or are gamed, and videos that drift."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from kvpo.evaluation import goodhart
from kvpo.pages import html as page
from kvpo.report.curves import Line, Points, distinct, figure, series
from kvpo.report.read_run import Missing

Records = Sequence[Mapping[str, float]]


def conflicts(records: Records) -> tuple[str, str]:
    """Table and chart of how far the components of the reward agree."""
    ranks, signs, flats = (
        series(records, f"conflict/{{component}}/{kind}") for kind in ("rank", "sign", "flat")
    )
    if not flats:
        raise Missing("nothing about the rewards' agreement was logged")
    rows = [
        [
            html.escape(pair),
            _number(_mean(ranks.get(pair))),
            _share(_mean(signs[pair])),
            _word(_mean(ranks.get(pair))),
        ]
        for pair in signs
    ]
    body = (
        page.table(["pair", "rank correlation", "opposite sides of the anchor", ""], rows)
        if rows
        else page.missing("there is only one reward")
    )
    body += page.table(
        ["component", "groups without spread"],
        [[html.escape(name), _share(_mean(points))] for name, points in flats.items()],
    )
    if ranks:
        lines = [
            Line(pair, points, *distinct(i), smooth=True)
            for i, (pair, points) in enumerate(ranks.items())
        ]
        body += f'<div class="charts">{figure("Rank correlation of advantages", lines, "", level=(0.0, "unrelated"))}</div>'
    lead = "Do the trained rewards rank the branches of a group alike? Below 0 they pull apart, and their weights decide which is given up for the other. Means over the run."
    return lead, body


def sentinels(records: Records) -> tuple[str, str]:
    """Draw charts of the sentinels: the way each has moved from the start weights.

    Its unit is the spread of the start weights over seeds.
    """
    moved = series(records, "sentinel/{component}/moved")
    if not moved:
        raise Missing("no sentinels were watched: set sentinels.every")
    values = series(records, "sentinel/{component}/value")
    rows = [
        [
            html.escape(name),
            page.num(values[name][1][0]),
            page.num(values[name][1][-1]),
            page.num(points[1][-1], sign=True),
        ]
        for name, points in moved.items()
    ]
    lines = [Line(name, points, *distinct(i)) for i, (name, points) in enumerate(moved.items())]
    chart = figure(
        "Distance from the start weights",
        lines,
        "standard deviations of the start weights' seeds",
        level=(0.0, "start weights"),
    )
    lead = "Fixed prompts and seeds, watched while training: what no reward names, and what gamed rewards move first."
    return lead, page.table(
        ["sentinel", "start", "now", "moved, in spreads over seeds"], rows
    ) + f'<div class="charts">{chart}</div>'


def warnings(run: Path) -> list[str]:
    """Warnings of the evaluations about gamed rewards."""
    try:
        verdict = goodhart.judge(goodhart.history(run / "evaluation", "ema"))
    except (OSError, ValueError, LookupError, TypeError):
        return []  # the section Result names the file that can not be read
    if not verdict.fallen:
        return []
    best = f"step {verdict.best} (RUN:best)" if verdict.best else "the start weights"
    return [
        f"the rewards were gamed: they rose while {', '.join(verdict.fallen)} fell, in {goodhart.SUCCESSIVE} evaluations on end; the best held-out weights are those of {best}"
    ]


def _mean(points: Points | None) -> float:
    values = [v for v in points[1] if math.isfinite(v)] if points else []
    return sum(values) / len(values) if values else math.nan


def _number(value: float) -> str:
    return page.num(value, sign=True)


def _share(value: float) -> str:
    return f"{value:.0%}" if math.isfinite(value) else "–"


def _word(correlation: float) -> str:
    if not math.isfinite(correlation):
        return "no spread"
    return "conflict" if correlation < -0.1 else "agree" if correlation > 0.1 else "unrelated"
