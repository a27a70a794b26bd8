"""Stage 7: energies and objective to gradients, a finite check, and the optimizer's step.

It is section 5 of method.md. The loss is a function of G numbers, so its cotangents are too: replay with gradient goes pass by
pass, each multiplied by its branches' numbers and freed. The gradient is the same whatever the size
of a pass; it is that of the energies with pages held still (method.md section 5), which at P = 1 is
all of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch

from kvpo.common.finite import finite
from kvpo.common.timing import Phases
from kvpo.distributed.ranks import Ranks
from kvpo.method.advantages import Advantage, UnsafePolicy
from kvpo.method.energies import Temperature, squared_residual
from kvpo.method.loss import ClippedObjective, entropy
from kvpo.method.replay import Replay
from kvpo.method.settings import OptimizerConfig
from kvpo.method.sketch import Sketch
from kvpo.method.velocity_penalty import VelocityPenalty
from kvpo.policy.policy import Policy


@dataclass(frozen=True)
class GroupUpdate:
    """Outcome of one group: its scores and what it added to the step's gradient."""

    energy: torch.Tensor
    """E_M float64 of the group's members under the current weights.

    It is NaN where the group was skipped.
    """
    pi: torch.Tensor
    """pi_old_M, the behaviour policy's share of every member; likewise."""
    metrics: Mapping[str, float]
    old: torch.Tensor | None = None
    """E_M under the behaviour weights; None where the group was skipped.

    It stays for the further updates on the same group.
    """
    reference: torch.Tensor | None = None
    """E_M under the reference weights; None where the group was skipped.

    It stays for the further updates too. It may also be None where the KL is to the behaviour
    policy, which needs no reference.
    """
    sketch: torch.Tensor | None = None
    """Sketch of the group's gradient before its clip, divided by the gradient's norm.

    None where the group's branches are tied, or nobody asked.
    """


class Updater:
    """Accumulates the gradients of a step's groups, then updates the policy."""

    def __init__(
        self,
        policy: Policy,
        config: OptimizerConfig,
        objective: ClippedObjective,
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
        """Add the clipped gradient of one group's loss. ``replay``: of this rank's members.
        ``before``: of an earlier update on the same group.

        ValueError naming quantity and branch where a number is not finite.
        """
        weight = self.unsafe.weight(advantage.safe)
        share = weight / self.groups
        metrics = {"group/safe": float(advantage.safe), "group/skipped": float(weight == 0.0)}
        if weight == 0.0:
            unknown = torch.full_like(advantage.values, float("nan"))
            return GroupUpdate(unknown, unknown, metrics)
        old_G, reference_G = (None, None) if before is None else (before.old, before.reference)
        with phases("replay_old"):
            moved = self.policy.updates > 0 and self.objective.asks_initial
            if before is None and moved:
                reference_G = self._energies_under(self.policy.reference, replay)
            if before is None and not self.policy.on_policy:
                old_G = self._energies_under(self.policy.behaviour, replay)
        with phases("replay_grad"):
            with self.row.together():
                shares = list(replay.passes()) if replay.single_pass else []
            energy_G = self._of_all(
                lambda: _sum(shares, len(replay.rows)) if shares else replay.energies()
            )
            # the same weights: the old scores are the detached new ones
            old_G = energy_G if old_G is None else old_G
            tau = self.temperature.resolve(old_G)
            reference_G = energy_G if self.policy.updates == 0 else reference_G
            logits = [None if e is None else -e / tau for e in (energy_G, old_G, reference_G)]
            loss = self.objective(*logits, advantage.values, share)
            first = self.row.stretch(len(advantage.fused)).start
            # dL / dE of the members here
            cotangent_G = (-loss.cotangent / tau)[first : first + len(replay.rows)]
            passes = (
                torch.dot(cotangent_G[branch].to(energy.device), energy)
                for branch, energy in shares or replay.passes()
            )
            # a tied group's gradient is the KL's, or rounding
            wanted = self.sketch if before is None and bool(advantage.values.any()) else None
            norm, sketch = self._add_clipped(passes, share, self.row, wanted)
        of_loss = dict(loss.metrics)
        if self.objective.kl_to == "initial" and not self.objective.asks_initial:
            del of_loss["loss/kl"]  # it would be the one to the behaviour policy
        log_pi = torch.log_softmax(-old_G / tau, dim=0)
        metrics |= {
            "energy/mean": float(energy_G.mean()),
            "energy/std": float(energy_G.std()),
            "policy/tau": tau,
            "policy/lag": self.policy.lag,
        }
        metrics |= {
            "policy/entropy": float(entropy(log_pi)),
            "policy/evenness": float(entropy(log_pi)) / math.log(len(log_pi)),
            "policy/top": float(log_pi.max().exp()),
        }
        metrics |= {"optim/grad_norm": norm}
        if self.config.clip_of == "group":
            metrics["optim/grad_clipped"] = float(norm > self.config.clip)
        return GroupUpdate(energy_G, log_pi.exp(), metrics | of_loss, old_G, reference_G, sketch)

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
            norm, _ = self._add_clipped(
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

    def _add_clipped(
        self, losses: Iterable[torch.Tensor], share: float, row: Ranks, sketch: Sketch | None = None
    ) -> tuple[float, torch.Tensor | None]:
        """Add the gradient of the losses' sum over the ranks of ``row`` to the step's.

        It is clipped by itself where ``clip_of`` is group; returned are its norm and its sketch
        before that. The losses are ``share`` of a whole group's. A gradient that is not finite is left for
        `step` to name.
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

    def _energies_under(self, weights: list[torch.Tensor], replay: Replay) -> torch.Tensor:
        with self.policy.using(weights):
            return self._of_all(replay.energies)

    def _of_all(self, energies: Callable[[], torch.Tensor]) -> torch.Tensor:
        """E_M of a group, put together from every rank's own members.

        The branches come in order, then the anchor where that is a member.
        """
        with self.row.together():
            own = energies()
        return torch.cat(self.row.gather(own))


def _norm(parameters: Iterable[torch.nn.Parameter]) -> torch.Tensor:
    return torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])


def _fault(parameter: torch.nn.Parameter) -> torch.Tensor:
    """1 where its gradient is not finite."""
    return (
        torch.zeros((), device=parameter.device)
        if parameter.grad is None
        else (~parameter.grad.isfinite()).any().float()
    )


def _sum(shares: list[tuple[torch.Tensor, torch.Tensor]], branches: int) -> torch.Tensor:
    """E_G, detached, from the shares of all passes."""
    energy = torch.zeros(branches, dtype=torch.float64)
    for branch, share in shares:
        energy.index_add_(0, branch, share.detach().cpu())
    return energy


def group_means(groups: list[Mapping[str, float]]) -> dict[str, float]:
    """Mean over a step's groups of every metric, over the groups that have it."""
    names = {name for metrics in groups for name in metrics}
    return {
        name: sum(values) / len(values)
        for name in sorted(names)
        if (values := [m[name] for m in groups if name in m])
    }
