"""Advantage-weighted regression to the better branches, the simplest baseline.

    L = sum_g w_g E(g)        w = softmax_g( A_g / temperature )        E(g) = mean_{b,s} w_s mean (v_theta - u_g)^2

The unrouted velocity is drawn to the recorded velocities of every branch, of the better ones more,
and pushed off none (Peters and Schaal 2007; Peng et al., arXiv 1910.00177). For a low temperature
it is imitation of the best branch, for a high one of all alike, which teaches the average of what
routing does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from kvpo.common.late import Late
from kvpo.method.objectives.interface import (
    GroupUpdate,
    Record,
    ReplayShape,
    check_finite,
    energy_metrics,
    refuse_broken,
)
from kvpo.method.objectives.tve_ppo import no_energy

if TYPE_CHECKING:
    import torch

    from kvpo.common.timing import Phases
    from kvpo.method.advantages import Advantage
    from kvpo.method.energies import Surrogate
    from kvpo.method.explorers import Explorer
    from kvpo.method.replay import Replay
    from kvpo.method.update import Updater
else:
    torch = Late("torch")


@dataclass(frozen=True)
class Regression:
    """Regression to the better branches, weighted by their advantages."""

    kind: Literal["regression"] = "regression"
    """Name of this objective."""
    temperature: float = 1.0
    """Advantage that multiplies a branch's weight by e.
    Low: the best branch alone is imitated; high: all of them alike."""

    needs: ClassVar[frozenset[Record]] = frozenset({"inputs", "velocities", "clean"})
    uses_energy: ClassVar[bool] = True
    asks_reference: ClassVar[bool] = False
    watches_kl: ClassVar[bool] = False

    def __post_init__(self):
        if not 0.0 < self.temperature < math.inf:
            raise ValueError(
                f"objective.temperature = {self.temperature} must be positive; lower it to imitate the best branch only"
            )

    def refusal(self, explorer: Explorer, sampler: str) -> str:
        """Why an explorer gives branches that there is nothing to regress onto."""
        return no_energy(explorer)

    def shape(
        self, explorer: Explorer, surrogate: Surrogate, sigmas: Sequence[float]
    ) -> ReplayShape:
        """All steps that have a weight, by the current weights alone."""
        weighted = [w > 0.0 for w in surrogate.step_weights(sigmas).tolist()]
        return ReplayShape(sum(weighted), weighted[0])

    def weights(self, advantage: Advantage) -> torch.Tensor:
        """w_M float64, of sum 1; a member without rewards has none."""
        A_M = torch.where(advantage.valid, advantage.values.double(), -math.inf)
        return torch.softmax(A_M / self.temperature, dim=0)

    def add(
        self,
        learner: Updater,
        replay: Replay,
        advantage: Advantage,
        share: float,
        phases: Phases,
        before: GroupUpdate | None,
    ) -> GroupUpdate:
        """Add the clipped gradient of one group's loss, as `Objective.add` says."""
        check_finite(advantage)
        velocities = replay.rollout.trajectory.velocities
        assert velocities is not None, "the objective needs them"
        refuse_broken("velocities", velocities[replay.rows])
        w_M = self.weights(advantage)
        mine, energy = learner.own(w_M, advantage, len(replay.rows)), []

        def losses():
            for member, part in replay.passes():
                energy.append((member, part.detach().cpu()))
                yield share * torch.dot(mine[member].to(part.device), part)

        with phases("replay_grad"):
            metrics, sketch = learner.add_group(losses(), share, advantage, before)
        energy_M = learner.of_members(energy, len(replay.rows))
        metrics |= energy_metrics(energy_M, share, learner.policy.lag)
        metrics |= {"loss/policy": float(w_M @ energy_M), "policy/top": float(w_M.max())}
        return GroupUpdate(energy_M, w_M, metrics, sketch=sketch)
