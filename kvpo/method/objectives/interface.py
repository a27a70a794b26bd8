"""Interface of an objective: what one update does with a group of branches.

An objective is one frozen dataclass in one file of this folder, and is its own settings. It says
what it reads of a rollout's window, which explorers and samplers it can be paired with, and adds a
group's gradient. Rollout, rewards, advantages, optimizer, checkpoints and reports are shared. How
`regression` was added is told in docs/adding_an_objective.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol

if TYPE_CHECKING:
    import torch

    from kvpo.common.timing import Phases
    from kvpo.method.advantages import Advantage
    from kvpo.method.energies import Surrogate
    from kvpo.method.explorers import Explorer
    from kvpo.method.replay import Replay
    from kvpo.method.update import Updater

Record = Literal["inputs", "velocities", "clean"]
"""Parts of a window that a rollout can record: network inputs, velocities, clean latents.

Noise is recorded in the inputs: that of a step's end is x' less its mean, over sigma'.
"""
EVERYTHING: frozenset[Record] = frozenset({"inputs", "velocities", "clean"})


@dataclass(frozen=True)
class GroupUpdate:
    """Outcome of one group: its scores and what it added to the step's gradient."""

    energy: torch.Tensor
    """E_M float64 of the group's members under the current weights, lower = more likely.

    Each objective has its own kind of energy. It is NaN where the group was skipped.
    """
    pi: torch.Tensor
    """pi_old_M, the behaviour policy's share of every member; likewise.

    It is NaN too under objectives that have no policy over branches.
    """
    metrics: dict[str, float]
    old: torch.Tensor | None = None
    """Numbers of the behaviour weights, kept for further updates on the same group.

    Energies E_M; None where the group was skipped or nothing need be kept.
    """
    reference: torch.Tensor | None = None
    """Numbers of the reference weights, likewise."""
    sketch: torch.Tensor | None = None
    """Sketch of the group's gradient before its clip, divided by the gradient's norm.

    None where the group's branches are tied, or nobody asked.
    """


@dataclass(frozen=True)
class ReplayShape:
    """Velocities that an objective replays of a group, for `kvpo plan`."""

    steps: int
    """Velocities of every block that each member has replayed."""
    alike: bool
    """Whether all members have one input at the first of them, which is then computed once."""
    anchor_alone: bool = False
    """Whether the anchor alone is replayed, whatever the number of branches."""
    energies_first: bool = False
    """Whether energies are computed before the gradient, unless one pass does it all."""
    behaviour: bool = False
    """Whether behaviour weights that lag are replayed, where a rollout's record does not do."""
    anew: bool = False
    """Whether further updates on a group replay the other weights once more."""
    copies: int = 0
    """Tensors of the window's size, one velocity each, that are made beside the rollout's."""


class Objective(Protocol):
    """One kind of update, and its settings."""

    needs: ClassVar[frozenset[Record]]
    """Parts of a rollout's window that it reads; nothing else is recorded."""
    uses_energy: ClassVar[bool]
    """Whether the sections of the surrogate steer it."""

    @property
    def kind(self) -> str:
        """Name in a recipe."""
        ...

    @property
    def asks_reference(self) -> bool:
        """Whether it replays every group under the start weights."""
        ...

    @property
    def watches_kl(self) -> bool:
        """Whether `loss/kl` is a KL to the start policy in nats, which the sentinels can watch."""
        ...

    def refusal(self, explorer: Explorer, sampler: str) -> str:
        """Why it can not be paired with this explorer or sampler, and with which; "" if it can."""
        ...

    def shape(
        self, explorer: Explorer, surrogate: Surrogate, sigmas: Sequence[float]
    ) -> ReplayShape:
        """Say what is replayed of a group that this explorer makes."""
        ...

    def add(
        self,
        learner: Updater,
        replay: Replay,
        advantage: Advantage,
        share: float,
        phases: Phases,
        before: GroupUpdate | None,
    ) -> GroupUpdate:
        """Add the gradient of one group's loss, times ``share``, to the step's.

        ``replay``: of this rank's members. ``before``: of an earlier update on the same group.
        ValueError naming quantity and branch where a number is not finite.
        """
        ...


def check_finite(advantage: Advantage) -> None:
    """Refuse advantages that are not finite.

    Raises ValueError naming the branch.
    """
    values = advantage.values
    bad = (~values.isfinite()).nonzero().flatten().tolist()
    if bad:
        cases = ", ".join(f"branch {g} = {values[g].item()}" for g in bad)
        raise ValueError(
            f"advantages not finite: {cases}, and no update can be made from this group; look at its rewards"
        )


def refuse_broken(name: str, x_M: torch.Tensor) -> None:
    """Refuse a group of whose tensor [M, ...] some member's part is not finite.

    Raises ValueError naming the tensor and the members.
    """
    bad = [g for g, x in enumerate(x_M) if not bool(x.isfinite().all())]
    if bad:
        raise ValueError(
            f"{name} of branches {bad} are not finite, and no update can be made from this group; look at the generator's weights and its dtype"
        )


def energy_metrics(energy_M: torch.Tensor, share: float, lag: int) -> dict[str, float]:
    """Metrics that every objective has: its members' energies, its weight, its policy's lag."""
    return {
        "loss/weight": share,
        "energy/mean": float(energy_M.mean()),
        "energy/std": float(energy_M.std()),
        "policy/lag": lag,
    }
