"""Policy gradient on the `renoise` sampler's own transition, a Gaussian kernel.

    x' = (1 - sigma') x0_theta(x) + sigma' eps,  so  log p_theta(x' | x) = -mean (x' - (1 - sigma') x0_theta(x))^2 / (2 sigma'^2) + const
    r = p_theta(x' | x) / p_old(x' | x)
    L = -mean_{g,b,s} min( r A_g, clip(r, 1 - clip, 1 + clip) A_g ) + beta KL(p_theta || p_ref)

(CM-GRPO of RAVEN, arXiv 2605.15190: a consistency step is a conditional Gaussian, and no auxiliary
process is needed.) Steps are those behind which the branch's noise is its own; the last step has no
noise. Log probabilities are means over a block's elements, as Flow-GRPO (arXiv 2505.05470) takes
them: the exact ones are larger by that number of elements, and their ratios would leave any clip
range at once. The KL of two steps is w_s mean (v - v_ref)^2 with the `kernel` step weights. At
theta = old the gradient is REINFORCE's, -mean A_g d log p.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from kvpo.common.late import Late
from kvpo.method.energies import squared_residual
from kvpo.method.objectives.interface import (
    GroupUpdate,
    Record,
    check_finite,
    energy_metrics,
    refuse_broken,
)

if TYPE_CHECKING:
    import torch

    from kvpo.common.timing import Phases
    from kvpo.method.advantages import Advantage
    from kvpo.method.explorers import Explorer
    from kvpo.method.replay import Replay, WindowReplay
    from kvpo.method.update import Updater
else:
    torch = Late("torch")


@dataclass(frozen=True)
class KernelGrpo:
    """Clipped policy gradient on the Gaussian steps of the `renoise` sampler."""

    kind: Literal["kernel_grpo"] = "kernel_grpo"
    """Name of this objective."""
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

    def refusal(self, explorer: Explorer, sampler: str) -> str:
        """Why branches have no likelihood of their own."""
        if sampler != "renoise":
            return f"a step of sampler {sampler} draws no noise, so nothing in it has a likelihood; use sampler renoise"
        if not explorer.own_renoise:
            return "its branches share the noise behind every step, so its likelihood says nothing of what distinguishes them; use explorer renoise"
        return ""

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
        kernel = Kernel(replay)
        refuse_broken("inputs", kernel.replay.inputs[replay.rows])
        start = self._start(learner, kernel, phases)
        A_M = learner.own(advantage.values.double(), advantage, len(replay.rows))
        on_policy = learner.policy.on_policy and before is None
        terms, seen = len(advantage.values) * kernel.terms, _Seen()
        losses = self._losses(kernel, A_M, on_policy, start, seen)
        scaled = (share / terms * loss_R.sum() for loss_R in losses)
        with phases("replay_grad"):
            metrics, sketch = learner.add_group(scaled, share, advantage, before)
        energy_M = learner.of_members(seen.surprise, len(replay.rows)) / kernel.terms
        metrics |= seen.metrics(self.clip) | energy_metrics(energy_M, share, learner.policy.lag)
        metrics["loss/policy"] = learner.total(seen.loss) / terms
        unknown = torch.full_like(energy_M, float("nan"))
        return GroupUpdate(energy_M, unknown, metrics, sketch=sketch)

    def _start(self, learner: Updater, kernel: Kernel, phases: Phases) -> torch.Tensor | None:
        """v_MPSFCHW of the start weights, where the KL holds to them and they are others by now."""
        with phases("replay_old"), learner.row.together():
            if self.kl_beta == 0.0 or learner.policy.updates == 0:
                return None
            with learner.policy.using(learner.policy.reference):
                return kernel.replay.all_velocities()

    def _losses(
        self,
        kernel: Kernel,
        A_M: torch.Tensor,
        on_policy: bool,
        start: torch.Tensor | None,
        seen: _Seen,
    ) -> Iterator[torch.Tensor]:
        """Yield the losses [R] of every pass's rows, with gradient."""
        for rows, v in kernel.replay.velocities():
            at = kernel.replay.places(rows)
            # the same weights: the recorded velocities differ from these by rounding
            old = v.detach() if on_policy else kernel.recorded(rows)
            log_p = kernel.log_p(rows, v)
            log_r = log_p - kernel.log_p(rows, old)
            loss_R = clipped(log_r, A_M[at[0]].to(v.device), self.clip)
            if start is not None:
                loss_R = loss_R + self.kl_beta * kernel.kl(rows, v, start[at])
            seen.add(at[0], log_r, loss_R, log_p)
            yield loss_R


class Kernel:
    """The Gaussian steps of a group whose noise is the branches' own."""

    def __init__(self, replay: Replay):
        """Find the steps; ValueError where the rollout has none."""
        trajectory, plans = replay.rollout.trajectory, replay.rollout.plans
        assert trajectory.inputs is not None, "the objective needs them"
        self.sigmas = [float(s) for s in replay.pipeline.geometry.sigmas]
        first = plans[0].renoise_from
        if first is None:
            raise ValueError(
                "these branches share all noise behind their denoise steps, so their kernel says nothing of them; explore by renoise"
            )
        self.steps = range(first, len(self.sigmas) - 1)
        self.terms = replay.rollout.window.blocks * len(self.steps)
        """Steps of every branch that count."""
        self.velocities = trajectory.velocities
        self.results = trajectory.inputs.roll(-1, dims=2)
        """x'_BPSFCHW: the next step's input."""
        self.replay: WindowReplay = replay.at(trajectory.inputs, self.sigmas, self.steps)

    def recorded(self, rows) -> torch.Tensor:
        """u_RFCHW, velocities of the weights that rolled out."""
        return self.replay.stored(self.velocities, rows)

    def log_p(self, rows, v: torch.Tensor) -> torch.Tensor:
        """log p(x' | x)_R float64 per element, less a constant, of velocities v_RFCHW."""
        here, after = self._levels(rows, v)
        x = self.replay.stored(self.replay.inputs, rows).double()
        result = self.replay.stored(self.results, rows).double()
        mean = (1.0 - after) * (x - here * v.double())
        return -squared_residual(mean, result) / (2.0 * after.flatten() ** 2)

    def kl(self, rows, v: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """KL_R float64 per element of the steps of two velocities at one input."""
        here, after = (x.flatten() for x in self._levels(rows, v))
        return (here * (1.0 - after) / after) ** 2 / 2.0 * squared_residual(v, other)

    def _levels(self, rows, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        pairs = [(self.sigmas[r.step], self.sigmas[r.step + 1]) for r in rows]
        both = torch.tensor(pairs, dtype=torch.float64, device=v.device)
        return both[:, 0].view(-1, 1, 1, 1, 1), both[:, 1].view(-1, 1, 1, 1, 1)


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
