"""The public code's memory bank: the same frame enters again at every block until the next
recording.

Kept only so that its published numbers can be reproduced. Once the bank is full every repetition
costs a prototype, and ends in copies of the newest one.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvpo.generators.history import MemoryBank


@dataclass(frozen=True)
class RepeatingBank(MemoryBank):
    """Of its training and interactive pipelines."""

    def recorded(self, block: int) -> tuple[int, int] | None:
        number = self.recordings(block) - 1
        return (number * self.every * self.block, number) if block > 0 else None


@dataclass(frozen=True)
class OverwritingBank(MemoryBank):
    """Of its single-prompt inference: every block's first frame takes the place of the one
    before, until the index moves on."""

    def recorded(self, block: int) -> tuple[int, int] | None:
        return ((block - 1) * self.block, self.recordings(block) - 1) if block > 0 else None
