"""JSON values of a file with the place at which each begins.

A file is one list, a value a line, or values over several lines.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from kvpo.common.text_files import HARD_ENDS

_SPACE = re.compile(r"\s*")
_BETWEEN = re.compile(r"[\s,]*")


class JsonFault(ValueError):
    """Text that is no JSON, or says one thing twice; ``at``: its offset."""

    def __init__(self, message: str, at: int):
        super().__init__(message)
        self.at = at


def json_values(text: str) -> Iterator[tuple[int, str, Any]]:
    """Yield (offset, name, value) of every value.

    ``name`` is its place in a list, "" for values that stand alone.

    A list whose elements are objects is a list of values; any other list is one value.
    `JsonFault` for the first fault.
    """
    first = HARD_ENDS.split(text.strip(), maxsplit=1)[0]
    if _is_json(first) and not first.startswith("[{"):
        yield from _one_a_line(text)
    elif re.match(r"\s*\[\s*\{", text):
        yield from _listed(text)
    else:
        yield from _after_one_another(text)


def _one_a_line(text: str) -> Iterator[tuple[int, str, Any]]:
    """Read one value a line.

    A broken line is then that line's fault, and not that of the one where a reader of the whole
    text stumbles.
    """
    begin = 0
    for end in [*(m.end() for m in HARD_ENDS.finditer(text)), len(text)]:
        line = text[begin:end].rstrip("\r\n")
        if line.strip():
            yield begin, "", _read(line, begin)[0]
        begin = end


def _listed(text: str) -> Iterator[tuple[int, str, Any]]:
    values, decoder = _read(text.rstrip(), 0)[0], json.JSONDecoder()
    at = text.index("[") + 1
    for index, value in enumerate(values):
        at = _behind(_BETWEEN, text, at)
        yield at, f"[{index}]", value
        at = decoder.raw_decode(text, at)[1]


def _after_one_another(text: str) -> Iterator[tuple[int, str, Any]]:
    at, text = _behind(_SPACE, text), text.rstrip()
    while at < len(text):
        value, end = _read(text[at:], at, whole=False)
        yield at, "", value
        at = _behind(_SPACE, text, at + end)


def _behind(pattern: re.Pattern, text: str, at: int = 0) -> int:
    """Offset behind what a pattern, which may be empty, takes at ``at``."""
    found = pattern.match(text, at)
    return at if found is None else found.end()


def _read(text: str, begin: int, whole: bool = True) -> tuple[Any, int]:
    """(value, offset behind it); ``begin``: the text's own offset, for faults."""
    decoder = json.JSONDecoder(object_pairs_hook=_without_twins)
    lead = _behind(_SPACE, text)
    try:
        value, end = decoder.raw_decode(text, lead)
    except json.JSONDecodeError as error:
        raise JsonFault(f"not JSON ({error.msg}); correct it there", begin + error.pos) from None
    except RecursionError:
        raise JsonFault(
            "brackets within brackets without end; write plain lists of texts",
            begin + lead,
        ) from None
    except ValueError as error:  # a number too long to be read
        raise JsonFault(f"not JSON ({error}); write a shorter number", begin + lead) from None
    except _Twins as twins:
        raise JsonFault(
            f"the key {str(twins)!r} stands there twice, and only one could be read; take one out",
            begin + lead,
        ) from None
    if whole and text[end:].strip():
        raise JsonFault(
            "not JSON (something follows the value); put it on a line of its own, or take it out",
            begin + _behind(_SPACE, text, end),
        )
    return value, end


class _Twins(Exception):
    """A key that an object has twice."""


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise _Twins(key)
        found[key] = value
    return found


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True
