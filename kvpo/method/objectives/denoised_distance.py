"""A policy over branches by how near their denoised latents lie to the anchor's.

    E(g) = mean_{b,s} mean ( x0_theta(z_anchor,b,s) - x0_g,b,s )^2       pi(g) = softmax_g( -E(g) / tau ), i.e. exp(-|dx0|^2 / tau)

x0_theta is what the evaluated weights predict at the ANCHOR's recorded inputs, x0_g what the branch
predicted at its own; forks are at blocks. The gradient moves the deployed prediction towards the
better branches: with centred advantages it is -2 / (M tau) sum_g A_g x0_g pulled through one replay
of the anchor, whatever the number of branches. (Neighbour GRPO, arXiv 2511.16955, whose candidates
start from other noise; on streaming generators AR-CoPO, arXiv 2603.17461.) Clip, KL and
temperature are those of `tve_ppo`. The papers' replay buffer of rollouts by the start weights
(semi-on-policy training) and their reweightings are not here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from kvpo.common.late import Late
from kvpo.method.energies import added_up
from kvpo.method.loss import ClippedObjective
from kvpo.method.objectives.branch_policy import add_policy_gradient
from kvpo.method.objectives.interface import (
    GroupUpdate,
    Record,
    ReplayShape,
    check_finite,
    refuse_broken,
)

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
class DenoisedDistance(ClippedObjective):
    """A clipped policy over branches, by their distance from the anchor's denoised latents."""

    kind: Literal["denoised_distance"] = "denoised_distance"
    """Name of this objective."""

    needs: ClassVar[frozenset[Record]] = frozenset({"inputs", "velocities", "clean"})
    uses_energy: ClassVar[bool] = False

    def refusal(self, explorer: Explorer, sampler: str) -> str:
        """Why branches are no neighbours of the anchor."""
        if not explorer.independent:
            return ""
        return "its branches have other pasts than the anchor, and the distance of their blocks says nothing of how the anchor's should change; use explorer start_noise, or objective nft or rvm"

    def shape(
        self, explorer: Explorer, surrogate: Surrogate, sigmas: Sequence[float]
    ) -> ReplayShape:
        """The anchor's steps, and the branches' denoised latents in float64."""
        return ReplayShape(
            len(sigmas), False, anchor_alone=True, energies_first=True, behaviour=True, copies=2
        )

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
        members = Distances(replay)
        return add_policy_gradient(learner, self, members, advantage, share, phases, before)


class Distances:
    """Squared distances of a rank's members from what the evaluated weights make of the anchor."""

    def __init__(self, replay: Replay):
        """Denoise all members; ValueError naming those whose latents are not finite."""
        trajectory, sigmas = replay.rollout.trajectory, replay.pipeline.geometry.sigmas
        inputs, velocities = trajectory.inputs, trajectory.velocities
        assert inputs is not None and velocities is not None, "the objective needs them"
        self.rows = replay.rows
        anchor = len(replay.rollout.plans) - 1
        self.anchor = replay.at(inputs, sigmas, rows=[anchor])
        self.terms = replay.rollout.window.blocks * len(sigmas)
        level = torch.tensor([float(s) for s in sigmas], device=inputs.device)
        self.level_S = level.double().view(-1, 1, 1, 1, 1)
        x, u = (t[self.rows].double() for t in (inputs, velocities))
        self.denoised_MPSFCHW = x - self.level_S * u
        refuse_broken("denoised latents", self.denoised_MPSFCHW)

    @property
    def single_pass(self) -> bool:
        """The anchor's graph can be kept."""
        return self.anchor.single_pass

    def energies(self) -> torch.Tensor:
        """E_M float64 under the weights in the module, without gradient."""
        with torch.no_grad():
            return added_up(self.passes(), len(self.rows))

    def passes(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield (member [M R], share of its energy [M R] float64) of every pass of the anchor."""
        M = len(self.rows)
        for rows, v in self.anchor.velocities():
            _anchor, positions, steps = self.anchor.places(rows)
            z = self.anchor.stored(self.anchor.inputs, rows).double()
            x0 = z - self.level_S[steps] * v.double()
            away = x0[None] - self.denoised_MPSFCHW[:, positions, steps]
            share_MR = away.square().flatten(2).mean(dim=2) / self.terms
            yield torch.arange(M).repeat_interleave(len(rows)), share_MR.flatten()
