"""Negative-aware fine-tuning on the forward process.

    s_g = clip( A_g / advantage_range, -1, 1 )        r_g = (1 + s_g) / 2
    v+ = (1 - beta) v_old + beta v_theta              v- = (1 + beta) v_old - beta v_theta
    l = r_g mean (v+ - target)^2 + (1 - r_g) mean (v- - target)^2

(DiffusionNFT, arXiv 2509.16117; on streaming generators Astrolabe, arXiv 2603.17051.) v+ and v- are
implicit policies of good and of bad branches, of which one network is the difference. With d =
v_theta - v_old and e = target - v_old

    l = beta^2 |d|^2 - 2 beta s_g <d, e> + |e|^2

so a branch of advantage 0 holds to the old policy and no more, and the velocity that l asks of a
branch is v_old + s_g / beta e. The old policy rolls out (`policy.behaviour_decay` makes it a moving
average). Here the error is the plain one of velocities, per element; the released code takes that
of x0 over its own detached mean absolute value. Astrolabe's selective KL is not here: `kl_beta`
holds all branches alike.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from kvpo.method.energies import squared_residual
from kvpo.method.objectives.forward_process import add_forward_gradient, refuse_bad
from kvpo.method.objectives.interface import GroupUpdate, Record

if TYPE_CHECKING:
    import torch

    from kvpo.common.timing import Phases
    from kvpo.method.advantages import Advantage
    from kvpo.method.explorers import Explorer
    from kvpo.method.replay import Replay
    from kvpo.method.update import Updater


@dataclass(frozen=True)
class Nft:
    """Negative-aware fine-tuning on branches' clean latents, noised anew."""

    kind: Literal["nft"] = "nft"
    """Name of this objective."""
    beta: float = 1.0
    """Share of the trained velocity in the implicit policies.
    At 1 the positive one is the trained policy itself; a lower one lets it move further from the
    old policy for the same advantage."""
    advantage_range: float = 5.0
    """Advantage at which a branch counts as wholly good, and its negative as wholly bad."""
    levels: int = 0
    """Noise levels drawn for every group, evenly over (0, 1].
    0: the generator's own denoise steps. A distilled generator knows no others."""
    kl_beta: float = 0.0
    """Strength of the squared distance from the start weights' velocities; 0 = none."""

    needs: ClassVar[frozenset[Record]] = frozenset({"clean"})
    uses_energy: ClassVar[bool] = False
    watches_kl: ClassVar[bool] = False

    def __post_init__(self):
        if not (0.0 < self.beta < math.inf and 0.0 < self.advantage_range < math.inf):
            raise ValueError(
                f"objective.beta = {self.beta} and objective.advantage_range = {self.advantage_range} must be positive numbers"
            )
        refuse_bad(self.levels, self.kl_beta)

    @property
    def asks_reference(self) -> bool:
        return self.kl_beta > 0.0

    def refusal(self, explorer: Explorer, sampler: str) -> str:
        """Nothing is refused: clean latents are there whatever made them."""
        return ""

    def row_losses(
        self, v: torch.Tensor, target: torch.Tensor, old: torch.Tensor, A_R: torch.Tensor
    ) -> torch.Tensor:
        """l_R float64 of rows [R, F, C, H, W] whose branches have the advantages A_R."""
        r_R = 0.5 + 0.5 * (A_R / self.advantage_range).clamp(-1.0, 1.0)
        positive = (1.0 - self.beta) * old + self.beta * v
        negative = (1.0 + self.beta) * old - self.beta * v
        return r_R * squared_residual(positive, target) + (1.0 - r_R) * squared_residual(
            negative, target
        )

    def add(
        self,
        learner: Updater,
        replay: Replay,
        advantage: Advantage,
        share: float,
        phases: Phases,
        before: GroupUpdate | None,
    ) -> GroupUpdate:
        """Add the clipped gradient of one group's loss, as `Objective.add` says."""
        return add_forward_gradient(learner, self, replay, advantage, share, phases, before)
