"""The update of every objective that is a policy over branches, pi = softmax(-E / tau).

    L(E_1 ... E_M) = -mean_g min(r_g A_g, clip(r_g) A_g) + beta KL(pi_theta || pi_ref)

(`kvpo.method.loss`). L depends on the weights through M numbers, so its cotangents dL / dE_g do
too: members are replayed with gradient pass by pass, each multiplied by its own number, and freed.
The gradient is the same whatever the size of a pass. What an energy is, is the objective's
business.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Protocol

from kvpo.common.late import Late
from kvpo.method.energies import added_up
from kvpo.method.loss import ClippedObjective, Loss, entropy
from kvpo.method.objectives.interface import GroupUpdate

if TYPE_CHECKING:
    import torch

    from kvpo.common.timing import Phases
    from kvpo.method.advantages import Advantage
    from kvpo.method.update import Updater
else:
    torch = Late("torch")


class Energies(Protocol):
    """The energies of a rank's members, a sum of shares from independent passes."""

    rows: list[int]

    @property
    def single_pass(self) -> bool:
        """Whether one pass does it: its graph is then kept."""
        ...

    def energies(self) -> torch.Tensor:
        """E_M float64 without gradient."""
        ...

    def passes(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield (member [R], share of its energy [R] float64) of every pass."""
        ...


def add_policy_gradient(
    learner: Updater,
    objective: ClippedObjective,
    members: Energies,
    advantage: Advantage,
    share: float,
    phases: Phases,
    before: GroupUpdate | None,
) -> GroupUpdate:
    """Add the clipped gradient of one group's loss; arguments as in `Objective.add`.

    ValueError naming quantity and branch where a number is not finite.
    """
    old_G, reference_G = _energies_before(learner, objective, members, phases, before)
    with phases("replay_grad"):
        with learner.row.together():
            shares = list(members.passes()) if members.single_pass else []
        energy_G = learner.of_all(
            lambda: added_up(shares, len(members.rows)) if shares else members.energies()
        )
        # the same weights: the old scores are the detached new ones
        old_G = energy_G if old_G is None else old_G
        tau = learner.temperature.resolve(old_G)
        reference_G = energy_G if learner.policy.updates == 0 else reference_G
        reference = None if reference_G is None else -reference_G / tau
        loss = objective(-energy_G / tau, -old_G / tau, reference, advantage.values, share)
        # dL / dE of the members here
        cotangent_G = learner.own(-loss.cotangent / tau, advantage, len(members.rows))
        passes = (
            torch.dot(cotangent_G[branch].to(energy.device), energy)
            for branch, energy in shares or members.passes()
        )
        metrics, sketch = learner.add_group(passes, share, advantage, before)
    log_pi = torch.log_softmax(-old_G / tau, dim=0)
    metrics |= _metrics(energy_G, log_pi, tau, loss, learner.policy.lag)
    if objective.kl_to == "initial" and not objective.asks_reference:
        del metrics["loss/kl"]  # it would be the one to the behaviour policy
    return GroupUpdate(energy_G, log_pi.exp(), metrics, old_G, reference_G, sketch)


def _energies_before(
    learner: Updater,
    objective: ClippedObjective,
    members: Energies,
    phases: Phases,
    before: GroupUpdate | None,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """E_G under the behaviour weights and under the reference's, where they need a replay."""
    if before is not None:
        return before.old, before.reference
    old_G, reference_G, policy = None, None, learner.policy
    with phases("replay_old"):
        if policy.updates > 0 and objective.asks_reference:
            reference_G = _under(learner, policy.reference, members.energies)
        if not policy.on_policy:
            old_G = _under(learner, policy.behaviour, members.energies)
    return old_G, reference_G


def _under(
    learner: Updater, weights: list[torch.Tensor], energies: Callable[[], torch.Tensor]
) -> torch.Tensor:
    with learner.policy.using(weights):
        return learner.of_all(energies)


def _metrics(
    energy_G: torch.Tensor, log_pi: torch.Tensor, tau: float, loss: Loss, lag: int
) -> dict[str, float]:
    return {
        "energy/mean": float(energy_G.mean()),
        "energy/std": float(energy_G.std()),
        "policy/tau": tau,
        "policy/lag": lag,
        "policy/entropy": float(entropy(log_pi)),
        "policy/evenness": float(entropy(log_pi)) / math.log(len(log_pi)),
        "policy/top": float(log_pi.max().exp()),
    } | dict(loss.metrics)
