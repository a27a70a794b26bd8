"""A group between its exploration and what is learnt from it: as a step keeps it where it is
learnt from later, or again."""

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
    """Of all its branches, whichever rank has them."""
    pixels: torch.Tensor | None
    """uint8 [B, T, 3, H, W] from the fork on, where they are to be shown."""
    variances: torch.Tensor | None
    """var_2K of its rewards, where the step's standard deviation is asked for and this group can
    be measured."""
    metrics: Mapping[str, float]

    def slim(self) -> Kept:
        """Without what no replay reads: the decoder's state, and the latents that were decoded."""
        rollout = replace(self.rollout, decoder=None, latents=self.rollout.latents[:, :0].clone())
        return replace(self, rollout=rollout)


@dataclass(frozen=True)
class Learnt:
    """What a further update on a group needs."""

    index: int
    replay: Replay
    advantage: Advantage
    update: GroupUpdate
    """The first one's: the energies under the behaviour policy, and under the reference."""


def all_updates(metrics: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """A step's metrics from those of its updates: what the last says holds, and what differs
    from one to the next is there for each."""
    found = {name: value for update in metrics for name, value in update.items()}
    if len(metrics) > 1:
        found |= {
            f"inner/{i}/{name.partition('/')[2]}": m[name]
            for i, m in enumerate(metrics, 1)
            for name in OF_EACH_UPDATE
            if name in m
        }
    return found
