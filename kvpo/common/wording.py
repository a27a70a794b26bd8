"""Numbers as people say them."""

from __future__ import annotations


def count_of(number: int, thing: str) -> str:
    """A number with its noun: 1 block, 2 blocks."""
    return f"{number} {thing}" + ("s" if number != 1 else "")


def in_time(seconds: float) -> str:
    """A span of time in the unit that it fills: 2 ms, 40 s, 12 min, 3.5 h, 4 days."""
    for unit, size, most in (
        ("ms", 1e-3, 1.0),
        ("s", 1.0, 120.0),
        ("min", 60.0, 7200.0),
        ("h", 3600.0, 172800.0),
    ):
        if seconds < most:
            return (
                f"{seconds / size:.2g} {unit}"
                if seconds / size < 10
                else f"{seconds / size:.0f} {unit}"
            )
    return f"{seconds / 86400:.1f} days"
