"""Where the time of a step goes, by phase; device work is waited for, so that a phase pays for what it started."""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import Callable, Iterator

import torch


class Phases:
    """Adds up seconds per phase until `take` is called."""

    def __init__(self, tell: Callable[[str], None] = lambda doing: None):
        """``tell`` is told every phase that begins, and where."""
        self.seconds: dict[str, float] = {}
        self.tell, self.now, self.where = tell, "start", ""

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self.now, started = name, time.perf_counter()
        self.tell(f"phase {name}{self.where}")
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started

    def take(self) -> dict[str, float]:
        """{time/phase: seconds} since the last call."""
        taken = {f"time/{name}": s for name, s in self.seconds.items()}
        self.seconds = {}
        return taken
