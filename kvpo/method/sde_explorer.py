"""Explorer whose branches take stochastic steps where the deployed `ode` sampler takes Euler's.

The start noise stays shared, and so does every step outside the chosen ones. The anchor, the prefix
and the tail are the deterministic sampler's: what is explored is how the window's blocks might have
gone, and what is deployed stays what is measured. (Flow-GRPO, arXiv 2505.05470; a window of steps
as in Flow-GRPO-Fast and MixGRPO.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from kvpo.generators.gaussian_steps import sde_stds
from kvpo.method.explorers import Geometry, OwnNoise, check_window, forks_from
from kvpo.types import BranchPlan


@dataclass(frozen=True)
class SdeExplorer(OwnNoise):
    """Exploration by stochastic denoise steps of the `ode` sampler."""

    noise_level: float = 0.3
    """a: at noise level s a step draws noise of a sqrt(s / (1 - s)) per square root of its length.
    Flow-GRPO has 0.7 at ten steps. The released schedule has four, and Euler's error grows with
    both: the noise in a state then has up to 7 % too much variance at 0.3, up to 23 % at 0.5."""
    from_step: int = 0
    """First denoise step that is stochastic, counted from 0."""
    steps: int = 0
    """Stochastic steps from there on; 0 = all but the last one, which never is.
    Only these are learnt from and replayed."""
    window_blocks: int = 1
    """P, blocks explored after the fork."""

    own_noise: ClassVar[Literal["", "renoise", "sde"]] = "sde"

    def __post_init__(self):
        if not 0.0 < self.noise_level < float("inf"):
            raise ValueError(
                f"noise_level = {self.noise_level} must be positive: at 0 every branch would be the anchor"
            )
        if self.from_step < 0 or self.steps < 0:
            raise ValueError(
                f"from_step = {self.from_step} must be a denoise step, counted from 0, and steps = {self.steps} a number of them, or 0 for all"
            )
        check_window(self.window_blocks)

    def eligible_forks(self, blocks: int, geometry: Geometry) -> list[int]:
        """Every block after the first whose P blocks fit.

        ValueError also where the steps are not the generator's, or too noisy for it.
        """
        self.stds(geometry.sigmas)
        return forks_from(1, blocks, self.window_blocks, "a shared prefix of 1 block")

    def stds(self, sigmas: Sequence[float]) -> tuple[float, ...]:
        """Standard deviation of each denoise step's noise, 0 where a step is deterministic.

        ValueError where the steps do not fit these noise levels.
        """
        last = len(sigmas) - 2
        stop = self.from_step + self.steps if self.steps else last + 1
        if not self.from_step <= last or stop > last + 1:
            raise ValueError(
                f"sde.from_step = {self.from_step} and sde.steps = {self.steps}, but of this generator's {last + 2} denoise steps the last one that may be stochastic is {last}; lower them"
            )
        every = sde_stds(sigmas, self.noise_level)
        found = tuple(s if self.from_step <= i < stop else 0.0 for i, s in enumerate(every))
        noisiest = max(range(last + 1), key=lambda i: found[i] / sigmas[i + 1])
        std, level = found[noisiest], sigmas[noisiest + 1]
        if std >= level:
            raise ValueError(
                f"sde.noise_level = {self.noise_level} adds noise of {std:.3f} in denoise step {noisiest}, which leads to noise level {level:.3f}: no more than that can be noise there; set less than {self.noise_level * level / std:.3f}, or leave the step out"
            )
        return found

    def of_each(self, geometry: Geometry) -> BranchPlan:
        return BranchPlan(step_noise=self.stds(geometry.sigmas))
