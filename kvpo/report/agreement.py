"""The report's word on the groups' gradients: whether they agree, and how many it takes."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path

from kvpo.method.agreement import latest, sentence
from kvpo.report.curves import Line, figure, series
from kvpo.report.read_run import Missing, read_config

Records = Sequence[Mapping[str, float]]


def gradients(records: Records, run: Path) -> tuple[str, str]:
    """A sentence, and the curve with its band of two standard errors."""
    last = latest(records)
    if last is None:
        raise Missing(
            "the agreement of the groups' gradients was not measured: agreement.window is 0, or too few groups were trained on"
        )
    cosine, error = (series(records, f"agreement/{name}")[""] for name in ("cosine", "error"))
    low, high = (
        (cosine[0], [c + side * e for c, e in zip(cosine[1], error[1])]) for side in (-2.0, 2.0)
    )
    chart = figure(
        "Mean cosine between groups' gradients",
        [Line("over the latest groups, two standard errors", cosine, 1, band=(low, high))],
        "",
        level=(0.0, "noise"),
    )
    needed = series(records, "agreement/needed").get("")
    more = (
        figure(
            "Groups needed",
            [Line("until the mean is more signal than noise", needed, 2)],
            "groups",
            log=True,
            note="Where the cosine is above its standard error.",
        )
        if needed
        else ""
    )
    text = sentence(
        last["agreement/cosine"],
        last["agreement/error"],
        int(last["agreement/groups"]),
        _groups(run),
    )
    return html.escape(text) + ".", f'<div class="charts">{chart}{more}</div>'


def _groups(run: Path) -> int:
    """Groups of a step, as the run's settings say."""
    try:
        return int(read_config(run)[1].get("groups", 1))
    except (Missing, AttributeError, TypeError, ValueError):
        return 1
