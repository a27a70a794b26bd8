"""Goodhart's stop: end a run whose rewards are being gamed.

They are where trained rewards rise and a held-out evaluator falls, twice in succession.

Both are read off a run's evaluations against its start weights. *Rises* and *falls* mean that the
paired difference's 95 % interval leaves out 0, on enough scripts for that to mean something
(`kvpo.evaluation.intervals`). The run then ends, and names the evaluation with the best held-out
score.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kvpo.evaluation.intervals import TOTAL, VERDICT_PAIRS

Rows = Sequence[Mapping]
"""Rows of one comparison, as `kvpo.evaluation.evaluate.compare` makes them."""
SUCCESSIVE = 2


@dataclass(frozen=True)
class Verdict:
    """Verdict of the evaluations so far."""

    best: int
    """Step of the evaluation with the best held-out score; 0 = the start weights are the best."""
    fallen: tuple[str, ...]
    """Held-out evaluators that fell in each of the last evaluations; () = go on.

    The trained rewards rose meanwhile.
    """


def judge(evaluations: Mapping[int, Rows]) -> Verdict:
    """Step -> rows of one set of weights against the start weights."""
    steps = sorted(evaluations)
    scores = {0: 0.0} | {step: held_out_score(evaluations[step]) for step in steps}
    last = [_fallen(evaluations[step]) for step in steps[-SUCCESSIVE:]]
    fallen = set.intersection(*last) if len(last) == SUCCESSIVE else set()
    return Verdict(max(scores, key=lambda step: scores[step]), tuple(sorted(fallen)))


def held_out_score(rows: Rows) -> float:
    """Mean over held-out evaluators of difference / half width of its interval.

    So units do not matter; 0 is the start weights' score.
    """
    measured = [
        row
        for row in rows
        if row["kind"] == "heldout" and row["diff"] is not None and row["high"] > row["low"]
    ]
    return (
        sum(2 * row["diff"] / (row["high"] - row["low"]) for row in measured) / len(measured)
        if measured
        else 0.0
    )


def history(folder: Path, which: str) -> dict[int, Rows]:
    """The comparisons that a run has written of one set of weights."""
    found = {
        int(path.stem.rpartition("-")[2]): path
        for path in Path(folder).glob(f"{which}-step-*.json")
    }
    return {step: json.loads(path.read_text())["rows"] for step, path in sorted(found.items())}


def _fallen(rows: Rows) -> set[str]:
    """Held-out evaluators that surely fell; none unless the trained rewards surely rose."""
    told = [row for row in rows if row["low"] is not None and row["n"] >= VERDICT_PAIRS]
    rose = any(row["component"] == TOTAL and row["low"] > 0 for row in told)
    return (
        {row["component"] for row in told if row["kind"] == "heldout" and row["high"] < 0}
        if rose
        else set()
    )
