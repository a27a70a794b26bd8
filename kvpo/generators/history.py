"""Which past frames a block reads.  A history is an argument of a pass, never a mode of the network.

`SinkWindow` is the deployed one (LongLive); `Routed` wraps it and obeys the plans of an exploration (method.md section 2).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, Sequence

from kvpo.types import BranchPlan, Window


class History(Protocol):
    def past(self, start: int, count: int) -> tuple[int, ...] | list[tuple[int, ...]]:
        """Absolute past frames that the block of ``count`` frames from ``start`` on reads: one list for all rows, or one per row."""
        ...


@dataclass(frozen=True)
class SinkWindow:
    """The oldest ``sink`` frames and the latest ones, ``size`` in all with the block itself; size -1: everything."""

    sink: int
    size: int

    def past(self, start: int, count: int) -> tuple[int, ...]:
        first = 0 if self.size < 0 else max(min(self.sink, start), start - (self.size - self.sink - count))
        return (*range(min(self.sink, first)), *range(first, start))


@dataclass(frozen=True)
class Routed:
    """One plan per row inside the window, the base history outside it and for the rows whose plan routes nothing."""

    base: SinkWindow
    plans: tuple[BranchPlan, ...]
    window: Window
    block: int
    """Latent frames of a block."""

    def past(self, start: int, count: int) -> tuple[int, ...] | list[tuple[int, ...]]:
        base = self.base.past(start, count)
        if start // self.block not in self.window:
            return base
        return [self._routed(plan.frames, start, len(base)) if plan.frames else base for plan in self.plans]

    def _routed(self, frames: Sequence[int], start: int, budget: int) -> tuple[int, ...]:
        nearest = budget - self.base.sink - len(frames)
        if nearest < 1:
            raise ValueError(f"{len(frames)} routed frames {list(frames)} and a sink of {self.base.sink} leave {nearest} of {budget} past frames to the nearest; at least 1 must stay")
        # Chosen once at the fork: later blocks of the window read the same frames, however far the nearest have moved on.
        return (*range(self.base.sink), *frames, *range(start - nearest, start))
