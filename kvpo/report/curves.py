"""Curves of a report as inline SVG.

They are coloured by the page's own variables, so that light and dark pages share them.
"""

from __future__ import annotations

import html
import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from kvpo.common.metrics import declaration, pick

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Points = tuple[list[float], list[float]]
"""Steps and values."""

# Matplotlib writes colours as hex digits and the page wants its variables: these stand-ins are
# exchanged in the text.
INK, GRID = "#010101", "#020202"
COLOURS = [f"#0300{i:02x}" for i in range(1, 13)]
_VARIABLES = {INK: "var(--soft)", GRID: "var(--line)"} | {
    colour: f"var(--c{i})" for i, colour in enumerate(COLOURS, 1)
}
RC = {
    "svg.fonttype": "none",
    "svg.hashsalt": "kvpo",
    "font.family": "DejaVu Sans",
    "font.size": 8.5,
}


@dataclass(frozen=True)
class Line:
    label: str
    points: Points
    colour: int
    """1 to 12, as in the page's --c1 to --c12."""
    dashed: bool = False
    smooth: bool = False
    """True: also draw a running mean, and the values themselves faintly."""
    band: tuple[Points, Points] | None = None
    """Lower and upper bound, shaded."""


def distinct(number: int) -> tuple[int, bool]:
    """Colour and dash of a chart's line by its number.

    As many lines as two rounds of the colours look different.
    """
    return 1 + number % len(COLOURS), number // len(COLOURS) % 2 == 1


@dataclass(frozen=True)
class Chart:
    """A chart of named metrics; those that were not logged are left out."""

    title: str
    metrics: Mapping[str, str]
    """Metric -> label; the unit is the first one's."""
    log: bool = False
    note: str = ""


POLICY_CHARTS = (
    Chart(
        "Entropy of the policy",
        {"loss/entropy": "pi_theta", "policy/entropy": "pi_old"},
        note="log G, a uniform policy, is the most it can be.",
    ),
    Chart(
        "Temperature and energy spread",
        {"policy/tau": "tau", "energy/std": "std of energy"},
        log=True,
        note="Where tau is far above the spread pi is uniform.",
    ),
    Chart("Clip fraction", {"loss/clip_fraction": "outside the clip range"}),
    Chart("KL", {"loss/kl": "to the reference", "loss/approx_kl": "from pi_old"}),
    Chart(
        "Ratio pi_theta / pi_old",
        {"loss/ratio_max": "max", "loss/ratio_mean": "mean", "loss/ratio_min": "min"},
    ),
    Chart("Gradient norm before clipping", {"optim/grad_norm": "norm"}, log=True),
    Chart("Drift from the start weights", {"optim/drift": "distance"}),
    Chart(
        "Velocities of the opening",
        {"hold/distance": "from the start weights'"},
        log=True,
        note="Held by the velocity penalty; logged where it is on.",
    ),
    Chart(
        "Groups",
        {
            "advantage/above_anchor": "branches above anchor",
            "group/safe": "groups with any above",
            "group/skipped": "groups skipped",
            "advantage/tied": "groups tied",
        },
    ),
    Chart("Pixel diversity of the branches", {"diversity/pixel": "mean squared difference"}),
    Chart("Learning rate", {"optim/lr": "lr"}),
)
COST_CHARTS = (
    Chart("Peak memory", {"memory/peak_gib": "peak"}),
    Chart("Calls of the generator in a step", {"calls/generator": "calls"}),
)


def series(records: Sequence[Mapping[str, float]], pattern: str) -> dict[str, Points]:
    """Steps and values of the metrics that match ``pattern``; a step's last value holds.

    Keys are those of `kvpo.common.metrics.pick`.

    Records count from 0, and what is logged at 74 belongs to the 75th update: a point stands at the
    number of updates made, where checkpoints, evaluations and samples have the same number in their
    names.
    """
    names = {
        name: key
        for key, name in pick(
            {name: name for record in records for name in record}, pattern
        ).items()
    }
    found: dict[str, dict[float, float]] = {}
    for record in records:
        for name in names.keys() & record.keys():
            found.setdefault(names[name], {})[record["step"] + 1] = record[name]
    found = {key: found[key] for key in names.values()}
    return {key: (list(steps), list(steps.values())) for key, steps in found.items()}


def draw(
    chart: Chart, records: Sequence[Mapping[str, float]], level: tuple[float, str] | None = None
) -> str:
    """HTML of a chart, "" if none of its metrics was logged."""
    lines = []
    for i, (metric, label) in enumerate(chart.metrics.items()):
        points = series(records, metric).get("")
        if points:
            lines.append(Line(label, points, i + 1, smooth=True))
    return (
        figure(
            chart.title,
            lines,
            declaration(next(iter(chart.metrics))).unit,
            chart.log,
            chart.note,
            level,
        )
        if lines
        else ""
    )


def running_mean(values: Sequence[float], width: int) -> list[float]:
    """Centred mean over ``width`` values, of those that are finite; shorter at the ends."""
    half, array = width // 2, np.array(values, dtype=float)
    windows = (array[max(0, i - half) : i + half + 1] for i in range(len(array)))
    return [float(w[np.isfinite(w)].mean()) if np.isfinite(w).any() else math.nan for w in windows]


def figure(
    title: str,
    lines: Sequence[Line],
    unit: str = "",
    log: bool = False,
    note: str = "",
    level: tuple[float, str] | None = None,
) -> str:
    """HTML of one chart: a caption that is the legend, and the curves.

    ``level``: a horizontal line and its label.
    """
    values = np.array([v for line in lines for v in line.points[1]], dtype=float)
    lost = int((~np.isfinite(values)).sum())
    notes = [note] * bool(note) + [f"{lost} value{'s' * (lost > 1)} not finite, left out."] * bool(
        lost
    )
    keys = [
        f'<span class="key{" dashed" * line.dashed}" style="--k:var(--c{line.colour})">{html.escape(line.label)}</span>'
        for line in lines
    ]
    body = (
        _curves(lines, log, level, title, unit)
        if lost < len(values)
        else '<p class="missing">no finite value</p>'
    )
    unit = f' <span class="unit">{html.escape(unit)}</span>' if unit not in ("", "1") else ""
    return (
        f'<figure class="chart"><figcaption><b>{html.escape(title)}</b>{unit}<div class="keys">{"".join(keys)}</div></figcaption>{body}'
        + (f'<p class="note">{html.escape(" ".join(notes))}</p>' if notes else "")
        + "</figure>"
    )


def _curves(
    lines: Sequence[Line], log: bool, level: tuple[float, str] | None, title: str, unit: str
) -> str:
    from matplotlib import rc_context

    with rc_context(RC):
        picture, axes = _axes()
        for line in lines:
            _draw_line(axes, line)
        if level is not None:
            axes.axhline(level[0], color=INK, linewidth=0.8, linestyle=(0, (2, 2)))
            axes.annotate(
                level[1],
                (1.0, level[0]),
                xycoords=("axes fraction", "data"),
                xytext=(-2, -9),
                textcoords="offset points",
                ha="right",
                color=INK,
                fontsize=7.5,
            )
        if unit == "share":
            axes.set_ylim(bottom=-0.02)
        positive = [v for line in lines for v in line.points[1] if math.isfinite(v)]
        if log and min(positive) > 0.0 and max(positive) > 20.0 * min(positive):
            axes.set_yscale("log")
            axes.minorticks_off()
        steps = [step for line in lines for step in line.points[0]]
        if min(steps) == max(steps):
            # else the axis counts in hundredths of a step
            axes.set_xlim(min(steps) - 2, max(steps) + 2)
        return svg(picture, title)


def _axes(size: tuple[float, float] = (4.3, 2.1)):
    from matplotlib.figure import Figure

    picture = Figure(figsize=size, layout="constrained")
    axes = picture.subplots()
    axes.set_xlabel("updates made", color=INK)
    axes.tick_params(colors=INK, length=0)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(GRID)
    axes.locator_params(axis="x", integer=True)
    return picture, axes


def _draw_line(axes, line: Line) -> None:
    steps, raw = line.points
    values = [v if math.isfinite(v) else math.nan for v in raw]
    colour, style = COLOURS[line.colour - 1], (0, (4, 2)) if line.dashed else "solid"
    smooth = line.smooth and len(steps) >= 20
    weight = dict(linewidth=1.0, alpha=0.25) if smooth else dict(linewidth=1.8)
    axes.plot(
        steps,
        values,
        color=colour,
        linestyle=style,
        marker="o" if len(steps) < 12 else None,
        markersize=3.5,
        **weight,
    )
    if smooth:
        axes.plot(
            steps, running_mean(values, max(3, len(steps) // 10)), color=colour, linewidth=1.8
        )
    if line.band is not None:
        (low_steps, low), (_, high) = line.band
        if len(low) == len(high):
            axes.fill_between(low_steps, low, high, color=colour, alpha=0.18, linewidth=0.0)


def stacked(phases: Mapping[str, Points], title: str, unit: str) -> str:
    """HTML of phases stacked over the steps; long runs are averaged into at most 120 bars."""
    steps = sorted({step for points in phases.values() for step in points[0]})
    bins = np.array_split(np.array(steps), min(120, len(steps)))
    from matplotlib import rc_context

    with rc_context(RC):
        picture, axes = _axes((14.0, 3.0))
        base = np.zeros(len(bins))
        for i, points in enumerate(phases.values()):
            at = {step: value for step, value in zip(*points) if math.isfinite(value)}
            height = np.array([np.mean([at.get(step, 0.0) for step in b]) for b in bins])
            axes.bar(
                [b.mean() for b in bins],
                height,
                bottom=base,
                width=0.86 * np.mean([len(b) for b in bins]) * _spacing(steps),
                color=COLOURS[i % len(COLOURS)],
            )
            base += height
        body = svg(picture, title)
    keys = "".join(
        f'<span class="key" style="--k:var(--c{i % len(COLOURS) + 1})">{html.escape(name)}</span>'
        for i, name in enumerate(phases)
    )
    return f'<figure class="chart wide"><figcaption><b>{html.escape(title)}</b> <span class="unit">{unit}</span><div class="keys">{keys}</div></figcaption>{body}</figure>'


def _spacing(steps: Sequence[float]) -> float:
    return float(np.median(np.diff(steps))) if len(steps) > 1 else 1.0


def svg(picture: Figure, label: str) -> str:
    """The figure as an `<svg>` to stand inside HTML.

    It has no prologue, no namespaces, nothing that names an address.
    """
    file = io.StringIO()
    picture.savefig(
        file,
        format="svg",
        transparent=True,
        metadata={"Date": None, "Creator": None, "Format": None, "Type": None},
    )
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = (
        re.sub(r'\s(?:xmlns(?::\w+)?|version|width|height)="[^"]*"', "", text[: text.index(">")])
        + text[text.index(">") :]
    )
    for stand_in, variable in _VARIABLES.items():
        text = text.replace(stand_in, variable)
    # Text follows the page's font: matplotlib's own may not be installed there.  Its style element
    # would style the whole page.
    text = re.sub(r"<style.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r"font-family: [^;\"]*", "font-family: inherit", text)
    text = re.sub(r"font: (?:[a-z0-9]+ )*([\d.]+px) [^;\"]*", r"font-size: \1", text)
    return text.replace("<svg", f'<svg role="img" aria-label="{html.escape(label)}"', 1).replace(
        "\n", " "
    )
