"""Policy gradient on the `renoise` sampler's own transition, a Gaussian kernel.

    x' = (1 - sigma') x0_theta(x) + sigma' eps,  so  log p_theta(x' | x) = -mean (x' - (1 - sigma') x0_theta(x))^2 / (2 sigma'^2) + const

(CM-GRPO of RAVEN, arXiv 2605.15190: a consistency step is a conditional Gaussian, and no auxiliary
process is needed.) Steps are those behind which the branch's noise is its own; the last step has no
noise. Ratio, clip and KL are those of `kvpo.method.objectives.step_policy`; the KL of two steps is
w_s mean (v - v_ref)^2 with the `kernel` step weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from kvpo.generators.gaussian_steps import GaussianStep, renoise_step
from kvpo.method.objectives.step_policy import StepObjective

if TYPE_CHECKING:
    from kvpo.method.explorers import Explorer
    from kvpo.types import Rollout


@dataclass(frozen=True)
class KernelGrpo(StepObjective):
    """Clipped policy gradient on the Gaussian steps of the `renoise` sampler."""

    kind: Literal["kernel_grpo"] = "kernel_grpo"
    """Name of this objective."""

    def refusal(self, explorer: Explorer, sampler: str) -> str:
        """Why branches have no likelihood of their own."""
        if sampler != "renoise":
            return f"a step of sampler {sampler} draws no noise, so nothing in it has a likelihood; use sampler renoise"
        if explorer.own_noise != "renoise":
            return "its branches share the noise behind every step, so its likelihood says nothing of what distinguishes them; use explorer renoise"
        return ""

    def stochastic(self, explorer: Explorer, sigmas: Sequence[float]) -> Sequence[int]:
        """All steps but the last, from the first on whose noise the explorer draws."""
        return range(getattr(explorer, "from_step", 0), len(sigmas) - 1)

    def steps(self, rollout: Rollout, sigmas: Sequence[float]) -> Mapping[int, GaussianStep]:
        """Steps behind which the noise is the branches' own."""
        first = rollout.plans[0].renoise_from
        if first is None:
            raise ValueError(
                "these branches share all noise behind their denoise steps, so their kernel says nothing of them; explore by renoise"
            )
        levels = [float(s) for s in sigmas]
        return {i: renoise_step(*levels[i : i + 2]) for i in range(first, len(levels) - 1)}
