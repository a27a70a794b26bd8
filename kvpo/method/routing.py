"""Causal history routing (CHR): branches read older frames instead of the rolling window's.

See method.md section 2.

In every block of the window a branch reads

    sink  |  n routed frames, drawn once  |  the `nearest` frames before the block  |  the block itself

which is exactly the deployment window's budget: n = window - sink - nearest - block.

How routed frames are drawn: functions (pool, n, num_branches, generator) -> one sorted frame set
per branch.

``pool`` holds absolute frame indices, ``n`` is how many of them a branch reads (method.md section
2, "Draws"). None of them knows about the anchor: `KVRouting` redraws what would repeat the anchor
or another branch.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol

from kvpo.common.late import Late
from kvpo.method.explorers import Exploration, Geometry, check_branches, check_window, forks_from
from kvpo.types import BranchPlan, Window

if TYPE_CHECKING:
    import torch
else:
    torch = Late("torch")

REDRAWS = 32
"""Groups drawn anew before single branches are redrawn, which may cost a draw its balance."""


@dataclass(frozen=True)
class KVRouting(Exploration):
    """Explore by routing the KV cache."""

    draw: str = "balanced"
    """Name of the draw: `balanced`, `dispersed` (the reference code's) or `independent`.
    See `kvpo.method.routing`."""
    nearest: int = 1
    """Frames right before each block that every branch reads.
    Without any, motion breaks at the fork."""
    window_blocks: int = 3
    """P, blocks explored after the fork."""

    deterministic_replay: ClassVar[bool] = False

    def __post_init__(self):
        if self.draw not in DRAWS:
            raise ValueError(f"draw = {self.draw!r} is unknown; choose one of {', '.join(DRAWS)}")
        if self.nearest < 1:
            raise ValueError(
                f"nearest = {self.nearest}, but a branch must keep at least the 1 frame right before each block; set nearest >= 1"
            )
        check_window(self.window_blocks)

    def routed(self, geometry: Geometry) -> int:
        """n, routed frames a branch reads.  ValueError if the window leaves no room for any."""
        n = geometry.window - geometry.sink - self.nearest - geometry.block
        if n < 1:
            raise ValueError(
                f"no room for routed frames: window {geometry.window} - sink {geometry.sink} - nearest {self.nearest} - block {geometry.block} = {n} frames; "
                "widen the window or lower nearest"
            )
        return n

    def eligible_forks(self, blocks: int, geometry: Geometry) -> list[int]:
        """Blocks whose pool is larger than n and whose P blocks fit.

        With a pool of n frames the only choice is the anchor's window.
        """
        history = self.routed(geometry) + geometry.sink + self.nearest + 1
        first = -(-history // geometry.block)
        return forks_from(
            first,
            blocks,
            self.window_blocks,
            f"routing, which needs {history} frames of history at {geometry.block} frames a block,",
        )

    def pool(
        self, window: Window, geometry: Geometry, resident: Sequence[int] | None = None
    ) -> list[int]:
        """Resident frames between the sink and the nearest frames at the fork, ascending.

        ValueError if the sink or the nearest frames, which every branch reads, are not resident.
        """
        fork = window.fork * geometry.block
        frames = set(range(fork) if resident is None else resident)
        locked = [
            f for f in (*range(geometry.sink), *range(fork - self.nearest, fork)) if f not in frames
        ]
        if locked:
            raise ValueError(
                f"fork at block {window.fork} (frame {fork}): frames {locked} are locked (sink {geometry.sink}, nearest {self.nearest}) but not resident; "
                "fork later or enlarge the cache"
            )
        return sorted(f for f in frames if geometry.sink <= f < fork - self.nearest)

    def rolling(self, window: Window, geometry: Geometry) -> Frames:
        """The frames the anchor reads at the fork where a branch reads its routed ones."""
        stop = window.fork * geometry.block - self.nearest
        return tuple(range(stop - self.routed(geometry), stop))

    def plan(
        self,
        window: Window,
        geometry: Geometry,
        num_branches: int,
        generator: torch.Generator,
        resident: Sequence[int] | None = None,
    ) -> tuple[BranchPlan, ...]:
        """Plan G branches, each with frames that differ from the anchor's rolling window.

        Branches differ from each other too, where the pool allows.

        A group in which a set repeats, or equals the rolling window's, is drawn anew; after
        `REDRAWS` groups the offending sets alone are redrawn uniformly. Where the pool has fewer
        sets than branches each set is used once before any is used again.
        """
        check_branches(num_branches)
        n, pool = self.routed(geometry), self.pool(window, geometry, resident)
        anchor = self.rolling(window, geometry)
        choices = math.comb(len(pool), n) - set(anchor).issubset(pool)
        if choices < 1:
            raise ValueError(
                f"fork at block {window.fork} (frame {window.fork * geometry.block}): {len(pool)} resident frames {pool} between sink {geometry.sink} and nearest "
                f"{self.nearest}, but routing {n} frames otherwise than the anchor needs at least {n + 1}; fork later, enlarge the cache or raise nearest"
            )
        for _ in range(REDRAWS):
            drawn = DRAWS[self.draw](pool, n, num_branches, generator)
            if anchor not in drawn and _evenly_used(drawn, choices):
                break
        else:
            drawn = _repaired(drawn, pool, anchor, choices, generator)
        return tuple(BranchPlan(frames=frames) for frames in drawn)


def _evenly_used(drawn: Sequence[Frames], choices: int) -> bool:
    """No set is used again before each of the ``choices`` sets has been used as often."""
    uses = Counter(drawn).values()
    return len(uses) == min(len(drawn), choices) and max(uses) - min(uses) <= 1


def _repaired(
    drawn: Sequence[Frames],
    pool: Sequence[int],
    anchor: Frames,
    choices: int,
    generator: torch.Generator,
) -> list[Frames]:
    """Replace repeats and the anchor's set in ``drawn`` by uniform draws.

    It ends because an unused set remains.
    """
    kept: list[Frames] = []
    used: set[Frames] = set()
    for frames in drawn:
        if len(used) == choices:
            used = set()
        while frames == anchor or frames in used:
            (frames,) = DRAWS["independent"](pool, len(anchor), 1, generator)
        used.add(frames)
        kept.append(frames)
    return kept


Frames = tuple[int, ...]

CANDIDATES = 32
"""Random candidates that `balanced` weighs for every branch.

More of them lower the overlap little (14 frames, 5 drawn, 8 branches).
"""


class Draw(Protocol):
    def __call__(
        self, pool: Sequence[int], n: int, num_branches: int, generator: torch.Generator
    ) -> list[Frames]: ...


def _shuffled(pool: Sequence[int], generator: torch.Generator) -> list[int]:
    return [pool[i] for i in torch.randperm(len(pool), generator=generator).tolist()]


def independent(
    pool: Sequence[int], n: int, num_branches: int, generator: torch.Generator
) -> list[Frames]:
    """Every branch draws uniformly without replacement, whatever the others drew."""
    return [tuple(sorted(_shuffled(pool, generator)[:n])) for _ in range(num_branches)]


def dispersed(
    pool: Sequence[int], n: int, num_branches: int, generator: torch.Generator
) -> list[Frames]:
    """Draw as the reference code does: windows of n over one cyclic permutation.

    They lie max(1, |pool| // G) apart.

    Neighbouring branches overlap strongly when the pool is small (4 of 5 frames for 14 frames and 8
    branches).
    """
    order = _shuffled(pool, generator)
    shift = max(1, len(order) // num_branches)
    return [
        tuple(sorted(order[(k * shift + i) % len(order)] for i in range(n)))
        for k in range(num_branches)
    ]


def balanced(
    pool: Sequence[int], n: int, num_branches: int, generator: torch.Generator
) -> list[Frames]:
    """Use counts of any two pool frames differ by at most 1, and branches overlap little.

    Each branch takes the n least used frames, ties broken at random; of several such candidates the
    one with the smallest sum of squared overlaps with the earlier branches wins. Taking the least
    used keeps all counts in {c, c + 1} after every branch, whichever candidate wins.
    """
    uses = dict.fromkeys(pool, 0)
    chosen: list[Frames] = []
    for _ in range(num_branches):
        candidates = [
            sorted(_shuffled(pool, generator), key=uses.__getitem__)[:n] for _ in range(CANDIDATES)
        ]
        best = min(candidates, key=lambda frames: _overlap(frames, chosen))
        for frame in best:
            uses[frame] += 1
        chosen.append(tuple(sorted(best)))
    return chosen


def _overlap(frames: Sequence[int], chosen: Sequence[Frames]) -> int:
    return sum(len(set(frames).intersection(other)) ** 2 for other in chosen)


DRAWS: Mapping[str, Draw] = {
    "balanced": balanced,
    "dispersed": dispersed,
    "independent": independent,
}
