"""Trajectory velocity energy (TVE), the paper's: every denoise step counts alike (method.md section 4)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Sequence

import torch


@dataclass(frozen=True)
class VelocityEnergy:
    """w_s = 1: the mean squared residual of the velocities, in units of velocity squared."""

    needs_differing_context: ClassVar[bool] = True

    def step_weights(self, sigmas: Sequence[float]) -> torch.Tensor:
        return torch.ones(len(sigmas), dtype=torch.float64)
