"""The paper's objective: PPO's clip over a policy of trajectory velocity energies (TVE).

    E(g) = mean_{b,s} w_s mean (v_theta(z_{b,s}) - u_{b,s})^2       pi(g) = softmax_g( -E(g) / tau )
    L = -mean_g min(r_g A_g, clip(r_g, 1 - low, 1 + high) A_g) + beta KL(pi_theta || pi_ref)

z and u are a branch's recorded inputs and velocities, v_theta the unrouted velocity (KVPO, arXiv
2605.14278; method.md sections 3 to 5). The kind of energy and the temperature are sections of
their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from kvpo.method.loss import ClippedObjective
from kvpo.method.objectives.branch_policy import add_policy_gradient
from kvpo.method.objectives.interface import GroupUpdate, Record, ReplayShape

if TYPE_CHECKING:
    from kvpo.common.timing import Phases
    from kvpo.method.advantages import Advantage
    from kvpo.method.energies import Surrogate
    from kvpo.method.explorers import Explorer
    from kvpo.method.replay import Replay
    from kvpo.method.update import Updater


@dataclass(frozen=True)
class TvePpo(ClippedObjective):
    """The paper's: a clipped policy over branches, by the energy of their velocities."""

    kind: Literal["tve_ppo"] = "tve_ppo"
    """Name of this objective."""

    needs: ClassVar[frozenset[Record]] = frozenset({"inputs", "velocities", "clean"})
    uses_energy: ClassVar[bool] = True

    def refusal(self, explorer: Explorer, sampler: str) -> str:
        """Why an explorer gives branches without an energy."""
        return no_energy(explorer)

    def shape(
        self, explorer: Explorer, surrogate: Surrogate, sigmas: Sequence[float]
    ) -> ReplayShape:
        """All steps that have a weight, by old and reference weights too."""
        weighted = [w > 0.0 for w in surrogate.step_weights(sigmas).tolist()]
        return ReplayShape(sum(weighted), weighted[0], energies_first=True, behaviour=True)

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
        return add_policy_gradient(learner, self, replay, advantage, share, phases, before)


def no_energy(explorer: Explorer) -> str:
    """Why branches have no velocity energy; empty where they have one."""
    if not explorer.deterministic_replay:
        return ""
    return (
        "the unperturbed policy makes these branches itself, so the energy of their velocities and its gradient are identically 0 and nothing would be learnt; "
        "use explorer kv_routing, or objective nft or rvm"
    )
