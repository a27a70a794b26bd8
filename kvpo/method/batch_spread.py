"""One standard deviation of the rewards for all groups of a step (`advantages.std: step`).

    std_k = sqrt(mean over groups of var_k),   var_k: unbiased, over a group's branches and anchor

Scripts differ in level far more than branches do, so deviations are taken within groups and only
then pooled. Divided by it, a group's advantages are as large as its branches differ; groups of one
spread have the advantages they have by themselves. Variances are gathered from all ranks and added
in the order of the groups: every rank has the same bits, however many there are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvpo.common.late import Late
from kvpo.types import RewardTable

if TYPE_CHECKING:
    import torch
else:
    torch = Late("torch")


@dataclass(frozen=True)
class Spread:
    """Standard deviations of a step that rewards are divided by, float64."""

    local: torch.Tensor
    """std_K."""
    global_: torch.Tensor
    """std_K."""

    def metrics(self, components: Sequence[str]) -> dict[str, float]:
        stds = {"local": self.local, "global": self.global_}
        return {
            f"advantage/step_std/{signal}/{name}": float(s)
            for signal, std_K in stds.items()
            for name, s in zip(components, std_K)
        }


def variances(table: RewardTable) -> torch.Tensor:
    """var_2K float64 over the rows that have rewards, the local signal's components first."""
    return torch.cat([table.local, table.global_]).double()[:, table.valid].var(dim=1)


def spread_of(parts: Sequence[Mapping[int, torch.Tensor]]) -> Spread | None:
    """Pool every rank's groups, number -> their `variances`; None where no group has any."""
    groups = {index: var for part in parts for index, var in part.items()}
    if not groups:
        return None
    local, global_ = (
        torch.stack([groups[index] for index in sorted(groups)]).mean(dim=0).sqrt().chunk(2)
    )
    return Spread(local, global_)
