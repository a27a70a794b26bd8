"""The report's moving pictures: before and after, and the branches of one group.

The branches are shown with what they read and what came of it.
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

from kvpo.common.pictures import html_image, html_video
from kvpo.pages import html as page
from kvpo.report.read_run import Group, Missing, Sample, number

MAX_PAIRS = 8
"""Largest number of before/after pairs shown."""
MAX_VIDEO_BYTES = 48 * 2**20
"""Bytes of video that a page embeds; videos beyond this are only named.

A page of base64 much larger than this opens badly on a phone.
"""


def pairs(samples: Sequence[Sample], sentence: str = "") -> tuple[str, str]:
    """Show one script and seed from the start weights and from the last ones, side by side.

    ``sentence``: what was measured, in one.
    """
    both = _paired(samples)
    cards, left, room = [], [], MAX_VIDEO_BYTES
    for pair in both[:MAX_PAIRS]:
        room -= sum(sample.path.stat().st_size for sample in pair)
        if room < 0:
            left += [f"{sample.path.parent.name}/{sample.path.name}" for sample in pair]
        else:
            cards.append(_card(*pair))
    notes = [f"{len(both) - MAX_PAIRS} more pairs are in the run's folder."] * (
        len(both) > MAX_PAIRS
    ) + [f"Too large to embed: {', '.join(left)}."] * bool(left)
    lead = (
        (sentence + " " if sentence else "")
        + "Left: the start weights. Right: the trained ones. Same script, same seed, same noise; nothing was picked by looking."
    )
    return lead, f'<div class="pairs">{"".join(cards)}</div>' + "".join(
        f'<p class="note">{html.escape(note)}</p>' for note in notes
    )


def _paired(samples: Sequence[Sample]) -> list[tuple[Sample, Sample]]:
    """Pair samples (before, after) by script and seed.

    After = the last step's, EMA weights rather than online ones.
    """
    before = {
        (s.script_id, s.seed): s for s in reversed(samples) if s.which == "start" or s.step == 0
    }
    trained = [s for s in samples if s.which != "start" and s.step > 0]
    last = max((s.step for s in trained), default=0)
    after = {
        (s.script_id, s.seed): s
        for s in sorted(trained, key=lambda s: s.which == "ema")
        if s.step == last
    }
    both = [(before[key], sample) for key, sample in after.items() if key in before]
    if not both:
        raise Missing(
            f"no script and seed was sampled both from the start weights ({len(before)} videos) and from trained ones (step {last}, {len(after)} videos)"
        )
    return both


def _card(before: Sample, after: Sample) -> str:
    sides = (
        (before, "start weights"),
        (
            after,
            f"{'EMA weights' if after.which == 'ema' else 'trained weights'}, step {after.step}",
        ),
    )
    videos = "".join(
        f"<figure><figcaption>{name}</figcaption>{html_video(s.path, f'{name}: {s.texts[0]}')}</figure>"
        for s, name in sides
    )
    name = f'<p class="note">script {html.escape(before.script_id)}, seed {before.seed}</p>'
    return f'<div class="pair"><div class="sides">{videos}</div>{_prompts(before.texts, before.starts, before.blocks)}{name}</div>'


def _prompts(texts: Sequence[str], starts: Sequence[int], blocks: int | None) -> str:
    """List the segments' prompts.

    Where the video's length is known the page's script lights up the one that holds.
    """
    items = []
    for text, start in zip(texts, starts):
        place = f' data-from="{start / blocks:.4f}"' if blocks else ' class="now"'
        items.append(
            f'<li{place}>{html.escape(text)}<span class="when">from block {start}{f" of {blocks}" if blocks else ""}</span></li>'
        )
    return f"<ol>{''.join(items)}</ol>"


def group(shown: Group) -> tuple[str, str]:
    record = shown.record
    grid, routing = shown.folder / "grid.mp4", shown.folder / "routing.png"
    video = (
        html_video(grid, "the branches of the group and their anchor")
        if grid.is_file()
        else page.missing("the group has no grid.mp4")
    )
    image = (
        html_image(routing, "which past frames each branch reads")
        if routing.is_file()
        else page.missing("the group has no routing.png")
    )
    differ = record.get("differ") or (  # older runs have the mix alone
        "the noise they start from"
        if any(record.get("noise_mix") or ())
        else "which past frames they read from there on"
    )
    lead = f"Update {shown.step + 1}: the branches leave the shared prefix at block {record['fork']} and differ only in {differ}."
    return (
        lead,
        f"""{_prompts(record["texts"], record["starts"], None)}<div class="grid">{video}</div>
<h3>Which past frames each row reads</h3>{image}
<h3>What came of it</h3>{_numbers(record)}
<p class="note">Bold: the highest of its column; best: the branch of the highest advantage. The anchor reads the rolling window; pi is over the rows that have one.</p>""",
    )


def _numbers(record: Mapping[str, Any]) -> str:
    """Rewards, energy, advantage and pi of every row, and the frames it read."""
    plans = record["plans"]
    names = [*(f"branch {g}" for g in range(len(plans) - 1)), "anchor"]
    columns = {
        f"{name}, {signal}": values
        for signal, part in record["rewards"].items()
        for name, values in part.items()
    }
    columns |= {
        name: record.get(key) or []
        for name, key in (("energy", "energies"), ("advantage", "advantages"), ("pi", "pi"))
    }
    cells = [
        _column(list(map(number, values)), len(names), name != "energy")
        for name, values in columns.items()
    ]
    best = _best(list(map(number, record.get("advantages") or [])))
    if best is not None:
        names[best] += ' <span class="badge">best</span>'
    frames = [html.escape(" ".join(map(str, plan)) or "rolling window") for plan in plans]
    return page.table(
        ["row", *map(html.escape, columns), "routed frames"],
        zip(names, *cells, frames),
        marked=best,
    )


def _best(advantages: list[float]) -> int | None:
    """Number of the branch of the highest advantage; none where all are equal, or none is known."""
    finite = [a for a in advantages if math.isfinite(a)]
    return advantages.index(max(finite)) if len(set(finite)) > 1 else None


def _column(values: list[float], rows: int, ranked: bool) -> list[str]:
    """Cells of a column; one that is ``ranked`` has its largest value bold, unless all are equal.

    The anchor may lack a value.
    """
    finite = {value for value in values if math.isfinite(value)}
    best = max(finite) if ranked and len(finite) > 1 else None
    values = values + [math.nan] * (rows - len(values))
    return [f"<b>{page.num(value)}</b>" if value == best else page.num(value) for value in values]
