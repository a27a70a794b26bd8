"""Histories say which past frames a block reads.

A history is an argument of a pass, never a mode of the network.

`SinkWindow` (Self-Forcing, LongLive) and `MemoryBank` (MemFlow) are what generators were trained
for; `Routed` wraps one of them and obeys the plans of an exploration (method.md section 2).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from kvpo.types import BranchPlan, Window


class History(Protocol):
    def past(self, start: int, count: int) -> tuple[int, ...] | list[tuple[int, ...]]:
        """Absolute past frames that the block of ``count`` frames from ``start`` on reads.

        One list for all rows, or one per row.
        """
        ...


class Deployed(History, Protocol):
    """A history that a generator was trained for."""

    def past(self, start: int, count: int) -> tuple[int, ...]:
        """Past frames as `History.past`, one list for all rows."""
        ...

    def kept(self, start: int) -> tuple[int, ...]:
        """Frames that every block from ``start`` on reads before all else: sink and bank slots.

        They are read whether the block is routed or not.
        """
        ...

    def kept_at_switch(self, start: int, block: int) -> tuple[int, ...]:
        """Frames that a prompt switch before ``block`` reads beside those it encodes once more.

        The latter begin at ``start``.
        """
        ...

    def recorded(self, block: int) -> tuple[int, int] | None:
        """(frame, number of the recording) that enters the memory bank before ``block``."""
        ...

    def overwritten(self, block: int) -> tuple[int, ...]:
        """Slots of the bank that hold other frames at ``block`` than they once did."""
        ...


@dataclass(frozen=True)
class SinkWindow:
    """The oldest ``sink`` frames and the latest ones, ``size`` in all with the block itself.

    A size of -1 means everything.
    """

    sink: int
    size: int

    def past(self, start: int, count: int) -> tuple[int, ...]:
        kept = self.kept(start)
        return (
            *kept,
            *range(
                len(kept)
                if self.size < 0
                else max(len(kept), start - (self.size - self.sink - count)),
                start,
            ),
        )

    def kept(self, start: int) -> tuple[int, ...]:
        return tuple(range(min(self.sink, start)))

    def kept_at_switch(self, start: int, block: int) -> tuple[int, ...]:
        return self.kept(start)

    def recorded(self, block: int) -> None:
        return None

    def overwritten(self, block: int) -> tuple[int, ...]:
        return ()


@dataclass(frozen=True)
class MemoryBank:
    """MemFlow's history: a sink, a rolling window, and between them a bank of ``size`` prototypes.

    The prototypes are those of `kvpo.generators.memory`.

    The first frame of every ``every``-th block is recorded, once, right before the next block,
    which so reads it under its own prompt. The public code takes the same frame in again at every
    block until the next recording.
    """

    base: SinkWindow
    size: int
    every: int
    block: int
    """Latent frames of a block."""

    def past(self, start: int, count: int) -> tuple[int, ...]:
        sink, kept = self.base.kept(start), self.kept(start)
        return (*kept, *self.base.past(start, count)[len(sink) :])

    def kept(self, start: int) -> tuple[int, ...]:
        return self.kept_at_switch(start, start // self.block)

    def kept_at_switch(self, start: int, block: int) -> tuple[int, ...]:
        # All slots that are filled by then.  A full bank orders its slots best first, not oldest
        # first, so fewer of
        # them, as many as there were at `start`, would be an arbitrary choice and not the bank of
        # that time.
        slots = range(min(self.size, self.recordings(block)))
        return (*self.base.kept(start), *(-1 - slot for slot in slots))

    def recordings(self, block: int) -> int:
        """Frames recorded before ``block``, the one before it included."""
        return -(-block // self.every)

    def recorded(self, block: int) -> tuple[int, int] | None:
        recorded = block - 1
        return (
            (recorded * self.block, self.recordings(block) - 1)
            if recorded >= 0 and recorded % self.every == 0
            else None
        )

    def overwritten(self, block: int) -> tuple[int, ...]:
        return (
            tuple(-1 - slot for slot in range(self.size))
            if self.recordings(block) > self.size
            else ()
        )


@dataclass(frozen=True)
class Routed:
    """History that follows one plan per row inside the window.

    Outside it, and for rows whose plan routes nothing, the base history holds.
    """

    base: Deployed
    plans: tuple[BranchPlan, ...]
    window: Window
    block: int
    """Latent frames of a block."""

    def past(self, start: int, count: int) -> tuple[int, ...] | list[tuple[int, ...]]:
        base = self.base.past(start, count)
        if start // self.block not in self.window:
            return base
        return [
            self._routed(plan.frames, start, len(base)) if plan.frames else base
            for plan in self.plans
        ]

    def _routed(self, frames: Sequence[int], start: int, budget: int) -> tuple[int, ...]:
        kept = self.base.kept(start)
        nearest = budget - len(kept) - len(frames)
        if nearest < 1:
            raise ValueError(
                f"{len(frames)} routed frames {list(frames)} and {len(kept)} of sink and memory leave {nearest} of {budget} past frames to the nearest; at least 1 must stay"
            )
        # Chosen once at the fork: later blocks of the window read the same frames, however far the
        # nearest have moved on.
        return (*kept, *frames, *range(start - nearest, start))
