"""Time of a step, by phase.

Device work is waited for, so that a phase pays for what it started.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

TOTAL = "total"
"""The phase that holds all others of a step."""


class Phases:
    """Adds up seconds per phase until `take` is called."""

    def __init__(
        self,
        tell: Callable[[str], None] = lambda doing: None,
        ended: Callable[[str, float], None] = lambda done, seconds: None,
    ):
        """Begin without any phase.

        ``tell`` is told every phase that begins, and where; ``ended`` what it took, but for
        `TOTAL`, which is made of others.
        """
        self.seconds: dict[str, float] = {}
        self.ended = ended
        self.tell, self.now, self.where = tell, "start", ""

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self.now, started = name, time.perf_counter()
        self.tell(f"phase {name}{self.where}")
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        took = time.perf_counter() - started
        self.seconds[name] = self.seconds.get(name, 0.0) + took
        if name != TOTAL:
            self.ended(f"phase {name}{self.where}".rstrip(","), took)

    def take(self) -> dict[str, float]:
        """{time/phase: seconds} since the last call."""
        taken = {f"time/{name}": s for name, s in self.seconds.items()}
        self.seconds = {}
        return taken
