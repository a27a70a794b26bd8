"""What an explorer is: it says where branches may fork, and what each of them does differently.

A plan never touches the generator: it is data (`kvpo.types.BranchPlan`) that the rollout carries out, so an
explorer can be tested, replayed and shown without a network (method.md section 2).
"""

from __future__ import annotations

from typing import ClassVar, Protocol, Sequence

import torch

from kvpo.types import BranchPlan, Window


class Geometry(Protocol):
    """The part of a generator's geometry that planning needs; all numbers are frames."""

    block: int
    """Latent frames generated together."""
    sink: int
    """Oldest frames, always read."""
    window: int
    """Frames a block reads in all: sink, rolling past and the block itself."""


class Explorer(Protocol):
    """Where branch diversity comes from."""

    window_blocks: int
    """P, blocks explored after the fork."""
    nearest: int
    """Latest past frames that every branch reads as they are; 0 = none is set apart."""
    deterministic_replay: ClassVar[bool]
    """True: the unperturbed policy, given the branch's own inputs, produces that very branch.  Its energy is then
    identically 0 with zero gradient, so an energy objective on such branches is refused (method.md section 7)."""

    def eligible_forks(self, blocks: int, geometry: Geometry) -> list[int]:
        """Blocks of a video of ``blocks`` blocks at which a window may start.  ValueError if there is none."""
        ...

    def plan(
        self, window: Window, geometry: Geometry, num_branches: int, generator: torch.Generator, resident: Sequence[int] | None = None
    ) -> tuple[BranchPlan, ...]:
        """One plan per branch, the anchor not included.

        ``resident``: absolute frames in the cache at the fork; None = all frames before it.
        """
        ...


def check_branches(num_branches: int) -> None:
    """A group needs two branches: pi is a softmax over them, and of one branch it is constant."""
    if num_branches < 2:
        raise ValueError(f"num_branches = {num_branches}, but a group compares at least 2 branches; raise num_branches to 2 or more")


def forks_from(first: int, blocks: int, window_blocks: int, why_first: str) -> list[int]:
    """Blocks first .. blocks - window_blocks.  ValueError naming all numbers if that is empty."""
    if window_blocks > blocks:
        raise ValueError(
            f"window longer than the video: window_blocks = {window_blocks}, the video has {blocks} blocks; lengthen the video or shorten the window"
        )
    if first + window_blocks > blocks:
        raise ValueError(
            f"no block can be a fork: {why_first} puts the first fork at block {first}, and a window of {window_blocks} blocks from there "
            f"ends at block {first + window_blocks}, but the video has {blocks} blocks; lengthen the video or shorten the window"
        )
    return list(range(first, blocks - window_blocks + 1))
