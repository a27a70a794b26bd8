"""Small pieces that the report's sections are made of: tables, intervals, numbers in words."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence

from kvpo.pages.render import render

SHORT = {"train": "trained on", "heldout": "held out", "related": "not held out", "guard": "guard"}
"""Kind of an evaluated component -> what its badge says."""


def missing(reason: str) -> str:
    """HTML that replaces a section whose part of the run is not there."""
    return f'<p class="missing">Not shown: {html.escape(reason)}.</p>'


def table(
    head: Sequence[str], rows: Iterable[Sequence[str]], name: str = "", marked: int | None = None
) -> str:
    """HTML of a table; cells are HTML already, and the first column is the row's name.

    It scrolls by itself on narrow screens.

    ``marked``: number of a row that stands out.
    """
    return render("table.html", head=head, rows=rows, name=name, marked=marked)


def num(value: float, sign: bool = False) -> str:
    """Format a number for reading: three significant digits, and all before the point.

    All pages use this one format. Powers of ten appear only where zeros would hide the digits; a
    dash stands for NaN.
    """
    if not math.isfinite(value):
        return "–" if math.isnan(value) else ("∞" if value > 0 else "−∞")
    if value == 0.0:
        return "0"
    plus, size = "+" if sign else "", math.floor(math.log10(abs(value)))
    text = f"{value:{plus}.{max(0, 2 - size)}f}" if -5 <= size < 6 else f"{value:{plus}.2e}"
    return text.replace("-", "−")


def seconds(value: float) -> str:
    """3.2 s, 12 min 5 s, 2 h 7 min."""
    if not math.isfinite(value):
        return "–"
    if value < 60.0:
        return f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def interval(low: float, mid: float, high: float, reach: float, verdict: str) -> str:
    """A small picture of an interval against zero, on an axis from -reach to +reach."""
    if not all(map(math.isfinite, (low, mid, high))) or reach <= 0.0:
        return ""
    places = (f"{90 + 84 * max(-1.0, min(1.0, x / reach)):.1f}" for x in (low, mid, high))
    names = ("low", "mid", "high")
    return render("interval.html", verdict=verdict, **dict(zip(names, places)))
