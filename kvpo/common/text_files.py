"""Text files as people have them, with any byte order mark and any line end.

Nothing is merged and nothing dropped.
"""

from __future__ import annotations

import codecs
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path

BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),  # before UTF-16, whose mark it begins with
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
MARK = "\ufeff"
HARD_ENDS = re.compile(r"\r\n|\n|\r")
"""Line ends that nothing but a line end can be."""
SOFT_ENDS = re.compile("[\x85\u2028\u2029]")
"""NEL, line and paragraph separator: line ends in some files, characters of a text in others."""
ANY_END = re.compile(f"{HARD_ENDS.pattern}|{SOFT_ENDS.pattern}")
INVISIBLE = ("Cc", "Cf", "Cn", "Zl", "Zp", "Zs")
"""Categories of Unicode whose characters show nothing.

They are controls, formats, unassigned, separators.
"""
BLANK_LETTERS = "\u034f\u115f\u1160\u17b4\u17b5\u2800\u3164\uffa0"
"""Characters that Unicode counts as letters or marks, and that show nothing."""


def read_text(path: Path) -> str:
    """The text of a file in UTF-8, or in UTF-16 or UTF-32 with its byte order mark.

    A mark at the beginning of a later line is what joining two files leaves, and is taken out
    like the first one.
    ValueError with file and line for bytes that are no text in that encoding, and for a mark
    inside a line.
    """
    raw = Path(path).read_bytes()
    mark, encoding = next(
        ((m, e) for m, e in BYTE_ORDER_MARKS if raw.startswith(m)), (b"", "utf-8")
    )
    try:
        text = raw[len(mark) :].decode(encoding)
    except UnicodeDecodeError as error:
        line = line_at(
            raw[len(mark) :].decode(encoding, "replace"),
            len(raw[len(mark) :][: error.start].decode(encoding, "replace")),
        )
        raise ValueError(
            f"{path}, line {line}: byte 0x{error.object[error.start]:02x} is not "
            f"{encoding.upper()}; save the file as UTF-8 text"
        ) from None
    text = re.sub(f"(?:\\A|(?<=[\n\r\x85\u2028\u2029])){MARK}+", "", text)
    _refuse_inside(path, text)
    return text


def _refuse_inside(path: Path, text: str) -> None:
    """Refuse a character inside a line that says the file is not as it was meant.

    Raises ValueError where the file was not read, or not written, as was meant.
    """
    reasons = {
        "\0": "a NUL, as UTF-16 has them, but no byte order mark; save the file as UTF-8 text",
        MARK: (
            "a byte order mark inside the line, as joining files leaves it; put a line end, "
            "or nothing, in its place"
        ),
    }
    for letter, reason in reasons.items():
        if (at := text.find(letter)) >= 0:
            raise ValueError(f"{path}, line {line_at(text, at)}: there is {reason}")


def line_at(text: str, offset: int) -> int:
    """Number of the line, from 1, that holds an offset of a text."""
    return 1 + sum(1 for _ in ANY_END.finditer(text, 0, offset))


def lines_of(path: Path, text: str) -> Iterator[tuple[int, str]]:
    """(number, line) of a plain text that has a line for each thing.

    NEL, LS and PS end lines where the file has no others.  ValueError where it has both kinds: a
    character inside a
    text and the end of a line are then not to be told apart, and a text that is cut, or two that
    are joined, can not be seen.
    """
    soft = SOFT_ENDS.search(text)
    if soft and HARD_ENDS.search(text):
        name = unicodedata.name(soft[0], "NEXT LINE")
        raise ValueError(
            f"{path}, line {line_at(text, soft.start())}: the character U+{ord(soft[0]):04X} "
            f"({name}) may end a line or belong to it, and the file "
            "has ordinary line ends too; replace it by a line end or by a space"
        )
    yield from enumerate(ANY_END.split(text), start=1)


def shows_nothing(text: str) -> bool:
    """Whether a text has nothing that a reader would see.

    Blanks, zero-width characters and controls can not be seen.
    """
    return all(
        unicodedata.category(c) in INVISIBLE or c in BLANK_LETTERS or _selects(c) for c in text
    )


def _selects(letter: str) -> bool:
    """Variation selectors change how the character before them looks, and are nothing alone."""
    return "\ufe00" <= letter <= "\ufe0f" or "\U000e0100" <= letter <= "\U000e01ef"


def fault_of_text(text: str) -> tuple[int, str] | None:
    """(offset, reason) of the first thing no tokenizer can read as it was meant.

    None if there is none. It is half of a surrogate pair, or a control character.
    """
    for at, letter in enumerate(text):
        if unicodedata.category(letter) == "Cs":
            return (
                at,
                f"half of a surrogate pair (U+{ord(letter):04X}), which is no character; write "
                f"the whole character or leave it out",
            )
        if unicodedata.category(letter) == "Cc" and letter not in "\t\n\r\x85":
            return at, f"the control character U+{ord(letter):04X}, which nobody sees; take it out"
    return None
