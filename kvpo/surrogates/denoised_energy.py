"""Energy of the denoised latents, the reference code's: late steps, of small sigma, count less (method.md section 4)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Sequence

import torch


@dataclass(frozen=True)
class DenoisedEnergy:
    """w_s = sigma_s^2 / (2 max(sigma_s, floor)^2), so that w_s ||v - u||^2 = ||x0_v - x0_u||^2 / (2 max(sigma_s, floor)^2).

    It holds because both x0 come from one input: x0_v - x0_u = sigma (u - v).
    """

    floor: float = 1.0
    """1 gives sigma^2 / 2, the plain x0 error; 0 gives 1/2 at every step, half the velocity energy.  Between
    them lie the reference code's other settings, for comparison only."""

    needs_differing_context: ClassVar[bool] = True

    def __post_init__(self):
        if not 0.0 <= self.floor <= 1.0:
            raise ValueError(f"sigma floor {self.floor} is outside [0, 1], where sigmas lie")

    def step_weights(self, sigmas: Sequence[float]) -> torch.Tensor:
        sigma = torch.tensor([float(s) for s in sigmas], dtype=torch.float64)
        if not (sigma > 0.0).all():
            raise ValueError(f"sigmas {sigma.tolist()} must be positive: at 0 nothing is left to denoise")
        return sigma.square() / (2.0 * sigma.clamp_min(self.floor).square())
