"""The table of `kvpo bench`, from what `kvpo.bench.measure.Bench` returns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.table import Table

from kvpo.bench.measure import PHASES

NAMES = {
    "prefix": "prefix",
    "branches": "branches and anchor",
    "decode": "decoding",
    "replay": "replay without gradient",
    "replay_grad": "replay of the update",
    "update": "optimizer",
}
HEAD = ("phase", "s", "TFLOP", "of the rate", "peak GiB")


def tables(result: Mapping[str, Any]) -> list[Table]:
    """A table a schedule."""
    return [_table(name, found) for name, found in result["schedules"].items()]


def _table(name: str, found: Mapping[str, Any]) -> Table:
    table = Table(*HEAD, box=box.SIMPLE_HEAD, title=f"{name}: {found['calls']} calls")
    for column in table.columns[1:]:
        column.justify = "right"
    for phase in PHASES:
        if phase in found["seconds"]:
            table.add_row(*_cells(phase, found))
    work = sum(found["TFLOP"].values())
    table.add_row("together", f"{sum(found['seconds'].values()):.3g}", f"{work:.3g}", "", "")
    return table


def _cells(phase: str, found: Mapping[str, Any]) -> list[str]:
    peak = found["peak GiB above the weights"].get(phase)
    share = found["utilisation"].get(phase)
    work = found["TFLOP"].get(phase)
    return [
        NAMES[phase],
        f"{found['seconds'][phase]:.3g}",
        "" if work is None else f"{work:.3g}",
        "" if share is None else f"{share:.0%}",
        "" if peak is None else f"{peak:.1f}",
    ]


def lines(result: Mapping[str, Any]) -> list[str]:
    """The lines around the tables: hardware, shape, streams, and what was left out."""
    load, both = result["load"], result["schedules"]
    found = [
        f"{result['size']} in {load['dtype']} on {result['environment']['hardware']}: weights {result['weights GiB']:.3g} GiB,"
        f" a large product makes {result['matmul TFLOP/s']:.3g} TFLOP/s",
        f"one group: {load['branches']} branches and the anchor, {load['window_blocks']} blocks from block {load['fork']} on, random weights, no rewards",
    ]
    if len(both) == 2:
        mine, other = (sum(found["seconds"].values()) for found in both.values())
        found.append(
            f"one by one takes {other / mine:.2f} times as long; energies differ by {result['largest difference of energies, relative']:.1e}"
        )
    found += [
        f"{name}: {s['frames a second']:.3g} pixel frames a second ({s['warm-up s']:.3g} s before)"
        for name, s in result["streams"].items()
    ]
    if result["left out"]:
        found.append(f"no time was left for: {', '.join(result['left out'])}")
    return found
