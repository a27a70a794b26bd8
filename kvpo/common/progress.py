"""Output at the terminal: bars with a live line for long work, and lines that stay."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bars
from rich.text import Text

from kvpo.common.unfailing import Unfailing

LONG = 30.0
"""Seconds from which on a piece of work is worth a line of a log."""


class Bar:
    """One piece of work under way."""

    def __init__(self, owner: Progress, task, name: str, total: int, done: int):
        self._owner, self._task = owner, task
        self._name, self._total, self._done = name, total, done
        self._logged = time.perf_counter()

    def advance(self, line: str = "", log: bool = False) -> None:
        """Count one more unit done, and show ``line`` below the bars until the next.

        With ``log`` it stays in output that goes into a file.
        """
        self._owner.show(line)
        self._moved(self._done + 1, line, log)

    def move_to(self, done: int) -> None:
        self._moved(done)

    def _moved(self, done: int, line: str = "", log: bool = False) -> None:
        self._done, now = done, time.perf_counter()
        self._owner.bars.update(self._task, completed=done)
        if log:
            self._owner.log(line)
        elif now - self._logged > LONG:  # a log shows no bar: now and then it says how far it is
            self._owner.log(f"{self._name} {done}/{self._total}{f', {line}' if line else ''}")
        else:
            return
        self._logged = now


class Progress:
    """Bars and the live line on stderr, lines that stay on stdout, so that output can be piped.

    Of torchrun's processes the first one speaks; what another one would say goes to
    ``logs``/rank-N.log.
    """

    def __init__(self, logs: Path | None = None, quiet: bool = False):
        rank = os.environ.get("RANK", "0")
        quiet = quiet or rank != "0"
        self._log = logs / f"rank-{rank}.log" if quiet and logs is not None else None
        self._out = Console(file=Unfailing("stdout"), highlight=False, soft_wrap=True, quiet=quiet)
        self._console = Console(file=Unfailing("stderr"), highlight=False, quiet=quiet)
        self.bars = Bars(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self._console,
        )
        self._live: Live | None = None
        self._line = self._phase = ""
        """Line shown below the bars."""

    @contextmanager
    def bar(self, name: str, total: int, done: int = 0) -> Iterator[Bar]:
        """Show a bar for a piece of work; bars may nest and share one live display.

        In output that goes into a file it is a line every half a minute, and one when long work is
        done.
        """
        began, started = time.perf_counter(), None
        if self._live is None:
            started = self._live = Live(self.bars, console=self._console, refresh_per_second=4)
            started.start()
        task = self.bars.add_task(name, total=total, completed=done)
        try:
            yield Bar(self, task, name, total, done)
        finally:
            if started is not None:
                started.stop()
                self._live = None
                # piped, the last picture ends without a newline, and what follows would stick to it
                if not self._console.is_terminal:
                    self._console.line()
            self.bars.remove_task(task)
        self.ended(name, time.perf_counter() - began)

    def show(self, line: str) -> None:
        self.note(line)
        if line:
            self._line = line
            self._update()

    def phase(self, text: str) -> None:
        """Show what is being done now, on a terminal below the bars."""
        self._phase = text
        self._update()

    def _update(self) -> None:
        if self._live is not None:
            lines = [Text(line) for line in (self._line, self._phase) if line]
            self._live.update(Group(self.bars, *lines))

    def log(self, text: str) -> None:
        """Print a line with the time where the output goes into a file or a pipe.

        Bars would leave no trace there; on a terminal it prints nothing.
        """
        if not self._out.is_terminal:
            self._out.print(f"{time.strftime('%H:%M:%S')} {text}", markup=False)

    def ended(self, what: str, seconds: float) -> None:
        """`log` for a piece of work that took long."""
        if seconds > LONG:
            self.log(f"{what} took {seconds:.0f} s")

    @contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """The body is a piece of work that may take long."""
        self.phase(what)
        started = time.perf_counter()
        yield
        self.phase("")
        self.ended(what, time.perf_counter() - started)

    def say(self, text: str) -> None:
        """Print a line; on a terminal above the bars, which would otherwise be written over."""
        self.note(text)
        (
            self._live.console if self._live is not None and self._out.is_terminal else self._out
        ).print(text, markup=False)

    def warn(self, text: str) -> None:
        """Print a line on stderr, where it is seen though the output goes into a file."""
        self.note(text)
        self._console.print(text, markup=False, soft_wrap=True)

    def note(self, text: str) -> None:
        """Write a line only into the rank's own log, if it has one."""
        if self._log is not None and text:
            self._log.parent.mkdir(parents=True, exist_ok=True)
            with self._log.open("a", encoding="utf-8") as file:
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")
