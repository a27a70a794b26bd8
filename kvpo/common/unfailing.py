"""The terminal's streams for long work.

A print that fails loses a line, never the work that it tells of.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import Any, Literal


class Unfailing:
    """``sys.stdout`` or ``sys.stderr`` as they are at each write.

    Characters that the terminal's encoding lacks are written as escapes.  A pipe that nobody
    reads any more, a terminal that
    was closed or a disk that is full makes it silent from then on.
    """

    def __init__(self, name: Literal["stdout", "stderr"]):
        self.name, self.lost = name, False

    @property
    def _stream(self) -> Any:
        stream = getattr(sys, self.name)
        # what a live display has put itself before
        return getattr(stream, "rich_proxied_file", stream)

    def write(self, text: str) -> int:
        self._try(
            lambda stream: stream.write(text),
            lambda stream: stream.write(escaped(text, stream.encoding)),
        )
        return len(text)

    def flush(self) -> None:
        self._try(lambda stream: stream.flush())

    def isatty(self) -> bool:
        return not self.lost and self._stream is not None and self._stream.isatty()

    def fileno(self) -> int:
        return self._stream.fileno()

    @property
    def encoding(self) -> str:
        return getattr(self._stream, "encoding", None) or "utf-8"

    def _try(self, do, instead=None) -> None:
        if self.lost or self._stream is None:  # None: started without it (`>&-`)
            return
        try:
            do(self._stream)
        except UnicodeEncodeError:
            self._try(instead)
        except (OSError, ValueError):  # ValueError: of a file that is closed
            self.lost = True
            silence(self._stream)


def escaped(text: str, encoding: str | None) -> str:
    """The text with escapes for what an encoding lacks."""
    return text.encode(encoding or "ascii", "backslashreplace").decode(encoding or "ascii")


def silence(stream: Any) -> None:
    """Let what is still written to a stream's file vanish.

    Else the interpreter fails once more, flushing at its end.
    """
    with suppress(OSError, ValueError, AttributeError):  # a stream without a file
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def tolerate_encodings() -> None:
    """Let plain prints write escapes, too, where a terminal lacks a character."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
