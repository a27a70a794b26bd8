"""Explorer of independent videos: branches that share a story, and neither past nor noise.

The fork is the video's beginning, so there is no prefix. Start noise and the noise behind denoise
steps are each branch's own in the window, by default the whole video: such groups are what image
trainers and Astrolabe (arXiv 2603.17051) compare. Nothing is held fixed but the prompts, so
rewards differ for many reasons at once, and the opening blocks, which no other explorer reaches,
are learnt from too. A window of all blocks keeps all of a branch's past for its replay.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from kvpo.method.explorers import Geometry, OwnNoise
from kvpo.types import BranchPlan


@dataclass(frozen=True)
class BestOf(OwnNoise):
    """Exploration by videos that have nothing in common but their story."""

    window_blocks: int = 0
    """P, blocks from the first on whose noise is a branch's own and that are learnt from.
    0 = all of the video; later blocks have shared noise, on pasts that differ."""

    own_noise: ClassVar[Literal["", "renoise", "sde"]] = "renoise"
    independent: ClassVar[bool] = True

    def __post_init__(self):
        if self.window_blocks < 0:
            raise ValueError(
                f"window_blocks = {self.window_blocks} must be 1 or more blocks, or 0 for the whole video"
            )

    def of(self, blocks: int) -> BestOf:
        """Name the number of blocks for videos of ``blocks`` blocks."""
        return self if self.window_blocks else replace(self, window_blocks=blocks)

    def eligible_forks(self, blocks: int, geometry: Geometry) -> list[int]:
        """The video's beginning.

        ValueError where the window does not fit, or where the first block is denoised otherwise.
        """
        if not 1 <= self.window_blocks <= blocks:
            raise ValueError(
                f"best_of.window_blocks = {self.window_blocks}, but the video has {blocks} blocks; set that or less"
            )
        if first := getattr(geometry, "first_steps", 0):
            raise ValueError(
                f"best_of explores a video from its first block on, which this generator denoises in {first} steps and others in {len(geometry.sigmas)}; use explorer start_noise"
            )
        return [0]

    def of_each(self, geometry: Geometry) -> BranchPlan:
        """All noise is fresh."""
        return BranchPlan(noise_mix=1.0, renoise_from=0)
