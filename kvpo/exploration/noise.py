"""Start-noise exploration: branches differ in the noise they start from, not in what they read.

The classical baseline for the comparison with routing.  Its branches are what the unperturbed policy itself makes
of another noise, so an energy objective, which asks how the policy would explain them, sees zero (method.md section 7).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Sequence

import torch

from kvpo.exploration.base import Geometry, check_branches, forks_from
from kvpo.types import BranchPlan, Window


@dataclass(frozen=True)
class StartNoise:
    """Explore by mixing fresh noise into the start noise of the window's blocks; re-noising stays shared."""

    mix: float = 0.5
    """m in (0, 1]: the start noise is sqrt(1 - m^2) shared + m fresh, see `mix_noise`."""
    window_blocks: int = 3
    """P, blocks explored after the fork."""

    nearest: ClassVar[int] = 0
    deterministic_replay: ClassVar[bool] = True

    def __post_init__(self):
        if not 0.0 < self.mix <= 1.0:
            raise ValueError(f"mix = {self.mix} must lie in (0, 1]: at 0 every branch would be the anchor")
        if self.window_blocks < 1:
            raise ValueError(f"window_blocks = {self.window_blocks}, but a window has at least 1 block")

    def eligible_forks(self, blocks: int, geometry: Geometry) -> list[int]:
        """Every block after the first whose P blocks fit: a group shares a prefix, so it needs one."""
        return forks_from(1, blocks, self.window_blocks, "a shared prefix of 1 block")

    def plan(
        self, window: Window, geometry: Geometry, num_branches: int, generator: torch.Generator, resident: Sequence[int] | None = None
    ) -> tuple[BranchPlan, ...]:
        """G equal plans; the fresh noise itself comes from streams named after the branch, in the rollout."""
        check_branches(num_branches)
        return (BranchPlan(noise_mix=self.mix),) * num_branches


def mix_noise(shared: torch.Tensor, fresh: torch.Tensor, mix: float) -> torch.Tensor:
    """sqrt(1 - mix^2) shared + mix fresh: of unit variance if both are, and correlated sqrt(1 - mix^2) with shared.

    mix = 0 gives ``shared`` and mix = 1 gives ``fresh``, bit for bit.
    """
    if shared.shape != fresh.shape:
        raise ValueError(f"shared noise {tuple(shared.shape)} and fresh noise {tuple(fresh.shape)} must have one shape")
    if not 0.0 <= mix <= 1.0:
        raise ValueError(f"mix = {mix} is outside [0, 1]")
    if mix in (0.0, 1.0):
        return fresh if mix else shared
    return math.sqrt(1.0 - mix * mix) * shared + mix * fresh
