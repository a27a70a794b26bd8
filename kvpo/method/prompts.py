"""Stage 1: prompt files -> scripts, and which script each group of each step gets.

A prompt file is one of

    lines      one prompt a line, one script each
    brackets   ``3,[a cat sleeps],[the cat wakes],[it leaves]``: the number of prompts, then the prompts in order
    JSONL      ``{"prompts": ["a cat sleeps", "the cat wakes"], "starts": [0, 13], "id": "cat"}``, the last two optional

told apart by the suffix ``.jsonl`` and by the first line.  Blank lines are skipped; anything else that does not fit is
refused with its line, never dropped: a script that is silently missing, or cut in the wrong place, cannot be seen in a loss.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Iterator, Protocol, Sequence

import torch

from kvpo.common.rng import stream
from kvpo.types import Script

_BRACKETED = re.compile(r"\s*(\d+\s*,\s*(\[|$)|\[)")
"""How a line of the bracketed format begins, its forgotten count included."""
_KEYS = ("prompts", "starts", "id")


class ScriptSource(Protocol):
    """Where scripts come from: a prompt file (`PromptSet`), or stories without end (`kvpo.mini.source.StorySource`)."""

    def script(self, step: int, index: int) -> Script:
        """The script of group ``index`` of a step, whichever rank asks."""
        ...


@dataclass(frozen=True)
class PromptSet:
    """Scripts in an endless shuffled order: every epoch is a permutation, and the place in it follows from the step alone."""

    scripts: tuple[Script, ...]
    groups: int
    """Groups of one step, over all ranks."""
    seed: int

    def __post_init__(self):
        if not self.scripts:
            raise ValueError("a prompt set needs at least one script")
        if self.groups < 1:
            raise ValueError(f"groups = {self.groups}, but a step has at least one group")

    def script(self, step: int, index: int) -> Script:
        if step < 0 or not 0 <= index < self.groups:
            raise ValueError(f"group {index} of step {step} does not exist: steps count from 0, and a step has groups 0 to {self.groups - 1}")
        epoch, place = divmod(step * self.groups + index, len(self.scripts))
        order = torch.randperm(len(self.scripts), generator=stream(self.seed, "order", epoch))
        return self.scripts[int(order[place])]


def even_starts(segments: int, blocks: int) -> tuple[int, ...]:
    """First block of every segment; segments as even as possible, lengths differing by at most one block."""
    if not 1 <= segments <= blocks:
        raise ValueError(f"{segments} segments in a video of {blocks} blocks: every segment needs at least one block; lengthen the video or drop segments")
    return tuple(i * blocks // segments for i in range(segments))


def starts_at(switches: Sequence[int], segments: int) -> tuple[int, ...]:
    """First block of every segment from a list of switch blocks, of which a shorter script uses the first ones."""
    if len(switches) < segments - 1:
        raise ValueError(f"{segments} segments need {segments - 1} switch blocks, but switches = {list(switches)}; add switches, drop segments, or leave switches out")
    return (0, *switches[: segments - 1])


def read_scripts(
    path: str | Path, blocks: int, *, switches: Sequence[int] | None = None, max_segments: int | None = None
) -> tuple[Script, ...]:
    """Every script of a prompt file, for videos of ``blocks`` blocks.

    ``switches``: blocks at which the second, third, ... prompt takes over, for scripts without their own ``starts``
    (the paper's latent frames 39, 75, 111 of 147 are blocks 13, 25, 37 of 49); None: `even_starts`.
    ``max_segments``: only the first prompts of every script are kept.
    ValueError naming file, line and column.
    """
    path = Path(path)
    if max_segments is not None and max_segments < 1:
        raise ValueError(f"max_segments = {max_segments} would leave scripts without a prompt; set 1 or more, or leave it out")
    scripts: dict[str, Script] = {}
    for where, id, texts, starts in _records(path):
        texts = texts[:max_segments]
        try:
            if starts is None:
                starts = even_starts(len(texts), blocks) if switches is None else starts_at(switches, len(texts))
            script = Script(id or f"{path.name}:{where.line}", texts, starts[:max_segments], blocks)
        except ValueError as error:
            raise where.error(str(error)) from None
        if script.id in scripts:
            raise where.error(f"the id {script.id!r} is taken by an earlier line, and ids name the random streams; give every script its own")
        scripts[script.id] = script
    if not scripts:
        raise ValueError(f"{path}: no prompts in it; write one prompt a line, N,[a],[b] or JSONL")
    return tuple(scripts.values())


# --- Formats ---


@dataclass(frozen=True)
class _Where:
    path: Path
    line: int
    text: str

    def error(self, message: str, at: int | None = None) -> ValueError:
        """``at``: offset of the fault in the line, from 0."""
        column = "" if at is None else f", column {at + 1}"
        shown = self.text if len(self.text) <= 80 else self.text[:77] + "..."
        return ValueError(f"{self.path}, line {self.line}{column}: {message}. The line: {shown}")


Texts = tuple[str, ...]


def _records(path: Path) -> Iterator[tuple[_Where, str | None, Texts, tuple[int, ...] | None]]:
    """(place, id, prompts, starts) of every line that is not blank."""
    lines = [_Where(path, i, line) for i, line in enumerate(_decoded(path).split("\n"), start=1) if line.strip()]
    if path.suffix.lower() == ".jsonl":
        yield from ((where, *_jsonl(where)) for where in lines)
        return
    bracketed = bool(lines and _BRACKETED.match(lines[0].text))
    for where in lines:
        if not bracketed and _BRACKETED.match(where.text):
            raise where.error("this looks like the format N,[a],[b], but the file begins with plain lines; keep one format a file")
        yield where, None, _bracketed(where) if bracketed else (where.text.strip(),), None


def _decoded(path: Path) -> str:
    raw = path.read_bytes()
    try:
        return raw.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}, line {line}: byte 0x{raw[error.start]:02x} is not UTF-8; save the file as UTF-8 text") from None


def _bracketed(where: _Where) -> Texts:
    """Prompts of one line ``N,[a],[b]``; brackets inside a prompt must be balanced, and belong to it."""
    text = where.text
    count = re.match(r"\s*(\d+)\s*,", text)
    if not count:
        raise where.error("the line must begin with the number of its prompts and a comma, as in 2,[a],[b] (JSONL can hold any text)", 0)
    spans, stray = outer_brackets(text)
    if stray:
        raise where.error(f"unbalanced {text[stray[0]]!r}; close it or take it out (JSONL can hold any text)", stray[0])
    _check_separators(where, count.end(), spans)
    if not spans:
        raise where.error("there are no prompts in it; take the line out")
    if len(spans) != int(count[1]):
        raise where.error(f"it says {count[1]} prompts but has {len(spans)}; correct the count or the brackets", count.start(1))
    return tuple(_prompt(where, text[start + 1 : stop], start) for start, stop in spans)


def outer_brackets(text: str) -> tuple[list[tuple[int, int]], list[int]]:
    """Offsets of the outermost closed pairs (opening, closing), and of all brackets without a partner."""
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


def _check_separators(where: _Where, begin: int, spans: Sequence[tuple[int, int]]) -> None:
    """Between prompts stands one comma; before the first and after the last nothing."""
    opens, closes = [start for start, _ in spans], [stop + 1 for _, stop in spans]
    for i, (left, right) in enumerate(zip([begin, *closes], [*opens, len(where.text)])):
        found, wanted = where.text[left:right].strip(), "," if 0 < i < len(spans) else ""
        if found != wanted:
            at = left + len(where.text[left:right]) - len(where.text[left:right].lstrip())
            raise where.error(f"{found!r} stands outside the brackets, where there should be {'one comma' if wanted else 'nothing'}", at)


def _jsonl(where: _Where) -> tuple[str | None, Texts, tuple[int, ...] | None]:
    """(id, prompts, starts) of one JSON line."""
    try:
        row = json.loads(where.text)
    except json.JSONDecodeError as error:
        raise where.error(f"not JSON ({error.msg})", error.colno - 1) from None
    if not isinstance(row, dict) or "prompts" not in row:
        raise where.error('a line must be an object with the key "prompts"')
    if unknown := sorted(set(row) - set(_KEYS)):
        raise where.error(f"unknown keys {unknown}; known are {', '.join(_KEYS)}")
    prompts, starts = _prompts(where, row["prompts"]), _starts(where, row.get("starts"))
    if starts is not None and len(starts) != len(prompts):
        raise where.error(f"{len(prompts)} prompts but {len(starts)} starts; give one start per prompt, or leave starts out")
    return _id(where, row.get("id")), prompts, starts


def _prompts(where: _Where, value: object) -> Texts:
    if not isinstance(value, list) or not value:
        raise where.error(f'"prompts" must be a list of at least one text, not {json.dumps(value)}')
    return tuple(_prompt(where, text) for text in value)


def _prompt(where: _Where, text: object, at: int | None = None) -> str:
    if not isinstance(text, str) or not text.strip():
        raise where.error(f"a prompt must be text that is not blank, not {json.dumps(text)}", at)
    return text.strip()


def _starts(where: _Where, value: object) -> tuple[int, ...] | None:
    if value is None:
        return None
    if not isinstance(value, list) or any(type(block) is not int for block in value):
        raise where.error(f'"starts" must be a list of whole numbers, the first block of every prompt, not {json.dumps(value)}')
    return tuple(value)


def _id(where: _Where, value: object) -> str | None:
    if value is None:
        return None
    if type(value) not in (str, int) or not str(value).strip() or not str(value).isprintable():
        raise where.error(f'"id" must be a number or a printable text, not {json.dumps(value)}')
    return str(value)
