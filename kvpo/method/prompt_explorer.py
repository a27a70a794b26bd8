"""Explorer by the prompt: at a switch, branches are led further away from the old one, or less far.

    e_g = e_new + w_g (e_new - e_old),    w_g drawn evenly over [-strength, strength]

e are the embeddings that the window's blocks read while the new prompt holds. At w = -1 a branch
would still obey the old prompt; above 0 it leaves it further behind, as classifier-free guidance
does with the empty one. Forks are at switches only: elsewhere there is no other prompt. Replay
reads the new prompt as it is, so energies ask how far the deployed generator would have gone by
itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from kvpo.common.late import Late
from kvpo.method.explorers import Exploration, Geometry, check_branches, check_window, forks_from
from kvpo.types import BranchPlan, Window

if TYPE_CHECKING:
    import torch
else:
    torch = Late("torch")


@dataclass(frozen=True)
class PromptExplorer(Exploration):
    """Exploration by prompts between and beyond the old and the new one, at prompt switches."""

    strength: float = 0.25
    """Largest |w|, in (0, 1]: share of the way between the prompts that a branch goes too far.
    Branches have evenly spread w of either sign, drawn within G equal parts of the range."""
    window_blocks: int = 3
    """P, blocks explored after the fork; a later switch within them ends the guidance."""

    nearest: ClassVar[int] = 0
    deterministic_replay: ClassVar[bool] = False
    at_switches: ClassVar[bool] = True

    def __post_init__(self):
        if not 0.0 < self.strength <= 1.0:
            raise ValueError(
                f"strength = {self.strength} must lie in (0, 1]: at 0 every branch would be the anchor, beyond 1 nothing of the new prompt need be left"
            )
        check_window(self.window_blocks)

    def eligible_forks(self, blocks: int, geometry: Geometry) -> list[int]:
        """Every block after the first whose P blocks fit; the rollout takes switches of them."""
        return forks_from(1, blocks, self.window_blocks, "a prompt before the switch")

    def plan(
        self,
        window: Window,
        geometry: Geometry,
        num_branches: int,
        generator: torch.Generator,
        resident: Sequence[int] | None = None,
    ) -> tuple[BranchPlan, ...]:
        """Give every branch its w, one in each of G equal parts of the range, ascending."""
        check_branches(num_branches)
        drawn = torch.rand(num_branches, generator=generator, dtype=torch.float64)
        parts = torch.arange(num_branches, dtype=torch.float64) + drawn
        shifts = self.strength * (2.0 * parts / num_branches - 1.0)
        return tuple(BranchPlan(prompt_shift=w) for w in shifts.tolist())
