"""Trajectory velocity energy (TVE), the paper's: every denoise step counts alike (method.md section 4)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Sequence

import torch

from kvpo.surrogates.base import mean_over_blocks, weighted_block_energy


@dataclass(frozen=True)
class VelocityEnergy:
    """w_s = 1: the mean squared residual of the velocities, in units of velocity squared."""

    needs_differing_context: ClassVar[bool] = True

    def step_weights(self, sigmas: Sequence[float]) -> torch.Tensor:
        return torch.ones(len(sigmas), dtype=torch.float64)

    def block_energy(self, v_BSFCHW: torch.Tensor, u_BSFCHW: torch.Tensor, sigmas: Sequence[float]) -> torch.Tensor:
        return weighted_block_energy(v_BSFCHW, u_BSFCHW, self.step_weights(sigmas))

    def energy(self, v_BPSFCHW: torch.Tensor, u_BPSFCHW: torch.Tensor, sigmas: Sequence[float]) -> torch.Tensor:
        return mean_over_blocks(self, v_BPSFCHW, u_BPSFCHW, sigmas)
