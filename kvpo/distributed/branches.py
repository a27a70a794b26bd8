"""Split of one group over a row of ranks (``branch_parallel``), where one card is too small.

    prefix, plans    on every rank of the row, and equal: all draws are named by (seed, step, group), none by a rank
    branches         each rank rolls out, scores and replays its own stretch of the G
    anchor           on every rank: with its own past at hand, no latents are ever sent.  Where G divides by the ranks that
                     costs no time, for one rank would have a row more in any case. The last rank's
                     counts
    sent             rewards, energies (a number a member), one gradient a group, because each is clipped by its own norm

A rank's rollout is a whole, smaller group: the code that replays or decodes it need not know. What
does need all rows is put together here, alike on every rank of the row; every step of a group in
which one rank may fail is `Ranks.together`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kvpo.distributed.ranks import Ranks
from kvpo.types import BranchPlan, RewardTable, Rollout


def all_rewards(row: Ranks, own: RewardTable) -> RewardTable:
    """The group's rewards from every rank's, whose last row is the anchor."""
    local, global_, valid = zip(*row.gather((own.local, own.global_, own.valid)))
    return RewardTable(own.components, _joined(local, 1), _joined(global_, 1), _joined(valid, 0))


def all_rows(
    row: Ranks, rollout: Rollout, pixels: torch.Tensor
) -> tuple[tuple[BranchPlan, ...], torch.Tensor]:
    """Plans and pixels [B, T, 3, H, W] of the whole group, for pictures.

    They are gigabytes at full size, so only asked for of groups that are shown.
    """
    plans, shown = zip(*row.gather((rollout.plans[:-1], pixels)))
    return (*(plan for own in plans for plan in own), BranchPlan()), _joined(shown, 0)


def _joined(parts: Sequence[torch.Tensor], dim: int) -> torch.Tensor:
    """Join every rank's rows along ``dim``.

    The anchors stand last; the last rank's stays.
    """
    return torch.cat([*(x.narrow(dim, 0, x.shape[dim] - 1) for x in parts[:-1]), parts[-1]], dim)
