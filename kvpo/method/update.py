"""Stage 7: the gradients of a step's groups, a finite check, and the optimizer's step.

What a group's gradient is, the objective says (`kvpo.method.objectives`). It is taken with pages
held still (method.md section 5), which at P = 1 is all of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

import torch

from kvpo.common.finite import finite
from kvpo.common.timing import Phases
from kvpo.distributed.ranks import Ranks
from kvpo.method.advantages import Advantage, UnsafePolicy
from kvpo.method.energies import Temperature, added_up, squared_residual
from kvpo.method.objectives.interface import GroupUpdate, Objective
from kvpo.method.replay import Replay
from kvpo.method.settings import OptimizerConfig
from kvpo.method.sketch import Sketch
from kvpo.method.velocity_penalty import VelocityPenalty
from kvpo.policy.policy import Policy


class Updater:
    """Accumulates the gradients of a step's groups, then updates the policy."""

    def __init__(
        self,
        policy: Policy,
        config: OptimizerConfig,
        objective: Objective,
        temperature: Temperature,
        unsafe: UnsafePolicy,
        groups: int,
        row: Ranks = Ranks(),
        sketch: Sketch | None = None,
    ):
        """``row``: the ranks that share a group with this one, each with members of its own.
        ``sketch``: takes one of every group's gradient."""
        self.row, self.sketch = row, sketch
        self.policy, self.config, self.objective = policy, config, objective
        self.temperature, self.unsafe, self.groups = temperature, unsafe, groups
        self.optimizer = torch.optim.AdamW(
            policy.parameters,
            lr=config.lr,
            betas=(config.beta1, config.beta2),
            eps=config.eps,
            weight_decay=config.weight_decay,
        )

    def accumulate(
        self,
        replay: Replay,
        advantage: Advantage,
        phases: Phases,
        before: GroupUpdate | None = None,
    ) -> GroupUpdate:
        """Add the clipped gradient of one group's loss.

        ``replay``: of this rank's members. ``before``: of an earlier update on the same group.
        ValueError naming quantity and branch where a number is not finite.
        """
        weight = self.unsafe.weight(advantage.safe)
        metrics = {"group/safe": float(advantage.safe), "group/skipped": float(weight == 0.0)}
        if weight == 0.0:
            unknown = torch.full_like(advantage.values, float("nan"))
            return GroupUpdate(unknown, unknown, metrics)
        share = weight / self.groups
        update = self.objective.add(self, replay, advantage, share, phases, before)
        return replace(update, metrics={**metrics, **update.metrics})

    # What objectives ask for.

    def of_all(self, numbers: Callable[[], torch.Tensor]) -> torch.Tensor:
        """x_M of a group, put together from what ``numbers`` gives of every rank's own members.

        The branches come in order, then the anchor where that is a member. All ranks of a row
        enter.
        """
        with self.row.together():
            own = numbers()
        return torch.cat(self.row.gather(own))

    def of_members(
        self, shares: Iterable[tuple[torch.Tensor, torch.Tensor]], members: int
    ) -> torch.Tensor:
        """x_M float64 of a group, from (member [R], share of its number [R]) of every pass here.

        All ranks of a row enter.
        """
        return torch.cat(self.row.gather(added_up(shares, members)))

    def total(self, value: float) -> float:
        """Sum of a number over the ranks of a row; all of them enter."""
        return sum(self.row.gather(value))

    def own(self, values_M: torch.Tensor, advantage: Advantage, members: int) -> torch.Tensor:
        """The part of a group's numbers that belongs to the ``members`` of this rank."""
        first = self.row.stretch(len(advantage.fused)).start
        return values_M[first : first + members]

    def add_group(
        self,
        losses: Iterable[torch.Tensor],
        share: float,
        advantage: Advantage,
        before: GroupUpdate | None,
    ) -> tuple[dict[str, float], torch.Tensor | None]:
        """Add the gradient of the losses of this rank's members, and their sum over the row.

        Returned are metrics of its norm, and its sketch where one is asked for.
        """
        # a tied group's gradient is the KL's, or rounding
        wanted = self.sketch if before is None and bool(advantage.values.any()) else None
        norm, sketch = self.add_clipped(losses, share, self.row, wanted)
        metrics = {"optim/grad_norm": norm}
        if self.config.clip_of == "group":
            metrics["optim/grad_clipped"] = float(norm > self.config.clip)
        return metrics, sketch

    def hold(
        self, penalty: VelocityPenalty, velocities: Callable[[], list[torch.Tensor]], phases: Phases
    ) -> dict[str, float]:
        """Add the clipped gradient of the velocity penalty on one group's held blocks.

        ``velocities``: gives theirs under the weights in the module. One rank of a row does this.
        Nothing is added where there are none, and before the first update, when both velocities
        are the same.
        """
        if self.policy.updates == 0:
            return {}
        with phases("hold"):
            with self.policy.using(self.policy.reference):
                reference = velocities()
            if not reference:
                return {}
            distance = squared_residual(torch.cat(velocities()), torch.cat(reference)).mean()
            norm, _ = self.add_clipped(
                [penalty.weight / self.groups * distance], 1.0 / self.groups, Ranks()
            )
        return {"hold/distance": float(distance.detach()), "hold/grad_norm": norm}

    def step(self, last: bool = True) -> dict[str, float]:
        """One optimizer update, the ``last`` on this step's groups or not.

        FloatingPointError, before anything has changed, where a gradient is not finite; and where
        the update itself has made numbers that are not, after which `Policy.broken` forbids to
        save.
        """
        rate = self.config.lr * min(1.0, (self.policy.updates + 1) / self.config.warmup)
        if all(
            p.grad is None for p in self.policy.parameters
        ):  # every group of the step was skipped
            return {"optim/lr": rate, "optim/grad_norm": 0.0, "optim/grad_clipped": 0.0}
        if not (
            norm := self.policy.layout.total(_norm(self.policy.parameters).double().square()).sqrt()
        ).isfinite():
            faults = self.policy.layout.total(
                torch.stack([_fault(p) for p in self.policy.parameters])
            )
            bad = [n for n, fault in zip(self.policy.names, faults) if fault]
            raise FloatingPointError(
                f"gradient norm is {float(norm)} at update {self.policy.updates}; not finite in {len(bad)} tensors, first {', '.join(bad[:3])}; nothing was updated. "
                "Look at this step's rewards and energies, or start a new run with a lower optimizer.lr"
            )
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        metrics = {"optim/lr": rate, "optim/step_norm": float(norm)}
        if self.config.clip_of == "step":
            torch.nn.utils.clip_grads_with_norm_(self.policy.parameters, self.config.clip, norm)
            metrics["optim/grad_clipped"] = float(norm > self.config.clip)
        self.optimizer.step()
        self._refuse_broken()
        self.optimizer.zero_grad(set_to_none=True)
        self.policy.updated(last)
        return metrics | {"optim/drift": self.policy.drift()}

    def _refuse_broken(self) -> None:
        """Raise FloatingPointError where the update has left a weight or moment that is not finite.

        All ranks enter.
        """
        policy, state = self.policy, self.optimizer.state
        found = [
            [p.detach(), *(x for x in state[p].values() if x.dim())] for p in policy.parameters
        ]
        faults = policy.layout.total(
            torch.stack([(~torch.stack([finite(x) for x in xs]).all()).float() for xs in found])
        )
        if bad := [name for name, fault in zip(policy.names, faults) if fault]:
            policy.broken = True
            raise FloatingPointError(
                f"update {policy.updates} left numbers that are NaN or infinite in the weights or moments of {len(bad)} tensors, first {', '.join(bad[:3])}; it is "
                "not saved. The checkpoints before it are whole: go on from the newest by --resume, or start a new run with a lower optimizer.lr or a larger optimizer.eps"
            )

    def add_clipped(
        self, losses: Iterable[torch.Tensor], share: float, row: Ranks, sketch: Sketch | None = None
    ) -> tuple[float, torch.Tensor | None]:
        """Add the gradient of the losses' sum over the ranks of ``row`` to the step's.

        It is clipped by itself where ``clip_of`` is group; returned are its norm and its sketch
        before that. The losses are ``share`` of a whole group's. A gradient that is not finite is
        left for `step` to name.
        """
        collecting = self.policy.layout.collecting
        earlier = [p.grad for p in collecting]
        for p in collecting:
            p.grad = None
        with row.together():
            for loss in losses:
                loss.backward()
        row.add_gradients(collecting)
        norm = _norm(collecting)
        taken = (
            sketch([p.grad for p in collecting]) / float(norm)
            if sketch and norm.isfinite() and norm > 0.0
            else None
        )
        if norm.isfinite() and self.config.clip_of == "group":
            torch.nn.utils.clip_grads_with_norm_(collecting, self.config.clip * share, norm)
        for p, before in zip(collecting, earlier):
            if not row.first:  # the first carries it into the sum over all ranks
                p.grad = before
            elif before is not None:
                p.grad = before if p.grad is None else p.grad.add_(before)
        return float(norm) / share, taken


def _norm(parameters: Iterable[torch.nn.Parameter]) -> torch.Tensor:
    return torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])


def _fault(parameter: torch.nn.Parameter) -> torch.Tensor:
    """1 where its gradient is not finite."""
    return (
        torch.zeros((), device=parameter.device)
        if parameter.grad is None
        else (~parameter.grad.isfinite()).any().float()
    )


def group_means(groups: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Mean over a step's groups of every metric, over the groups that have it."""
    names = {name for metrics in groups for name in metrics}
    return {
        name: sum(values) / len(values)
        for name in sorted(names)
        if (values := [m[name] for m in groups if name in m])
    }
