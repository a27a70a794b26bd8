"""The queue of tabs before one generator: one at a time, in the order in which they asked."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class Turns:
    """Turns at the generator; whoever waits is told how many are before it.

    All of it runs in one event loop.
    """

    def __init__(self) -> None:
        self._line: list[Place] = []

    def ask(self, moved: Callable[[int, int], None]) -> Place:
        """Join the end of the line.

        ``moved(before, behind)`` is called whenever the place in it changes.
        """
        place = Place(self, moved)
        self._line.append(place)
        self._tell()
        return place

    def _leave(self, place: Place) -> None:
        if place in self._line:
            self._line.remove(place)
            self._tell()

    def _tell(self) -> None:
        for before, place in enumerate(self._line):
            place.stands(before, len(self._line) - 1 - before)


class Place:
    """A place in the line; the first one has the generator until it leaves."""

    def __init__(self, turns: Turns, moved: Callable[[int, int], None]):
        self.first = asyncio.Event()
        self._turns, self._moved, self._told = turns, moved, (-1, -1)

    def stands(self, before: int, behind: int) -> None:
        if before == 0:
            self.first.set()
        if (before, behind) != self._told:
            self._told = (before, behind)
            self._moved(before, behind)

    def leave(self) -> None:
        """Give the generator to the next one; a place that has left stays so."""
        self._turns._leave(self)
