"""Number of scripts an evaluation needs, from the spread of its paired differences.

The differences are those of `kvpo.evaluation.evaluate`.

    n = ((1.960 + 0.842) sd / difference)^2

scripts are enough for a 95 % interval that leaves out 0 in 80 % of evaluations, where the true
difference is that large. It speaks of scripts only: another training of the same recipe moves every
script's difference together, and no number of scripts shows that.
"""

from __future__ import annotations

import math
from statistics import NormalDist

from kvpo.evaluation.intervals import VERDICT_PAIRS

LEVEL, POWER = 0.95, 0.8
SMALL = 0.01
"""A difference that should not be missed, reward units."""
FACTOR = NormalDist().inv_cdf(0.5 + LEVEL / 2) + NormalDist().inv_cdf(POWER)


def scripts_needed(sd: float, difference: float) -> int:
    """Scripts needed to see a difference, at least `VERDICT_PAIRS`.

    0 where no number is enough, or none can be told.
    """
    if not (math.isfinite(sd) and math.isfinite(difference)) or difference == 0.0:
        return 0
    return max(VERDICT_PAIRS, math.ceil((FACTOR * sd / abs(difference)) ** 2))


def spread(low: float, high: float, n: int) -> float:
    """Standard deviation of the differences, from their 95 % interval.

    For evaluations that did not note it.
    """
    return (high - low) / 2.0 / NormalDist().inv_cdf(0.5 + LEVEL / 2) * math.sqrt(n)


def sentence(component: str, n: int, difference: float, sd: float) -> str:
    """Say whether ``n`` scripts were enough for the difference that was found, and for a small one.

    "" where that can not be told.
    """
    observed, small = scripts_needed(sd, difference), scripts_needed(sd, SMALL)
    if not small:
        return ""
    parts = [f"{_takes(n, small)} for one of {SMALL:g}"]
    if observed and abs(difference) != SMALL:
        parts.insert(0, f"{_takes(n, observed)} for the {difference:+#.3g} found")
    return (
        f"{component} on {n} scripts, whose differences spread by {sd:#.3g}: to show a difference in "
        f"4 of 5 evaluations takes {' and '.join(parts)}"
    )


def _takes(n: int, needed: int) -> str:
    return f"{needed} scripts" + (f" (more than these {n})" if n < needed else "")
