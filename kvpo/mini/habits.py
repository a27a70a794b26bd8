"""Habits of the videos that the miniature learns from.

Captured videos have such habits, and no caption names them.

Two habits, drawn block by block, so that a block's past shows them:

    sloppy   the object is faded (OPACITY) and stutters: it stands still for a latent frame's four pixel frames and
             then jumps. A chain over blocks: it begins with a probability of BEGINS and goes on
             with one of GOES_ON.
    late     a prompt switch is obeyed at once, a block late, or not before the next switch (OBEYED).

They are what alignment has to remove: a generator that has learnt from such videos does both the
good and the bad, and the rewards, which see pixels and prompts only, prefer the good.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from kvpo.mini.world import Truth

OPACITY = 0.55
"""Opacity of a sloppy block's object."""
BEGINS, GOES_ON = 0.25, 0.75
"""Probability that a block is sloppy after a clean one, and after a sloppy one.

The first block of a video is clean.
"""
OBEYED = (("at once", 0.45), ("late", 0.25), ("ignored", 0.30))
"""Outcome of a prompt switch -> its probability."""


@dataclass(frozen=True)
class Habits:
    """Behaviour of a video that its prompts do not ask for."""

    sloppy: tuple[bool, ...]
    """Whether each block is sloppy."""
    shown: tuple[int, ...]
    """Prompt segment whose scene each block shows."""


def draw_habits(starts: Sequence[int], blocks: int, generator: torch.Generator) -> Habits:
    """Habits of a video of ``blocks`` blocks whose segments begin at the blocks ``starts``."""
    sloppy = [False]
    for u in torch.rand(blocks - 1, generator=generator).tolist():
        sloppy.append(u < (GOES_ON if sloppy[-1] else BEGINS))
    return Habits(tuple(sloppy), _shown(starts, blocks, generator))


def _shown(starts: Sequence[int], blocks: int, generator: torch.Generator) -> tuple[int, ...]:
    """The segment that each block shows, after every switch was obeyed at once, late or not."""
    begins = {0: 0}
    for segment, u in enumerate(torch.rand(len(starts) - 1, generator=generator).tolist(), start=1):
        at_once, late = OBEYED[0][1], OBEYED[0][1] + OBEYED[1][1]
        if u < late:
            begins[starts[segment] + (u >= at_once)] = segment
    shown, segment = [], 0
    for block in range(blocks):
        segment = max(segment, begins.get(block, 0))
        shown.append(segment)
    return tuple(shown)


def changes(shown: Sequence[int]) -> list[tuple[int, int]]:
    """(segment, its first block) of every run of equal segments in ``shown``."""
    return [(s, b) for b, s in enumerate(shown) if b == 0 or s != shown[b - 1]]


def stuttered(truth: Truth, sloppy: Sequence[bool], block: int) -> Truth:
    """The truth with the sloppy blocks faded and stuttering.

    ``block``: latent frames of a block.
    """
    frames = torch.arange(len(truth.scene))
    latent = (frames + 3) // 4
    held = torch.tensor(sloppy)[latent // block]
    first = (4 * latent - 3).clamp(min=0)  # of the latent frame that a pixel frame belongs to
    centre = torch.where(held[:, None], truth.centre[first], truth.centre)
    return replace(truth, centre=centre, opacity=torch.where(held, OPACITY, 1.0))
