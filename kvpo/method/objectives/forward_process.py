"""Objectives of the forward process share this: clean latents, noised anew, and regressed.

    z = (1 - sigma) x0_g + sigma eps        target = eps - x0_g        loss = mean over g, b, s of l( v_theta(z), target, v_old(z), A_g )

No trajectory is needed, so any explorer and any sampler will do. z passes in the cached,
unperturbed context of its block, as a denoise step of the deployed generator does; with a full
sequence under one noise level, as image trainers have it, a streaming generator would be trained in
a context that it never meets. Noise and noise levels are the same for all branches of a group, so
that branches differ in nothing but what they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from kvpo.common.late import Late
from kvpo.method.energies import squared_residual
from kvpo.method.objectives.interface import (
    GroupUpdate,
    Record,
    ReplayShape,
    check_finite,
    energy_metrics,
    refuse_broken,
)

if TYPE_CHECKING:
    import torch

    from kvpo.common.timing import Phases
    from kvpo.method.advantages import Advantage
    from kvpo.method.energies import Surrogate
    from kvpo.method.explorers import Explorer
    from kvpo.method.replay import Replay, WindowReplay
    from kvpo.method.update import Updater
else:
    torch = Late("torch")


@dataclass(frozen=True)
class ForwardObjective:
    """Settings and answers that objectives of the forward process share."""

    levels: int = 0
    """Noise levels drawn for every group, evenly over (0, 1].
    0: the generator's own denoise steps. A distilled generator knows no others."""
    kl_beta: float = 0.0
    """Strength of the squared distance from the start weights' velocities; 0 = none."""

    needs: ClassVar[frozenset[Record]] = frozenset({"clean"})
    uses_energy: ClassVar[bool] = False
    watches_kl: ClassVar[bool] = False

    def __post_init__(self):
        if self.levels < 0:
            raise ValueError(
                f"objective.levels = {self.levels} must be 1 or more noise levels, or 0 for the generator's own"
            )
        if not 0.0 <= self.kl_beta < float("inf"):
            raise ValueError(f"objective.kl_beta = {self.kl_beta} must be 0 (none) or positive")

    @property
    def asks_reference(self) -> bool:
        return self.kl_beta > 0.0

    def refusal(self, explorer: Explorer, sampler: str) -> str:
        """Nothing is refused: clean latents are there whatever made them."""
        return ""

    def shape(
        self, explorer: Explorer, surrogate: Surrogate, sigmas: Sequence[float]
    ) -> ReplayShape:
        """All noise levels; at level 1 the input is the noise, which all branches share."""
        steps = self.levels or len(sigmas)
        alike = not self.levels and sigmas[0] == 1.0
        return ReplayShape(steps, alike, behaviour=True, anew=True, copies=2)

    def row_losses(
        self, v: torch.Tensor, target: torch.Tensor, old: torch.Tensor, A_R: torch.Tensor
    ) -> torch.Tensor:
        """l_R float64 of rows [R, F, C, H, W] whose branches have the advantages A_R."""
        raise NotImplementedError

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
        refuse_broken("clean latents", replay.rollout.trajectory.clean[replay.rows])
        forward, targets = noised(replay, self.levels)
        old, start = _velocities_before(learner, self, forward, phases)
        members, of_member = len(forward.rows), len(forward.sigmas) * targets.shape[1]
        A_M = learner.own(advantage.values.double(), advantage, members)
        terms, seen = len(advantage.values) * of_member, _Seen()
        losses = _losses(self, forward, targets, A_M, old, start, seen)
        scaled = (share / terms * loss_R.sum() for loss_R in losses)
        with phases("replay_grad"):
            metrics, sketch = learner.add_group(scaled, share, advantage, before)
        energy_M = learner.of_members(seen.errors, members) / of_member
        metrics |= energy_metrics(energy_M, share, learner.policy.lag)
        metrics["loss/policy"] = learner.total(seen.loss) / terms
        if start is not None:
            metrics["loss/from_start"] = learner.total(seen.moved) / terms
        unknown = torch.full_like(energy_M, float("nan"))
        return GroupUpdate(energy_M, unknown, metrics, sketch=sketch)


def noise_levels(replay: Replay, levels: int) -> list[float]:
    """Noise levels of a group: the generator's, or so many drawn, one in every equal part of (0, 1].

    Stratified draws cover the range in every group.
    """
    if levels == 0:
        return [float(s) for s in replay.pipeline.geometry.sigmas]
    drawn = replay.uniform(levels, "levels").tolist()
    return [1.0 - (i + u) / levels for i, u in enumerate(drawn)]


def noised(replay: Replay, levels: int) -> tuple[WindowReplay, torch.Tensor]:
    """A group's clean latents, noised and to be replayed, and their targets eps - x0 [B, P, S, ...]."""
    clean = replay.rollout.trajectory.clean
    sigmas = noise_levels(replay, levels)
    shape = (clean.shape[1], len(sigmas), *clean.shape[2:])
    eps = replay.draw(shape, "forward").to(clean.dtype)
    sigma = torch.tensor(sigmas, dtype=torch.float64, device=clean.device).to(clean.dtype)
    sigma = sigma.view(-1, 1, 1, 1, 1)
    x0 = clean[:, :, None]
    return replay.at((1.0 - sigma) * x0 + sigma * eps, sigmas), eps - x0


class _Seen:
    """Numbers of the passes, for the log."""

    def __init__(self):
        self.loss = self.moved = 0.0
        self.errors: list[tuple[torch.Tensor, torch.Tensor]] = []


def _losses(
    objective: ForwardObjective,
    forward: WindowReplay,
    targets: torch.Tensor,
    A_M: torch.Tensor,
    old: torch.Tensor | None,
    start: torch.Tensor | None,
    seen: _Seen,
) -> Iterator[torch.Tensor]:
    """Yield the losses [R] of every pass's rows, with gradient.

    ``old`` and ``start``: velocities [M, P, S, ...] of other weights; None where those are the
    current ones, or not asked for.
    """
    for rows, v in forward.velocities():
        at = forward.places(rows)
        target = forward.stored(targets, rows)
        A_R = A_M[at[0]].to(v.device)
        loss_R = objective.row_losses(v, target, v.detach() if old is None else old[at], A_R)
        if start is not None:
            distance_R = squared_residual(v, start[at])
            seen.moved += float(distance_R.detach().sum())
            loss_R = loss_R + objective.kl_beta * distance_R
        seen.loss += float(loss_R.detach().sum())
        error_R = squared_residual(v.detach(), target)
        seen.errors.append((torch.tensor(at[0]), error_R.cpu()))
        yield loss_R


def _velocities_before(
    learner: Updater, objective: ForwardObjective, forward: WindowReplay, phases: Phases
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """v_MPSFCHW of the behaviour weights and of the start weights, where they are asked for."""
    policy = learner.policy
    held = objective.asks_reference and policy.updates > 0
    with phases("replay_old"), learner.row.together():
        # the same weights: the old velocities are the detached new ones
        old = None if policy.on_policy else _under(learner, policy.behaviour, forward)
        start = _under(learner, policy.reference, forward) if held else None
    return old, start


def _under(learner: Updater, weights: list[torch.Tensor], replay: WindowReplay) -> torch.Tensor:
    with learner.policy.using(weights):
        return replay.all_velocities()
