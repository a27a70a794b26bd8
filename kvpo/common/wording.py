"""Numbers as people say them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def count_of(number: int, thing: str) -> str:
    """A number with its noun: 1 block, 2 blocks."""
    return f"{number} {thing}" + ("s" if number != 1 else "")


def nearest(name: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """The known name that a mistyped one is nearest to; "" where none is near."""
    return next(iter(difflib.get_close_matches(name, [*known], n=1, cutoff=cutoff)), "")


def in_time(seconds: float) -> str:
    """A span of time in the unit that it fills: 2 ms, 40 s, 12 min, 3.5 h, 4.0 days."""
    units = (("ms", 1e-3, 1.0), ("s", 1.0, 120.0), ("min", 60.0, 7200.0), ("h", 3600.0, 172800.0))
    for unit, size, most in units:
        if seconds < most:
            number = seconds / size
            return f"{number:.3g} {unit}" if number < 10 else f"{number:.0f} {unit}"
    days = seconds / 86400
    return f"{days:.1f} days" if days < 10 else f"{days:.0f} days"
