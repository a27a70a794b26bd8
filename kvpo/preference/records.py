"""Reader of a folder of preferences, as the studio records it (docs/studio.md).

preferences.jsonl     picks and pairs, one a line
clips/ID/ROW.mp4      the clips that they are about

A line that is no JSON is what a killed process leaves, and is passed over with a word; so is an
answer whose clips are gone. A line that is JSON and no answer is refused with its number: somebody
wrote it, and meant something.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

FILE = "preferences.jsonl"
UNNAMED = "(no name)"
"""Label of raters who gave none."""
CREDIT = {"left": 1.0, "right": 0.0, "same": 0.5}
"""Share of a win that an answer gives to the left clip."""


@dataclass(frozen=True)
class Versus:
    """One comparison of two clips of an answer."""

    first: int
    second: int
    """Numbers of the clips among those of the answer."""
    credit: float
    """Share of a win of the first one: 1, 0, or 1/2 for a tie."""
    weight: float
    """Weight of the comparison; those of one answer sum to 1."""


@dataclass(frozen=True)
class Answer:
    """One statement of one person."""

    line: int
    kind: str
    """``pair`` or ``pick``."""
    clips: tuple[Path, ...]
    versus: tuple[Versus, ...]
    rater: str
    story: str
    generator: str


@dataclass(frozen=True)
class Records:
    """Answers of a folder, and what of it was passed over."""

    answers: tuple[Answer, ...]
    broken: tuple[int, ...]
    """Numbers of the lines that are no JSON."""
    missing: tuple[str, ...]
    """Clips that are not there, as the lines name them."""
    dropped: int
    """Answers that were passed over because clips of theirs are missing."""

    def words(self) -> list[str]:
        """Sentences about what was passed over, none where nothing was."""
        said = []
        if self.broken:
            numbers = ", ".join(map(str, self.broken[:8]))
            said.append(
                f"passed over {len(self.broken)} unfinished lines of {FILE} (line {numbers}): a process was killed while it wrote them"
            )
        if self.missing:
            more = f" and {len(self.missing) - 5} more" if len(self.missing) > 5 else ""
            said.append(
                f"passed over {self.dropped} answers whose clips are missing: {', '.join(self.missing[:5])}{more}"
            )
        return said


def read_lines(path: Path) -> tuple[list[tuple[int, Any]], list[int]]:
    """Read a JSONL file that was appended to: (number, value) of each line, numbers of broken ones.

    A file that is not there has none.
    """
    found: list[tuple[int, Any]] = []
    broken: list[int] = []
    for number, text in enumerate(path.read_bytes().split(b"\n") if path.is_file() else [], 1):
        try:
            if text.strip():
                found.append((number, json.loads(text)))
        except (ValueError, RecursionError):
            broken.append(number)
    return found, broken


def read_records(folder: Path) -> Records:
    """Read the answers of a folder.

    Raises FileNotFoundError where it is no such folder, ValueError with file and line for a line
    that is no answer.
    """
    path = folder / FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing: give the folder of a studio in which choices were made (`kvpo studio` writes runs/studio)"
        )
    lines, broken = read_lines(path)
    answers, missing, dropped = [], dict[str, None](), 0
    for number, value in lines:
        answer = _answer(path, number, value)
        absent = [clip for clip in answer.clips if not clip.is_file()]
        missing |= dict.fromkeys(str(clip.relative_to(folder)) for clip in absent)
        dropped += bool(absent)
        answers += [] if absent else [answer]
    return Records(tuple(answers), tuple(broken), tuple(missing), dropped)


def _answer(path: Path, number: int, value: object) -> Answer:
    where = f"{path}, line {number}"
    if not isinstance(value, dict) or value.get("kind") not in ("pair", "pick"):
        raise ValueError(
            f"{where} is {json.dumps(value)[:80]}, which is no answer: its kind must be pair or pick; take the line out"
        )
    rows = value.get("rows")
    if not isinstance(rows, list) or len(rows) < 2 or not all(map(_inside, rows)):
        raise ValueError(
            f"{where}: its rows are {json.dumps(rows)[:80]}; they must be the paths of two or more clips within the folder: correct the line, or take it out"
        )
    story, rater = value.get("story"), value.get("rater", "")
    if not isinstance(story, str) or not story or not isinstance(rater, str):
        raise ValueError(
            f"{where}: its story is {json.dumps(story)[:80]} and its rater {json.dumps(rater)[:80]}; both must be texts, the first not empty: correct the line, or take it out"
        )
    versus = (_of_pair if value["kind"] == "pair" else _of_pick)(where, value, len(rows))
    clips = tuple(path.parent / row for row in rows)
    generator = str(value.get("generator", ""))
    return Answer(number, value["kind"], clips, versus, rater or UNNAMED, story, generator)


def _inside(row: object) -> bool:
    """Whether a clip's path stays within the folder."""
    if not isinstance(row, str) or not row or "\0" in row:
        return False
    path = PurePosixPath(row)
    return not path.is_absolute() and ".." not in path.parts


def _of_pair(where: str, value: Mapping[str, Any], many: int) -> tuple[Versus, ...]:
    answer = value.get("answer")
    if many != 2 or not isinstance(answer, str) or answer not in CREDIT:
        raise ValueError(
            f"{where}: a pair of {many} clips with the answer {json.dumps(answer)[:80]}; it must have two, and left, right or same: correct the line, or take it out"
        )
    return (Versus(0, 1, CREDIT[answer], 1.0),)


def _of_pick(where: str, value: Mapping[str, Any], many: int) -> tuple[Versus, ...]:
    """Compare the chosen row with every other one; together they weigh as much as a pair."""
    chosen = value.get("chosen")
    if type(chosen) is not int or not 0 <= chosen < many:
        raise ValueError(
            f"{where}: chosen is {json.dumps(chosen)[:80]}; it must be a row from 0 to {many - 1}: correct the line, or take it out"
        )
    return tuple(Versus(chosen, i, 1.0, 1 / (many - 1)) for i in range(many) if i != chosen)
