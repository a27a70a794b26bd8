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
from typing import TYPE_CHECKING, Literal

from kvpo.method.energies import squared_residual
from kvpo.method.objectives.forward_process import ForwardObjective

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Nft(ForwardObjective):
    """Negative-aware fine-tuning on branches' clean latents, noised anew."""

    kind: Literal["nft"] = "nft"
    """Name of this objective."""
    beta: float = 1.0
    """Share of the trained velocity in the implicit policies.
    At 1 the positive one is the trained policy itself; a lower one lets it move further from the
    old policy for the same advantage."""
    advantage_range: float = 5.0
    """Advantage at which a branch counts as wholly good, and its negative as wholly bad."""

    def __post_init__(self):
        if not (0.0 < self.beta < math.inf and 0.0 < self.advantage_range < math.inf):
            raise ValueError(
                f"objective.beta = {self.beta} and objective.advantage_range = {self.advantage_range} must be positive numbers"
            )
        super().__post_init__()

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
