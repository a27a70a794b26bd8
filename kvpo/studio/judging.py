"""Rewards beside branches: what a recipe's trained rewards say of each branch of a fork.

Only the local signal is asked for: the clip of the explored blocks, under the prompt that holds at
the fork. The best row is that of the largest advantage over the anchor, by the recipe's weights; it
is the anchor itself where no branch is above it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch

from kvpo.config import RunConfig
from kvpo.method.advantages import Advantages, Unmeasurable, weigh
from kvpo.rewards.base import Reward, VideoBatch
from kvpo.runs.build import judges
from kvpo.studio.group import Group
from kvpo.types import RewardTable


class Judging:
    """The rewards of a recipe, loaded, and its rule of advantages."""

    def __init__(self, rewards: Sequence[Reward], rule: Advantages):
        self.rewards, self.rule = rewards, rule

    @torch.no_grad()
    def scores(self, group: Group) -> dict[str, Any]:
        """Scores of every row of a whole group, and the best one.

        ``rows`` has for each row a number a reward, None where it could not measure; ``best`` is
        None where the rows can not be compared, or no reward tells them apart.
        """
        held = group.stream.scripts[0].texts
        pixels = torch.cat(group.pixels, dim=1)
        rows, fps = len(pixels), group.live.pipeline.geometry.fps
        batch = VideoBatch(pixels, fps, (held[-1],) * rows, (held[:-1],) * rows)
        local_KB = torch.stack([reward.score(batch).scores for reward in self.rewards]).double()
        names = tuple(reward.spec.name for reward in self.rewards)
        return {
            "names": list(names),
            "rows": [[x if math.isfinite(x) else None for x in row] for row in local_KB.T.tolist()],
            "best": self._best(names, local_KB),
        }

    def _best(self, names: tuple[str, ...], local_KB: torch.Tensor) -> int | None:
        valid = local_KB.isfinite().all(dim=0)
        table = RewardTable(names, local_KB, local_KB, valid)
        try:
            advantage = self.rule(table)
        except Unmeasurable:
            return None
        fused = weigh(advantage.local, self.rule.component_weights(names))
        above = torch.cat((fused, fused.new_zeros(1)))  # the anchor is the last row
        above[~valid] = -math.inf
        return int(above.argmax()) if bool(fused.any()) else None


def load_judging(config: RunConfig, device: torch.device) -> Judging | None:
    """Load the rewards that a recipe trains on; None where it has none."""
    trained = tuple(config.rewards_of("train"))
    if not trained:
        return None
    return Judging(*judges(dataclasses.replace(config, rewards=trained), device))
