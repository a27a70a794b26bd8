"""Signed velocity regression with an anchor, reward-based velocity matching on the forward process.

    c_g = clip( scale A_g, -limit, limit )
    l = c_g mean (v_theta - target)^2 + (1 - c_g) mean (v_theta - v_old)^2

(RVM, arXiv 2608.23664.) A good branch draws the velocity, a bad one pushes it off, and the anchor
v_old holds it. With d = v_theta - v_old and e = target - v_old this is |d - c_g e|^2 and a constant:
a regression onto the detached target v_old + c_g e. Negative-aware fine-tuning is the special case
c_g = s_g / beta, its loss being beta^2 times this one and a constant (`kvpo.method.objectives.nft`).
Only what public text says of the paper stands here: signed regression, an anchor, advantages over
one deviation of the batch (`advantages.std: step`), times 0.1, clipped.
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
class Rvm(ForwardObjective):
    """Signed regression onto branches' clean latents, noised anew, with an anchor."""

    kind: Literal["rvm"] = "rvm"
    """Name of this objective."""
    scale: float = 0.1
    """Coefficient of a branch of advantage 1: how far towards its target the velocity is asked."""
    limit: float = 1.0
    """Largest coefficient, of either sign; at most 1, beyond which a target is overshot."""

    def __post_init__(self):
        if not (0.0 < self.scale < math.inf and 0.0 < self.limit <= 1.0):
            raise ValueError(
                f"objective.scale = {self.scale} must be a positive number, and objective.limit = {self.limit} lie in (0, 1]"
            )
        super().__post_init__()

    def row_losses(
        self, v: torch.Tensor, target: torch.Tensor, old: torch.Tensor, A_R: torch.Tensor
    ) -> torch.Tensor:
        """l_R float64 of rows [R, F, C, H, W] whose branches have the advantages A_R."""
        c_R = (self.scale * A_R).clamp(-self.limit, self.limit)
        return c_R * squared_residual(v, target) + (1.0 - c_R) * squared_residual(v, old)
