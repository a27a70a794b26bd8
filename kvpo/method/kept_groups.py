"""Groups as a step keeps them between their exploration and a later or repeated update."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from kvpo.method.advantages import Advantage
from kvpo.method.replay import Replay
from kvpo.method.update import GroupUpdate
from kvpo.types import RewardTable, Rollout

OF_EACH_UPDATE = (
    "loss/clip_fraction",
    "loss/ratio_min",
    "loss/ratio_max",
    "loss/ratio_mean",
    "loss/approx_kl",
    "optim/step_norm",
)
"""Metrics that are logged for every update on one step's groups, not for the last alone."""


@dataclass(frozen=True)
class Kept:
    """An explored and scored group."""

    index: int
    rollout: Rollout
    embeddings: Mapping[str, torch.Tensor]
    rewards: RewardTable
    """Rewards of all its branches, whichever rank has them."""
    pixels: torch.Tensor | None
    """uint8 [B, T, 3, H, W] from the fork on, where they are to be shown."""
    variances: torch.Tensor | None
    """var_2K of its rewards; None unless a step's std is asked for and the group is measurable."""
    metrics: dict[str, float]

    def slim(self) -> Kept:
        """Copy without what no replay reads: the decoder's state and the decoded latents."""
        rollout = replace(self.rollout, decoder=None, latents=self.rollout.latents[:, :0].clone())
        return replace(self, rollout=rollout)


@dataclass(frozen=True)
class Learnt:
    """Data that a further update on a group needs."""

    index: int
    replay: Replay
    advantage: Advantage
    update: GroupUpdate
    """Energies of the first update: under the behaviour policy, and under the reference."""


def all_updates(metrics: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Merge the metrics of a step's updates: the last one's values hold.

    Metrics that differ from one update to the next are there for each as well, as
    `inner/NUMBER/NAME`.
    """
    found = {name: value for update in metrics for name, value in update.items()}
    if len(metrics) > 1:
        found |= {
            f"inner/{i}/{name.partition('/')[2]}": m[name]
            for i, m in enumerate(metrics, 1)
            for name in OF_EACH_UPDATE
            if name in m
        }
    return found
