"""The formats of prompt files.

A prompt file is one of

    lines      one prompt a line, one script each
    brackets   ``3,[a cat sleeps],[the cat wakes],[it leaves]``: the number of prompts, then the prompts in order
    JSONL      ``{"prompts": ["a cat sleeps", "the cat wakes"], "starts": [0, 13], "id": "cat"}``, the last two optional,
               or ``{"prompt": "a cat sleeps"}``
    JSON       one list of such objects, or objects over several lines

told apart by the first line, whatever the file is called; docs/prompts.md says all of it. Blank
lines are skipped; anything else that does not fit is refused with its line, never dropped: a script
that is silently missing, or cut in the wrong place, cannot be seen in a loss.
"""

from __future__ import annotations

import json
import re
from bisect import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvpo.common.json_values import JsonFault, json_values
from kvpo.common.text_files import (
    HARD_ENDS,
    SOFT_ENDS,
    fault_of_text,
    lines_of,
    read_text,
    shows_nothing,
)

_BRACKETED = re.compile(r"\s*(\d+\s*,\s*(\[|$)|\[)")
"""Beginning of a line in the bracketed format, its forgotten count included."""
_JSON = re.compile(r"""\s*(\{\s*["'}]|\[\s*(["'{\[]|$))""")
"""Beginning of JSON, single quotes and an opening bracket alone on its line included.

A prompt in braces is no JSON.
"""
_KEYS = ("prompts", "prompt", "starts", "id")
_TABLE, _MARKUP = "it is a table", "it is no list of lines"
_OTHER_KINDS = {
    **dict.fromkeys((".csv", ".tsv"), _TABLE),
    **dict.fromkeys((".yaml", ".yml", ".md", ".xml", ".html"), _MARKUP),
}
"""Endings of files that have a form of their own.

Their plain lines can be read, and what is read are no prompts: `id,prompt` is a head, `- a cat`
a list's item.
"""


@dataclass(frozen=True)
class Place:
    """Place of a script in a prompt file, for its id and for errors."""

    path: Path
    line: int
    text: str
    name: str = ""
    """Id of the script where it gives none itself; "" = file and line."""

    @property
    def id(self) -> str:
        return self.name or f"{self.path.name}:{self.line}"

    def error(self, message: str, at: int | None = None) -> ValueError:
        """``at``: offset of the fault in the line, from 0."""
        column = "" if at is None else f", column {at + 1}"
        shown = self.text if len(self.text) <= 80 else self.text[:77] + "..."
        return ValueError(f"{self.path}, line {self.line}{column}: {message}. The line: {shown}")


Texts = tuple[str, ...]


def records(path: Path) -> Iterator[tuple[Place, str | None, Texts, tuple[int, ...] | None]]:
    """(place, id, prompts, starts) of every line that is not blank."""
    text = read_text(path)
    if (kind := path.suffix.lower()) in _OTHER_KINDS:
        raise ValueError(
            f"{path}: {_OTHER_KINDS[kind]}, whose columns and marks would be read as a part of the prompts; write one prompt a line into a .txt, or JSONL"
        )
    if kind in (".jsonl", ".ndjson", ".json") or _JSON.match(text) or _is_json_text(text):
        yield from ((where, *_json_script(where, row)) for where, row in _json_rows(path, text))
        return
    lines = [Place(path, i, line) for i, line in lines_of(path, text) if line.strip()]
    bracketed = bool(lines and _BRACKETED.match(lines[0].text))
    for where in lines:
        if not bracketed and _BRACKETED.match(where.text):
            raise where.error(
                "this looks like the format N,[a],[b], but the file begins with plain lines; keep one format a file"
            )
        if not bracketed and _JSON.match(where.text):
            raise where.error(
                "this looks like JSON, but the file begins with plain lines; keep one format a file"
            )
        if not bracketed and "\t" in where.text.strip():
            raise where.error(
                "there is a tab in the line, as between the cells of a table; write one prompt a line, or JSONL, which can hold any text"
            )
        yield where, None, _bracketed(where) if bracketed else (_prompt(where, where.text),), None


def _is_json_text(text: str) -> bool:
    """Whether the first line is a text of JSON and nothing else: its quotes are no part of it."""
    first = next(filter(str.strip, text.splitlines()), "").strip()
    return len(first) > 1 and first[0] == first[-1] == '"' and '"' not in first[1:-1]


def _json_rows(path: Path, text: str) -> Iterator[tuple[Place, Any]]:
    """(place, value) of every value in JSON."""
    ends = HARD_ENDS if HARD_ENDS.search(text) else SOFT_ENDS
    begins, lines = [0, *(end.end() for end in ends.finditer(text))], ends.split(text)

    def place(at: int, name: str = "") -> tuple[Place, int]:
        number = bisect(begins, at)
        return Place(path, number, lines[number - 1], name and f"{path.name}{name}"), at - begins[
            number - 1
        ]

    try:
        for at, name, value in json_values(text):
            yield place(at, name)[0], value
    except JsonFault as fault:
        where, column = place(min(fault.at, len(text.rstrip())))
        raise where.error(str(fault), column) from None


def _bracketed(where: Place) -> Texts:
    """Prompts of one line ``N,[a],[b]``.

    Brackets inside a prompt must be balanced, and belong to it.
    """
    text = where.text
    count = re.match(r"\s*(\d+)\s*,", text)
    if not count:
        raise where.error(
            "the line must begin with the number of its prompts and a comma, as in 2,[a],[b] (JSONL can hold any text)",
            0,
        )
    spans, stray = outer_brackets(text)
    if stray:
        raise where.error(
            f"unbalanced {text[stray[0]]!r}; close it or take it out (JSONL can hold any text)",
            stray[0],
        )
    _check_separators(where, count.end(), spans)
    if not spans:
        raise where.error("there are no prompts in it; take the line out")
    if len(spans) != int(count[1]):
        raise where.error(
            f"it says {count[1]} prompts but has {len(spans)}; correct the count or the brackets",
            count.start(1),
        )
    return tuple(_prompt(where, text[start + 1 : stop], start) for start, stop in spans)


def outer_brackets(text: str) -> tuple[list[tuple[int, int]], list[int]]:
    """Find the outermost closed pairs and all brackets without a partner.

    Returns the offsets (opening, closing) of the pairs, and the offsets of the others.
    """
    pairs, opened, stray = [], [], []
    for at, letter in enumerate(text):
        if letter == "[":
            opened.append(at)
        elif letter == "]" and opened:
            start = opened.pop()
            if not opened:
                pairs.append((start, at))
        elif letter == "]":
            stray.append(at)
    return pairs, sorted(stray + opened)


def _check_separators(where: Place, begin: int, spans: Sequence[tuple[int, int]]) -> None:
    """Check that one comma stands between prompts, and nothing before or after them."""
    opens, closes = [start for start, _ in spans], [stop + 1 for _, stop in spans]
    for i, (left, right) in enumerate(zip([begin, *closes], [*opens, len(where.text)])):
        found, wanted = where.text[left:right].strip(), "," if 0 < i < len(spans) else ""
        if found != wanted:
            at = left + len(where.text[left:right]) - len(where.text[left:right].lstrip())
            raise where.error(
                f"{found!r} stands outside the brackets, where there should be {'one comma' if wanted else 'nothing'}; take it out",
                at,
            )


def _json_script(where: Place, row: Any) -> tuple[str | None, Texts, tuple[int, ...] | None]:
    """(id, prompts, starts) of one JSON value."""
    if isinstance(row, str):
        raise where.error(
            'the text stands in quotes, which would be read as a part of the prompt; take them out, or write {"prompt": "..."}'
        )
    if not isinstance(row, dict) or ("prompts" in row) == ("prompt" in row):
        raise where.error(
            'a script must be an object with the key "prompts", a list of texts, or "prompt", one text'
        )
    if unknown := sorted(set(row) - set(_KEYS)):
        raise where.error(f"unknown keys {unknown}; known are {', '.join(_KEYS)}")
    prompts = (
        _prompts(where, row["prompts"]) if "prompts" in row else (_prompt(where, row["prompt"]),)
    )
    starts = _starts(where, row.get("starts"))
    if starts is not None and len(starts) != len(prompts):
        raise where.error(
            f"{len(prompts)} prompts but {len(starts)} starts; give one start per prompt, or leave starts out"
        )
    return _id(where, row.get("id")), prompts, starts


def _prompts(where: Place, value: object) -> Texts:
    if not isinstance(value, list) or not value:
        raise where.error(f'"prompts" must be a list of at least one text, not {json.dumps(value)}')
    return tuple(_prompt(where, text) for text in value)


def _prompt(where: Place, text: object, at: int | None = None) -> str:
    """``at``: where in the line the text begins, if it is the line's own text."""
    try:
        return readable(text)
    except ValueError as error:
        raise where.error(str(error), at) from None


def readable(text: object) -> str:
    """Return a prompt without the blanks around it.

    Raises ValueError for what is no text, shows nothing, or can not be read as it was meant.
    """
    if not isinstance(text, str) or shows_nothing(text):
        raise ValueError(f"a prompt must be text that is not blank, not {json.dumps(text)}")
    if fault := fault_of_text(text):
        raise ValueError(
            f"the prompt {json.dumps(text if len(text) <= 60 else text[:57] + '...')} has {fault[1]}"
        )
    return text.strip()


def _starts(where: Place, value: object) -> tuple[int, ...] | None:
    if value is None:
        return None
    if not isinstance(value, list) or any(type(block) is not int for block in value):
        raise where.error(
            f'"starts" must be a list of whole numbers, the first block of every prompt, not {json.dumps(value)}'
        )
    return tuple(value)


def _id(where: Place, value: object) -> str | None:
    if value is None:
        return None
    if isinstance(value, str):
        value = value.strip()
    if type(value) not in (str, int) or not str(value).strip() or not str(value).isprintable():
        raise where.error(f'"id" must be a number or a printable text, not {json.dumps(value)}')
    return str(value)
