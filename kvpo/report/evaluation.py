"""The report's statistics of what changed against the start weights.

They stand in a table, in words and over the steps.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Mapping, Sequence

from kvpo.evaluation import power
from kvpo.evaluation.intervals import TOTAL, VERDICT_PAIRS
from kvpo.pages import html as page
from kvpo.report.curves import Line, Points, figure, series
from kvpo.report.read_run import Evaluation, Missing, Row

KINDS = {
    "train": "Rewards it was trained on",
    "heldout": "Held-out evaluators, never trained on",
    "related": "Evaluators that see as a trained reward does: not held out",
    "guard": "Guards, which must not fall",
}
WORDS = {
    "better": "Better",
    "worse": "Worse",
    "unclear": "No clear difference",
    "few": "Too few scripts to say",
    "unmeasured": "Not measured",
}
SHORT_WORDS = WORDS | {"unclear": "unclear", "few": "too few"}
WHY_FEW = (
    f"Below {VERDICT_PAIRS} scripts nothing is called better or worse, whatever its interval says: of so few, intervals "
    "are too narrow (nominal 95 % held the truth in 78 % of trials with 4 scripts, in 92 % with 16)"
)
FEW_PAIRS = 32
"""Fewer paired scripts than this make wide intervals and poor bootstrap estimates."""
WEIGHTS = {"start": (8, "start"), "online": (1, "online"), "ema": (2, "EMA")}
"""Weights -> colour and label of their curve."""


def tables(evaluations: Sequence[Evaluation]) -> tuple[str, str]:
    if not evaluations:
        raise Missing(
            "nothing has been evaluated: the run has no readable evaluation/*.json; make one with `kvpo evaluate`"
        )
    return "", "".join(map(_evaluation, evaluations)) + (
        '<p class="note">Differences are paired: same scripts, same seeds, same noise. Intervals are 95 % intervals over scripts (BCa bootstrap), each for itself: among twenty components that '
        "did not change at all, one would be called better or worse by chance. A difference counts as clear where its interval leaves out zero.</p>"
    )


def sentence(evaluations: Sequence[Evaluation]) -> str:
    """Say in one sentence, with its interval, what training changed.

    It speaks of the averaged weights where they were evaluated. ``evaluations``: newest first.
    """
    found = [
        (e, row)
        for e in evaluations
        for row in e.rows
        if row.component == TOTAL and row.verdict != "unmeasured"
    ]
    if not found:
        return ""
    evaluation, row = next((pair for pair in found if "ema" in pair[0].label_a.lower()), found[0])
    scripts = f"{evaluation.scripts} {'unseen ' if evaluation.unseen else ''}scripts"
    moved = {"better": "rose", "worse": "fell", "few": "went"}.get(
        row.verdict, "changed, not clearly,"
    )
    few = (
        f" {evaluation.scripts} scripts are too few to call that better or worse."
        if row.verdict == "few"
        else ""
    )
    return (
        f"On {scripts} the mean of the trained rewards {moved} from {page.num(row.b)} to {page.num(row.a)}, "
        f"by {page.num(row.diff, sign=True)} (95 % interval {page.num(row.low, sign=True)} to {page.num(row.high, sign=True)}), and {row.win:.0%} of the scripts are better.{few}"
    )


def _evaluation(evaluation: Evaluation) -> str:
    facts = (
        f"{evaluation.scripts} scripts, {evaluation.videos} video{'s' * (evaluation.videos > 1)} of each, seed {evaluation.seed}"
        + (f", {_when(evaluation.created)}" if evaluation.created else "")
    )
    command = (
        f'<p class="note">Made by <code>{html.escape(evaluation.command)}</code></p>'
        if evaluation.command
        else ""
    )
    title = f"{html.escape(evaluation.label_a)} against {html.escape(evaluation.label_b)}"
    return f'<h3>{title} <span class="unit">{html.escape(facts)}</span></h3>{_words(evaluation)}{_table(evaluation)}{_power(evaluation)}{command}'


def _when(created: str) -> str:
    """A record's time as people write it, to the minute."""
    return f"{created[:16].replace('T', ' ')} UTC" if created.endswith("+00:00") else created


def _words(evaluation: Evaluation) -> str:
    """List what is clear and what is not, one line a kind of component."""
    lines = []
    for kind in _kinds(evaluation):
        rows = [row for row in evaluation.rows if row.kind == kind]
        parts = []
        for verdict, word in WORDS.items():
            named = [_named(row) for row in rows if row.verdict == verdict]
            if named:
                parts.append(f'<span class="{verdict}">{word}</span>: {", ".join(named)}')
        lines.append(f"<li><b>{KINDS.get(kind, html.escape(kind))}.</b> {'. '.join(parts)}.</li>")
    return f'<ul class="verdicts">{"".join(lines)}</ul>'


def _named(row: Row) -> str:
    name = html.escape(row.component)
    return (
        name
        if row.verdict in ("unclear", "few", "unmeasured")
        else f"{name} by {page.num(abs(row.diff))}"
    )


def _kinds(evaluation: Evaluation) -> list[str]:
    kinds = dict.fromkeys(row.kind for row in evaluation.rows)
    return sorted(kinds, key=lambda kind: list(KINDS).index(kind) if kind in KINDS else len(KINDS))


def _table(evaluation: Evaluation) -> str:
    rows = []
    for kind in _kinds(evaluation):
        part = [row for row in evaluation.rows if row.kind == kind]
        # One axis a kind: evaluators of another kind may have another unit.
        reach = max(
            (abs(x) for row in part for x in (row.low, row.high) if math.isfinite(x)), default=0.0
        )
        rows += [_row(row, reach) for row in part]
    head = [
        "component",
        "",
        "difference",
        "95 % interval",
        "",
        evaluation.label_a,
        evaluation.label_b,
        "wins",
        "pairs",
    ]
    why = any(row.verdict == "few" for row in evaluation.rows)
    note = f'<p class="note">{html.escape(WHY_FEW)}.</p>' if why else ""
    return page.table([html.escape(cell) for cell in head], rows) + note


def _power(evaluation: Evaluation) -> str:
    """Say whether there were enough scripts for the first trained reward, or for their mean."""
    row = next(
        (row for row in evaluation.rows if row.kind == "train" and row.verdict != "unmeasured"),
        None,
    )
    text = (
        power.sentence(
            row.component,
            row.n,
            row.diff,
            row.sd if math.isfinite(row.sd) else power.spread(row.low, row.high, row.n),
        )
        if row
        else ""
    )
    text = re.sub(r"(?<!\w)-(?=\d)", "−", text)
    return f'<p class="note">{html.escape(text)}.</p>' if text else ""


def _row(row: Row, reach: float) -> list[str]:
    badge = f'<span class="badge {html.escape(row.kind)}">{html.escape(page.SHORT.get(row.kind, row.kind))}</span>'
    lower = ' <span class="unit">lower is better</span>' if row.better == "lower" else ""
    between = (
        f"{page.num(row.low, sign=True)} to {page.num(row.high, sign=True)}"
        if row.verdict != "unmeasured"
        else "–"
    )
    wins = f"{row.win:.0%}" if math.isfinite(row.win) else "–"
    return [
        html.escape(row.component) + badge + lower,
        f'<span class="{row.verdict}">{SHORT_WORDS[row.verdict].lower()}</span>',
        page.num(row.diff, sign=True),
        between,
        page.interval(row.low, row.diff, row.high, reach, row.verdict),
        page.num(row.a),
        page.num(row.b),
        wins,
        str(row.n),
    ]


def warnings(evaluations: Sequence[Evaluation]) -> list[str]:
    found = (
        []
        if evaluations
        else ["there is no evaluation: nothing on this page shows that training helped"]
    )
    for evaluation in evaluations:
        pair = f"{evaluation.label_a} against {evaluation.label_b}"
        if evaluation.scripts < FEW_PAIRS:
            found.append(
                f"{pair} was measured on {evaluation.scripts} scripts only: expect wide intervals, and do not trust narrow ones"
            )
        if not any(row.kind == "heldout" for row in evaluation.rows):
            found.append(
                f"{pair}: not held out. No evaluator of a family unseen in training was asked, so nothing tells a better video from a gamed reward; add one with role eval"
            )
        if not evaluation.unseen:
            found.append(
                f"{pair} was measured on the prompts that were trained on, under other noise: it does not show what other prompts gain; set evaluate.prompts"
            )
        fallen = [
            row.component
            for row in evaluation.rows
            if row.kind != "train" and row.verdict == "worse"
        ]
        gained = any(row.kind == "train" and row.verdict == "better" for row in evaluation.rows)
        if fallen:
            found.append(
                f"{pair}: {', '.join(fallen)} fell"
                + (
                    " while trained rewards rose: look whether the reward is being gamed"
                    if gained
                    else ""
                )
            )
    return found


def curves(
    records: Sequence[Mapping[str, float]], evaluations: Sequence[Evaluation]
) -> tuple[str, str]:
    """Draw one chart a component over the steps: the paired difference and its interval.

    Means are drawn instead if that was not logged.
    """
    found = {
        kind: series(records, f"eval/{{weights}}/{{component}}/{kind}")
        for kind in ("mean", "diff", "low", "high")
    }
    if not found["mean"] and not found["diff"]:
        raise Missing("no evaluation was logged while training")
    # A metric's name has no blanks, a component's may.
    rows = {
        row.component.replace(" ", "_"): row
        for evaluation in evaluations
        for row in evaluation.rows
    }
    logged = dict.fromkeys(key.split("/")[1] for kind in ("diff", "mean") for key in found[kind])
    order = [*KINDS, ""]
    components = sorted(
        logged,
        key=lambda c: (
            order.index(rows[c].kind) if c in rows and rows[c].kind in KINDS else len(order)
        ),
    )
    charts = "".join(_curve(component, found, rows.get(component)) for component in components)
    lead = "The evaluation's fixed scripts and seeds, paired with the start weights; shaded: 95 % interval. Above the line is better than before, unless lower is said to be."
    return lead, f'<div class="charts">{charts}</div>'


def _curve(component: str, found: Mapping[str, Mapping[str, Points]], row: Row | None) -> str:
    title = component
    if row is not None:
        title = f"{row.component} ({page.SHORT.get(row.kind, row.kind)}{', lower is better' * (row.better == 'lower')})"
    paired = [
        weights
        for weights in WEIGHTS
        if f"{weights}/{component}" in found["diff"] and weights != "start"
    ]
    lines = []
    for weights in paired or WEIGHTS:
        key, (colour, label) = f"{weights}/{component}", WEIGHTS[weights]
        if paired:
            band = (
                (found["low"][key], found["high"][key])
                if key in found["low"] and key in found["high"]
                else None
            )
            lines.append(Line(label, found["diff"][key], colour, band=band))
        elif key in found["mean"]:
            lines.append(Line(label, found["mean"][key], colour))
    return (
        figure(title, lines, "minus start weights", level=(0.0, "start weights"))
        if paired
        else figure(title, lines, "mean")
    )
