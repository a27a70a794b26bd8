"""How routed frames are drawn: functions (pool, n, num_branches, generator) -> one sorted frame set per branch.

``pool`` holds absolute frame indices, ``n`` is how many of them a branch reads (method.md section 2, "Draws").
None of them knows about the anchor: `KVRouting` redraws what would repeat the anchor or another branch.
"""

from __future__ import annotations

from typing import Mapping, Protocol, Sequence

import torch

Frames = tuple[int, ...]

CANDIDATES = 32
"""Random candidates `balanced` weighs for every branch; more lower the overlap little (14 frames, 5 drawn, 8 branches)."""


class Draw(Protocol):
    def __call__(self, pool: Sequence[int], n: int, num_branches: int, generator: torch.Generator) -> list[Frames]: ...


def _shuffled(pool: Sequence[int], generator: torch.Generator) -> list[int]:
    return [pool[i] for i in torch.randperm(len(pool), generator=generator).tolist()]


def independent(pool: Sequence[int], n: int, num_branches: int, generator: torch.Generator) -> list[Frames]:
    """Every branch draws uniformly without replacement, whatever the others drew."""
    return [tuple(sorted(_shuffled(pool, generator)[:n])) for _ in range(num_branches)]


def dispersed(pool: Sequence[int], n: int, num_branches: int, generator: torch.Generator) -> list[Frames]:
    """The reference code's draw: windows of n over one cyclic permutation, max(1, |pool| // G) apart.

    Neighbouring branches overlap strongly when the pool is small (4 of 5 frames for 14 frames and 8 branches).
    """
    order = _shuffled(pool, generator)
    shift = max(1, len(order) // num_branches)
    return [tuple(sorted(order[(k * shift + i) % len(order)] for i in range(n))) for k in range(num_branches)]


def balanced(pool: Sequence[int], n: int, num_branches: int, generator: torch.Generator) -> list[Frames]:
    """Use counts of any two pool frames differ by at most 1, and branches overlap little.

    Each branch takes the n least used frames, ties broken at random; of several such candidates the one with
    the smallest sum of squared overlaps with the earlier branches wins.  Taking the least used keeps all counts
    in {c, c + 1} after every branch, whichever candidate wins.
    """
    uses = dict.fromkeys(pool, 0)
    chosen: list[Frames] = []
    for _ in range(num_branches):
        candidates = [sorted(_shuffled(pool, generator), key=uses.__getitem__)[:n] for _ in range(CANDIDATES)]
        best = min(candidates, key=lambda frames: _overlap(frames, chosen))
        for frame in best:
            uses[frame] += 1
        chosen.append(tuple(sorted(best)))
    return chosen


def _overlap(frames: Sequence[int], chosen: Sequence[Frames]) -> int:
    return sum(len(set(frames).intersection(other)) ** 2 for other in chosen)


DRAWS: Mapping[str, Draw] = {"balanced": balanced, "dispersed": dispersed, "independent": independent}
