"""The report's page: its template, its style, and the small pieces that sections are made of.

The page opens from a file without a network: style, scripts, pictures and videos are inside it.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Iterable, Sequence
from string import Template

SHORT = {"train": "trained on", "heldout": "held out", "related": "not held out", "guard": "guard"}
"""Kind of an evaluated component -> what its badge says."""


def missing(reason: str) -> str:
    """HTML that replaces a section whose part of the run is not there."""
    return f'<p class="missing">Not shown: {html.escape(reason)}.</p>'


def anchor(title: str) -> str:
    """The name of a section within the page."""
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")


def contents(titles: Sequence[str]) -> str:
    """The list of sections at the page's head."""
    items = (f'<li><a href="#{anchor(title)}">{html.escape(title)}</a></li>' for title in titles)
    return f'<nav aria-label="contents"><ol>{"".join(items)}</ol></nav>'


def section(title: str, body: str, lead: str = "") -> str:
    said = f'<p class="lead">{html.escape(lead)}</p>' if lead else ""
    return f'<section id="{anchor(title)}"><h2>{html.escape(title)}</h2>{said}{body}</section>'


def table(
    head: Sequence[str], rows: Iterable[Sequence[str]], name: str = "", marked: int | None = None
) -> str:
    """HTML of a table; cells are HTML already, and the first column is the row's name.

    It scrolls by itself on narrow screens.

    ``marked``: number of a row that stands out.
    """
    lines = "".join(_line(row, number == marked) for number, row in enumerate(rows))
    heads = "".join(f"<th>{cell}</th>" for cell in head)
    return (
        f'<div class="scroll"><table class="{name}"><thead><tr>{heads}</tr></thead>'
        f"<tbody>{lines}</tbody></table></div>"
    )


def _line(row: Sequence[str], marked: bool) -> str:
    tags = ("th", *["td"] * (len(row) - 1))
    cells = "".join(f"<{tag}>{cell}</{tag}>" for cell, tag in zip(row, tags))
    start = '<tr class="best">' if marked else "<tr>"
    return f"{start}{cells}</tr>"


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
    a, m, b = (90 + 84 * max(-1.0, min(1.0, x / reach)) for x in (low, mid, high))
    return (
        f'<svg class="interval {verdict}" viewBox="0 0 180 18" role="img" aria-label="{verdict}"><line class="zero" x1="90" y1="0" x2="90" y2="18"/>'
        f'<line x1="{a:.1f}" y1="9" x2="{b:.1f}" y2="9"/><line x1="{a:.1f}" y1="5" x2="{a:.1f}" y2="13"/><line x1="{b:.1f}" y1="5" x2="{b:.1f}" y2="13"/>'
        f'<circle cx="{m:.1f}" cy="9" r="3.6"/></svg>'
    )


HEAD = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>$title</title>
<style>$style</style>
</head>
"""
"""Head of every page, which is one file without anything from elsewhere."""
PAGE = Template(
    HEAD
    + """<body>
<header><p class="kicker">KVPO run report</p><h1>$name</h1><p class="facts">$facts</p>$contents</header>
<main>
$warnings
$sections
</main>
<footer>$footer</footer>
<script>$script</script>
</body>
</html>
"""
)

STYLE = """
:root { --ink: #1c2024; --soft: #626a73; --line: #e2e5e9; --paper: #ffffff; --card: #f7f8fa; --accent: #2f6fb0;
  --good: #1d7a46; --bad: #b3362b; --warn: #8a5a00; --warn-paper: #fdf6e5;
  --c1: #2f6fb0; --c2: #d9702e; --c3: #2d8a5b; --c4: #8a5bb5; --c5: #b3923a; --c6: #4aa3b5; --c7: #b8506e; --c8: #7d8590;
  --c9: #16325c; --c10: #7a4a2b; --c11: #93b82e; --c12: #e58fc6; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e7ea; --soft: #9aa3ad; --line: #30363d; --paper: #14171b; --card: #1b1f24; --accent: #6cabe6;
  --good: #58c98b; --bad: #f0857a; --warn: #e5b65c; --warn-paper: #2a2416;
  --c1: #6cabe6; --c2: #f0954f; --c3: #58c08a; --c4: #b795e0; --c5: #d6b95f; --c6: #6fc6d6; --c7: #e0607f; --c8: #9aa3ad;
  --c9: #d5e3f5; --c10: #b98560; --c11: #c9e86a; --c12: #f6bfe4; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
header, main, footer { max-width: 1120px; margin: 0 auto; padding: 0 20px; }
header { padding-top: 40px; }
h1 { font-size: 30px; line-height: 1.2; margin: 0; font-weight: 650; letter-spacing: -0.01em; overflow-wrap: anywhere; }
h2 { font-size: 20px; margin: 0 0 4px; font-weight: 650; }
h3 { font-size: 15px; margin: 22px 0 6px; font-weight: 650; }
.kicker { margin: 0 0 4px; color: var(--accent); font-weight: 600; font-size: 13px; }
.facts, .lead, .note, .unit, figcaption, footer { color: var(--soft); }
.facts { margin: 8px 0 0; overflow-wrap: anywhere; }
.lead { margin: 0 0 14px; max-width: 78ch; }
.note { font-size: 12.5px; margin: 2px 0 0; max-width: 90ch; } .scroll + .note { margin-top: 10px; }
section { margin-top: 44px; padding-top: 22px; border-top: 1px solid var(--line); }
.warnings { margin-top: 26px; padding: 12px 18px; background: var(--warn-paper); border-left: 3px solid var(--warn); border-radius: 4px; }
.warnings b { color: var(--warn); } .warnings ul { margin: 4px 0 0; padding-left: 20px; }
.missing { color: var(--soft); background: var(--card); border: 1px dashed var(--line); border-radius: 6px; padding: 12px 16px; overflow-wrap: anywhere; }
.verdicts { list-style: none; margin: 10px 0 16px; padding: 0; font-size: 16.5px; max-width: 82ch; } .verdicts li { margin: 5px 0; }
.better { color: var(--good); } .worse { color: var(--bad); } .unclear, .few, .unmeasured { color: var(--soft); }
.scroll { overflow-x: auto; } .scroll + .scroll, .scroll + .charts { margin-top: 20px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: 14px; }
th, td { text-align: right; padding: 5px 10px; border-bottom: 1px solid var(--line); white-space: nowrap; }
thead th { color: var(--soft); font-weight: 500; font-size: 13px; vertical-align: bottom; }
th:first-child { text-align: left; padding-left: 0; } tbody th { font-weight: 550; }
nav ol { list-style: none; margin: 14px 0 0; padding: 0; display: flex; flex-wrap: wrap; gap: 2px 18px; font-size: 13.5px; }
a { color: var(--accent); }
tr.best th, tr.best td { background: var(--card); }
.glossary { display: grid; grid-template-columns: max-content 1fr; gap: 4px 18px; margin: 0; font-size: 14px; } .glossary dt { font-weight: 550; } .glossary dd { margin: 0; color: var(--soft); max-width: 82ch; }
tr.part th { padding-top: 14px; color: var(--soft); font-weight: 500; }
.badge { font-size: 11.5px; font-weight: 500; color: var(--soft); border: 1px solid var(--line); border-radius: 9px; padding: 1px 7px; margin-left: 6px; }
.badge.heldout { color: var(--accent); border-color: var(--accent); }
svg.interval { width: 130px; height: 18px; display: block; } svg.interval line { stroke: currentColor; stroke-width: 1.6; }
svg.interval circle { fill: currentColor; } svg.interval .zero { stroke: var(--line); stroke-width: 1; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 320px), 1fr)); gap: 22px 26px; }
figure { margin: 0; } figure.wide { margin: 18px 0; }
figcaption b { color: var(--ink); font-weight: 600; } .unit { font-size: 12.5px; margin-left: 4px; }
.keys { font-size: 12.5px; min-height: 1.5em; } .key { margin-right: 12px; white-space: nowrap; }
.key::before { content: ""; display: inline-block; width: 14px; border-top: 3px solid var(--k); vertical-align: middle; margin-right: 5px; }
.key.dashed::before { border-top-style: dotted; }
figure svg { width: 100%; height: auto; display: block; }
.pairs { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 440px), 1fr)); gap: 26px; }
.pair { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 14px; }
.sides { display: grid; grid-template-columns: 1fr 1fr; gap: 10px; } .sides figcaption { font-size: 13px; margin-bottom: 3px; }
.pair ol { margin: 10px 0 0; padding-left: 22px; font-size: 14px; } .pair li { color: var(--soft); } .pair li.now { color: var(--ink); }
.when { font-size: 12.5px; color: var(--soft); margin-left: 6px; white-space: nowrap; }
video { width: 100%; height: auto; display: block; border-radius: 4px; background: #000; image-rendering: pixelated; }
.grid video { width: auto; max-width: 100%; background: #fff; image-rendering: auto; } img { max-width: 100%; height: auto; border-radius: 4px; background: #fff; }
.shares { display: flex; height: 22px; border-radius: 4px; overflow: hidden; margin: 8px 0 12px; } .shares div { background: var(--k); min-width: 1px; }
details { margin-top: 12px; } summary { cursor: pointer; font-weight: 600; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: 6px; padding: 12px 16px; overflow-x: auto; font-size: 12.5px; line-height: 1.5; }
.facts-table td { text-align: left; white-space: normal; overflow-wrap: anywhere; } .facts-table th { vertical-align: top; width: 1%; }
footer { margin-top: 50px; padding-bottom: 40px; font-size: 12.5px; }
@media (max-width: 560px) { header { padding-top: 24px; } h1 { font-size: 24px; } .sides { gap: 6px; } .glossary { grid-template-columns: 1fr; gap: 0; } .glossary dd { margin-bottom: 8px; } th, td { padding: 5px 7px; } }
"""

# Keeps the two videos of a pair at the same moment and shows which prompt holds; the page reads the
# same without it.
SCRIPT = """
document.querySelectorAll('.pair').forEach(function (pair) {
  var videos = pair.querySelectorAll('video'), first = videos[0], items = pair.querySelectorAll('li[data-from]');
  function follow() {
    for (var i = 1; i < videos.length; i++)
      if (Math.abs(videos[i].currentTime - first.currentTime) > 0.12) videos[i].currentTime = first.currentTime;
    var at = first.currentTime / (first.duration || 1);
    items.forEach(function (item, i) {
      var stop = i + 1 < items.length ? +items[i + 1].dataset.from : 2;
      item.classList.toggle('now', at >= +item.dataset.from && at < stop);
    });
  }
  first.addEventListener('timeupdate', follow);
  first.addEventListener('seeked', follow);
  first.addEventListener('play', function () { videos.forEach(function (v) { v.play(); }); });
  first.addEventListener('pause', function () { videos.forEach(function (v) { v.pause(); }); });
});
"""
