"""Reader of clips.csv, the list of a folder's videos: ``file,prompt``, a line each.

A line that does not fit is refused with its number.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from kvpo.common.text_files import fault_of_text, lines_of, read_text, shows_nothing

COLUMNS = ("file", "prompt")


class ClipRow(NamedTuple):
    """One line of the list."""

    line: int
    file: str
    prompt: str


def clip_rows(path: Path) -> list[ClipRow]:
    """Every line of a clips.csv, in order.

    Raises ValueError that names file and line for anything that is not one file and its prompt.
    """
    cells = _cells(path)
    _, head = next(cells, (0, []))
    head = [name.strip().lower() for name in head]
    if missing := [name for name in COLUMNS if head.count(name) != 1]:
        hint = (
            "; cells are separated by commas"
            if len(head) == 1 and any(c in head[0] for c in ";\t|")
            else ""
        )
        raise ValueError(
            f"{path}, line 1: the head line must have each of the columns file and prompt once, "
            f"as in `file,prompt`, but it is {head} ({missing[0]}){hint}"
        )
    rows = [_row(path, line, head, row) for line, row in cells]
    if not rows:
        raise ValueError(
            f"{path} lists no clip; give it at least one line `file,prompt` after the head line"
        )
    _refuse_twins(path, rows)
    return rows


def _refuse_twins(path: Path, rows: Sequence[ClipRow]) -> None:
    """Refuse a clip that stands there twice with one prompt: it would count twice."""
    seen: dict[tuple[str, str], int] = {}
    for row in rows:
        if (before := seen.setdefault(row[1:], row.line)) != row.line:
            raise ValueError(
                f"{path}, line {row.line}: {row.file} with this prompt stands in line {before} already, and would count twice; take one out"
            )


def _cells(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield (line at which it begins, cells) of every row that is not blank.

    A cell in quotes may go over several lines.
    """
    lines = [f"{line}\n" for _, line in lines_of(path, read_text(path))]
    reader, begin = csv.reader(lines, strict=True, skipinitialspace=True), 1
    while True:
        try:
            row = next(reader, None)
        except csv.Error as error:
            raise ValueError(
                f"{path}, line {begin}: the quotes do not fit ({error}); put a cell with commas "
                f"in quotes, and double the quotes in it"
            ) from None
        if row is None:
            return
        if any(cell.strip() for cell in row):
            yield begin, row
        begin = reader.line_num + 1


def _row(path: Path, line: int, head: list[str], cells: list[str]) -> ClipRow:
    where = f"{path}, line {line}"
    if len(cells) > len(head):
        raise ValueError(
            f"{where}: {len(cells)} cells under {len(head)} columns, {cells}; put a prompt that "
            f'has commas in quotes, as in a.mp4,"a cat, at night"'
        )
    if len(cells) < len(head):
        raise ValueError(
            f"{where}: {len(cells)} cells under {len(head)} columns, {cells}; give every line "
            f"its file and its prompt"
        )
    found = dict(zip(head, cells))
    for name in COLUMNS:
        if shows_nothing(found[name]):
            raise ValueError(
                f"{where}: it has no {name}, {cells}; give every line its file and its prompt"
            )
        if fault := fault_of_text(found[name]):
            raise ValueError(f"{where}: the {name} has {fault[1]}")
    return ClipRow(line, found["file"].strip(), found["prompt"].strip())
