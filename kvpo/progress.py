"""What a person at the terminal sees: bars with a live line for long work, and lines that stay."""

from __future__ import annotations

import os
from contextlib import contextmanager
from typing import Iterator

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.text import Text


class Bar:
    """One piece of work under way."""

    def __init__(self, owner: Progress, task):
        self._owner, self._task = owner, task

    def advance(self, line: str = "") -> None:
        """One unit done; ``line`` is shown below the bars until the next."""
        self._owner.bars.update(self._task, advance=1)
        self._owner.show(line)

    def move_to(self, done: int) -> None:
        self._owner.bars.update(self._task, completed=done)


class Progress:
    """Bars and the live line on stderr, lines that stay on stdout, so that output can be piped."""

    def __init__(self):
        quiet = os.environ.get("RANK", "0") != "0"  # of torchrun's processes the first one speaks
        self._out, self._console = Console(highlight=False, soft_wrap=True, quiet=quiet), Console(stderr=True, highlight=False, quiet=quiet)
        self.bars = Bars(TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(), console=self._console)
        self._live: Live | None = None

    @contextmanager
    def bar(self, name: str, total: int, done: int = 0) -> Iterator[Bar]:
        """Bars may nest; all of them share one live display."""
        outermost = self._live is None
        if outermost:
            self._live = Live(self.bars, console=self._console, refresh_per_second=4)
            self._live.start()
        task = self.bars.add_task(name, total=total, completed=done)
        try:
            yield Bar(self, task)
        finally:
            if outermost:
                self._live.stop()
                self._live = None
                if not self._console.is_terminal:  # piped, the last picture ends without a newline, and what follows would stick to it
                    self._console.line()
            self.bars.remove_task(task)

    def show(self, line: str) -> None:
        if self._live is not None and line:
            self._live.update(Group(self.bars, Text(line)))

    def say(self, text: str) -> None:
        """On a terminal above the bars, which would otherwise be written over."""
        (self._live.console if self._live is not None and self._out.is_terminal else self._out).print(text, markup=False)
