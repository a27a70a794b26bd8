"""Policy gradient on stochastic steps of the `ode` sampler.

    x' = x + [v_theta + sigma_s^2 / (2 s) (x + (1 - s) v_theta)] ds + sigma_s sqrt(-ds) eps,    sigma_s = a sqrt(s / (1 - s))

(Flow-GRPO, arXiv 2505.05470; `kvpo.generators.gaussian_steps` has the step, method.md section 9
its derivation.) The explorer `sde` chooses a and the steps; all others, the last among them, are
deterministic and have no likelihood. Ratio, clip and KL are those of
`kvpo.method.objectives.step_policy`. What is trained is the stochastic process and what is deployed
is Euler's: they agree as far as the steps are short and the noise is small.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from kvpo.generators.gaussian_steps import GaussianStep, sde_step
from kvpo.method.objectives.step_policy import StepObjective
from kvpo.method.sde_explorer import SdeExplorer

if TYPE_CHECKING:
    from kvpo.method.explorers import Explorer
    from kvpo.types import Rollout


@dataclass(frozen=True)
class SdeGrpo(StepObjective):
    """Clipped policy gradient on stochastic steps of the `ode` sampler."""

    kind: Literal["sde_grpo"] = "sde_grpo"
    """Name of this objective."""

    def refusal(self, explorer: Explorer, sampler: str) -> str:
        """Why branches have no likelihood of their own."""
        if sampler != "ode":
            return f"its stochastic steps are those of sampler ode, and {sampler} has another kernel; use sampler ode with explorer sde, or objective kernel_grpo"
        if explorer.own_noise != "sde":
            return "its branches take no stochastic steps, so nothing in them has a likelihood; use explorer sde"
        return ""

    def stochastic(self, explorer: Explorer, sigmas: Sequence[float]) -> Sequence[int]:
        """Steps to which the explorer gives noise."""
        if not isinstance(explorer, SdeExplorer):
            return ()
        return [i for i, std in enumerate(explorer.stds(sigmas)) if std > 0.0]

    def steps(self, rollout: Rollout, sigmas: Sequence[float]) -> Mapping[int, GaussianStep]:
        """Steps that draw the branches' own noise."""
        if not (stds := rollout.plans[0].step_noise):
            raise ValueError(
                "these branches take the deterministic steps of the sampler, which have no likelihood; explore by sde"
            )
        levels = [float(s) for s in sigmas]
        return {i: sde_step(levels[i], levels[i + 1], std) for i, std in enumerate(stds) if std}
