"""Objectives on denoise steps that are Gaussians share this: likelihood ratios step by step.

    log p_theta(x' | x) = -mean (x' - on_x x - on_v v_theta(x))^2 / (2 std^2) + const
    r = p_theta(x' | x) / p_old(x' | x)
    L = -mean_{g,b,s} min( r A_g, clip(r, 1 - clip, 1 + clip) A_g ) + beta KL(p_theta || p_ref)

x' is the next step's recorded input, so nothing else need be recorded. Steps are those whose noise
is the branch's own. Log probabilities are means over a block's elements, as Flow-GRPO (arXiv
2505.05470) takes them: the exact ones are larger by that number of elements, and their ratios would
leave any clip range at once. The KL of two steps is on_v^2 / (2 std^2) mean (v - v_ref)^2. At theta
= old the gradient is REINFORCE's, -mean A_g d log p.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
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
    from kvpo.generators.gaussian_steps import GaussianStep
    from kvpo.method.advantages import Advantage
    from kvpo.method.energies import Surrogate
    from kvpo.method.explorers import Explorer
    from kvpo.method.replay import Replay, WindowReplay
    from kvpo.method.update import Updater
    from kvpo.types import Rollout
else:
    torch = Late("torch")


@dataclass(frozen=True)
class StepObjective:
    """Settings and answers that objectives on Gaussian denoise steps share."""

    clip: float = 0.001
    """Distance from 1 to which a step's ratio counts, on either side.
    Ratios are of mean log probabilities per element, and lie near 1."""
    kl_beta: float = 0.0
    """Strength of the KL of every step to the start weights', per element; 0 = none."""

    needs: ClassVar[frozenset[Record]] = frozenset({"inputs", "velocities", "clean"})
    uses_energy: ClassVar[bool] = False
    watches_kl: ClassVar[bool] = False

    def __post_init__(self):
        if not 0.0 < self.clip < 1.0:
            raise ValueError(f"objective.clip = {self.clip} must lie in (0, 1)")
        if not 0.0 <= self.kl_beta < float("inf"):
            raise ValueError(f"objective.kl_beta = {self.kl_beta} must be 0 (none) or positive")

    @property
    def asks_reference(self) -> bool:
        return self.kl_beta > 0.0

    def stochastic(self, explorer: Explorer, sigmas: Sequence[float]) -> Sequence[int]:
        """Numbers of the steps whose noise will be the branches' own."""
        raise NotImplementedError

    def shape(
        self, explorer: Explorer, surrogate: Surrogate, sigmas: Sequence[float]
    ) -> ReplayShape:
        """Replay those steps alone; old velocities are the rollout's."""
        steps = self.stochastic(explorer, sigmas)
        alike = 0 in steps and not explorer.independent
        return ReplayShape(len(steps), alike, anew=True, copies=1)

    def steps(self, rollout: Rollout, sigmas: Sequence[float]) -> Mapping[int, GaussianStep]:
        """The steps whose noise is the branches' own.  ValueError where there are none."""
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
        moves = Transitions(replay, self.steps(replay.rollout, replay.pipeline.geometry.sigmas))
        refuse_broken("inputs", moves.replay.inputs[replay.rows])
        start = self._start(learner, moves, phases)
        A_M = learner.own(advantage.values.double(), advantage, len(replay.rows))
        on_policy = learner.policy.on_policy and before is None
        terms, seen = len(advantage.values) * moves.terms, _Seen()
        losses = self._losses(moves, A_M, on_policy, start, seen)
        scaled = (share / terms * loss_R.sum() for loss_R in losses)
        with phases("replay_grad"):
            metrics, sketch = learner.add_group(scaled, share, advantage, before)
        energy_M = learner.of_members(seen.surprise, len(replay.rows)) / moves.terms
        metrics |= seen.metrics(self.clip) | energy_metrics(energy_M, share, learner.policy.lag)
        metrics["loss/policy"] = learner.total(seen.loss) / terms
        unknown = torch.full_like(energy_M, float("nan"))
        return GroupUpdate(energy_M, unknown, metrics, sketch=sketch)

    def _start(self, learner: Updater, moves: Transitions, phases: Phases) -> torch.Tensor | None:
        """v_MPSFCHW of the start weights, where the KL holds to them and they are others by now."""
        with phases("replay_old"), learner.row.together():
            if self.kl_beta == 0.0 or learner.policy.updates == 0:
                return None
            with learner.policy.using(learner.policy.reference):
                return moves.replay.all_velocities()

    def _losses(
        self,
        moves: Transitions,
        A_M: torch.Tensor,
        on_policy: bool,
        start: torch.Tensor | None,
        seen: _Seen,
    ) -> Iterator[torch.Tensor]:
        """Yield the losses [R] of every pass's rows, with gradient."""
        for rows, v in moves.replay.velocities():
            at = moves.replay.places(rows)
            # the same weights: the recorded velocities differ from these by rounding
            old = v.detach() if on_policy else moves.recorded(rows)
            log_p = moves.log_p(rows, v)
            log_r = log_p - moves.log_p(rows, old)
            loss_R = clipped(log_r, A_M[at[0]].to(v.device), self.clip)
            if start is not None:
                loss_R = loss_R + self.kl_beta * moves.kl(rows, v, start[at])
            seen.add(at[0], log_r, loss_R, log_p)
            yield loss_R


class Transitions:
    """The Gaussian steps of a group, replayed."""

    def __init__(self, replay: Replay, steps: Mapping[int, GaussianStep]):
        """Plan the replay of ``steps``: number of a denoise step -> what it is."""
        trajectory = replay.rollout.trajectory
        inputs, velocities = trajectory.inputs, trajectory.velocities
        assert inputs is not None and velocities is not None, "the objective needs them"
        self.steps = steps
        self.terms = replay.rollout.window.blocks * len(steps)
        """Steps of every branch that count."""
        self.recorded_velocities = velocities
        self.results = inputs.roll(-1, dims=2)
        """x'_BPSFCHW: the next step's input."""
        sigmas = [float(s) for s in replay.pipeline.geometry.sigmas]
        self.replay: WindowReplay = replay.at(inputs, sigmas, list(steps))

    def recorded(self, rows) -> torch.Tensor:
        """u_RFCHW, velocities of the weights that rolled out."""
        return self.replay.stored(self.recorded_velocities, rows)

    def log_p(self, rows, v: torch.Tensor) -> torch.Tensor:
        """log p(x' | x)_R float64 per element, less a constant, of velocities v_RFCHW."""
        on_x, on_v, std = (c.view(-1, 1, 1, 1, 1) for c in self._coefficients(rows, v))
        x = self.replay.stored(self.replay.inputs, rows).double()
        result = self.replay.stored(self.results, rows).double()
        mean = on_x * x + on_v * v.double()
        return -squared_residual(mean, result) / (2.0 * std.flatten() ** 2)

    def kl(self, rows, v: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """KL_R float64 per element of the steps of two velocities at one input."""
        _on_x, on_v, std = self._coefficients(rows, v)
        return (on_v / std) ** 2 / 2.0 * squared_residual(v, other)

    def _coefficients(self, rows, v: torch.Tensor) -> torch.Tensor:
        """on_x, on_v and std of rows, [3, R] float64."""
        steps = [self.steps[r.step] for r in rows]
        found = [(step.on_x, step.on_v, step.std) for step in steps]
        return torch.tensor(found, dtype=torch.float64, device=v.device).T


def clipped(log_r_R: torch.Tensor, A_R: torch.Tensor, clip: float) -> torch.Tensor:
    """-min(r A, clip(r, 1 - clip, 1 + clip) A) of every row."""
    r_R = log_r_R.exp()
    return -torch.minimum(r_R * A_R, r_R.clamp(1.0 - clip, 1.0 + clip) * A_R)


class _Seen:
    """Numbers of the passes, for the log."""

    def __init__(self):
        self.loss = 0.0
        self.surprise: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.ratios: list[torch.Tensor] = []

    def add(self, members: list[int], log_r, loss, log_p) -> None:
        self.loss += float(loss.detach().sum())
        self.surprise.append((torch.tensor(members), -log_p.detach().cpu()))
        self.ratios.append(log_r.detach().cpu().exp())

    def metrics(self, clip: float) -> dict[str, float]:
        r = torch.cat(self.ratios)
        return {
            "loss/ratio_min": float(r.min()),
            "loss/ratio_max": float(r.max()),
            "loss/ratio_mean": float(r.mean()),
            "loss/clip_fraction": float(((r - 1.0).abs() > clip).double().mean()),
        }
