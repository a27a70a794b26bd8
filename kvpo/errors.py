"""What others' errors say, in one line."""

from __future__ import annotations


def first_line(error: BaseException) -> str:
    """Of its text; of one that says nothing, its name."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
