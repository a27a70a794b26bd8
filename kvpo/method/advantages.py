"""Stage 4: one advantage per branch, its reward against the anchor's (method.md section 3).

In this order, each step on the scale the one before left:

    per component and signal   A = (r_g - r_anchor) / std over branches and anchor
    over components            A = sum_k weight_k A_k
    over signals               A = local A_local + global A_global            "safe" is read off here
    centre, then clamp         A = clamp(A - mean A), the mean over the group's members: the branches, and if asked for the anchor with A = 0

A constant added to all A has (nearly) no gradient, because pi sums to one. So without the anchor
among the members only the branches' ranking counts: that all of them are worse than what the policy
does by itself teaches nothing. Clamping before centring would flatten a group that is far above or
far below its anchor.

How far the components of a group's reward agree: where they pull apart, training on their sum gives
one up for the other.

    rank    Spearman's rank correlation of two components' advantages over the branches
    sign    share of branches that one component puts above the anchor and the other below
    flat    1 where a component has no spread in the group, and so says nothing
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import TYPE_CHECKING, Literal

from kvpo.common.late import Late
from kvpo.method.batch_spread import Spread
from kvpo.types import RewardTable

if TYPE_CHECKING:
    import torch
else:
    torch = Late("torch")

MIN_VALID = 0.75
"""Smallest share of valid rows with which a group is used.

A mean over fewer says more about the failures than about the branches.
"""


class Unmeasurable(ValueError):
    """Error of a group that can not be compared: too few rows or its anchor lack rewards."""


@dataclass(frozen=True)
class Advantage:
    """Advantages of one group, and how they came about."""

    values: torch.Tensor
    """A_M float64 of the group's M members, the first M rows of the rollout.

    Centred and clamped; 0 where rewards are missing.
    """
    fused: torch.Tensor
    """A_G float64 before centring; above 0 = better than the anchor, 0 = no rewards."""
    local: torch.Tensor
    """A_KG float64 per component, unweighted: the window's clip."""
    global_: torch.Tensor
    """A_KG float64 per component, unweighted: the clips from the fork on."""
    valid: torch.Tensor
    """bool_M: members that have rewards."""
    safe: bool
    """Some branch beats the anchor in the fused advantage."""
    metrics: dict[str, float]


@dataclass(frozen=True)
class Advantages:
    """The advantage rule and its settings."""

    weights: Mapping[str, float] = field(default_factory=dict)
    """Component -> weight; empty = every component counts 1.
    Otherwise it must name every component."""
    local: float = 1.0
    """Weight of the local signal: rewards of the window's clip."""
    global_: float = 0.5
    """Weight of the global signal: rewards of the clips from the fork on."""
    anchor: bool = False
    """The anchor is a member of the group, so branches compete with it too.
    It has A = 0 before centring, an energy (0 under the weights that made it) and a share of pi.
    Then branches compete with what the policy does by itself, not only with each other."""
    clamp: float = 5.0
    """Bound of |A| after centring, 0 = none.
    One component of weight 1 in a group of 8 stays below 1.5 * 2.7 = 4, so the default only acts on
    heavier or several agreeing components."""
    std: Literal["group", "step"] = "group"
    """Standard deviation that rewards are divided by, per component and signal.
    `group`: the group's own, so that every group counts alike however little its branches differ.
    `step`: one for all groups of the step (`kvpo.method.batch_spread`), so that a group counts by
    its spread."""
    std_floor: float = 1e-5
    """Smallest standard deviation that counts, in reward units.
    A component whose std (of ``std``'s kind) is below this says nothing: it contributes 0, not
    amplified rounding."""

    def __post_init__(self):
        if self.clamp < 0.0 or self.std_floor <= 0.0:
            raise ValueError(
                f"clamp = {self.clamp} must be 0 (none) or positive, and std_floor = {self.std_floor} positive"
            )
        if self.std not in ("group", "step"):
            raise ValueError(f"advantages.std = {self.std!r} is unknown; choose group or step")

    def __call__(self, table: RewardTable, spread: Spread | None = None) -> Advantage:
        """Compute the group's advantages; ``spread``: the step's, None: the group's own.

        Raises `Unmeasurable` if the anchor or over a quarter of the rows lack rewards, ValueError
        if a valid row holds a NaN.
        """
        valid = _checked(table)
        stds = (None, None) if spread is None else (spread.local, spread.global_)
        local_KG, global_KG = (
            relative_to_anchor(r_KB, valid, self.std_floor, std_K)
            for r_KB, std_K in zip((table.local, table.global_), stds)
        )
        weights_K = self.component_weights(table.components)
        fused = self.local * weigh(local_KG, weights_K) + self.global_ * weigh(global_KG, weights_K)
        members = torch.cat((fused, fused.new_zeros(1))) if self.anchor else fused
        ranked = valid[: len(members)]
        values = torch.where(ranked, members - members[ranked].mean(), 0.0)
        clamped = values.clamp(-self.clamp, self.clamp) if self.clamp > 0.0 else values
        return Advantage(
            values=clamped,
            fused=fused,
            local=local_KG,
            global_=global_KG,
            valid=ranked,
            safe=bool((fused > 0.0).any()),
            metrics=_metrics(table, fused, values, clamped, local_KG, global_KG, ranked),
        )

    def by_component(self, advantage: Advantage) -> torch.Tensor:
        """A_KG of every component, both signals, unweighted: what it alone would say."""
        return self.local * advantage.local + self.global_ * advantage.global_

    def component_weights(self, components: tuple[str, ...]) -> torch.Tensor:
        """w_K float64.  ValueError where names and weights do not match."""
        if not self.weights:
            return torch.ones(len(components), dtype=torch.float64)
        if set(self.weights) != set(components):
            raise ValueError(
                f"advantage weights name {sorted(self.weights)} but the rewards are {sorted(components)}; give every component a weight (0 = log only), or none at all"
            )
        return torch.tensor([float(self.weights[name]) for name in components], dtype=torch.float64)


@dataclass(frozen=True)
class UnsafePolicy:
    """Treatment of a group in which no branch beats the anchor: a factor on its whole loss."""

    kind: Literal["skip", "scale", "none"] = "none"
    """`skip` = 0, `scale` = ``factor``, `none` = the group counts like any other."""
    factor: float = 0.5
    """The factor of kind `scale`."""

    def __post_init__(self):
        if self.kind not in ("skip", "scale", "none"):
            raise ValueError(f"unsafe policy {self.kind!r} is unknown; choose skip, scale or none")
        if not 0.0 < self.factor < 1.0:
            raise ValueError(
                f"unsafe factor {self.factor} must lie in (0, 1); write skip for 0 and none for 1"
            )

    def weight(self, safe: bool) -> float:
        """Factor on the group's loss."""
        if safe or self.kind == "none":
            return 1.0
        return 0.0 if self.kind == "skip" else self.factor


def anchor_advantage(r_B: torch.Tensor, eps: float = 0.0) -> torch.Tensor:
    """A_(B-1) = (r_g - r_anchor) / (std + eps), unbiased std over all rows.

    The anchor is the last row.
    """
    return (r_B[:-1] - r_B[-1]) / (r_B.std() + eps)


def relative_to_anchor(
    r_KB: torch.Tensor, valid_B: torch.Tensor, std_floor: float, std_K: torch.Tensor | None = None
) -> torch.Tensor:
    """A_KG float64 of every component over the valid rows.

    0 for invalid rows and for components without spread. ``std_K``: divide by these instead of the
    group's own.
    """
    A_KG = torch.zeros(r_KB.shape[0], r_KB.shape[1] - 1, dtype=torch.float64)
    for k, (A_G, r_B) in enumerate(zip(A_KG, r_KB.double())):
        r = r_B[valid_B]
        std = r.std() if std_K is None else std_K[k]
        if std >= std_floor:
            A_G[valid_B[:-1]] = anchor_advantage(r) if std_K is None else (r[:-1] - r[-1]) / std
    return A_KG


def measurable(table: RewardTable) -> bool:
    """Whether a group can be compared.  ValueError if a valid row holds a NaN."""
    try:
        _checked(table)
    except Unmeasurable:
        return False
    return True


def weigh(A_KG: torch.Tensor, w_K: torch.Tensor) -> torch.Tensor:
    """A_G = sum_k w_k A_k."""
    return (w_K[:, None] * A_KG).sum(dim=0)


def _checked(table: RewardTable) -> torch.Tensor:
    """The valid rows, after everything that would silently spoil an advantage has been refused."""
    K, B = len(table.components), table.valid.numel()
    for signal, r_KB in (("local", table.local), ("global", table.global_)):
        if r_KB.shape != (K, B):
            raise ValueError(
                f"{signal} rewards have shape {tuple(r_KB.shape)}, expected {K} components x {B} rows; give a table with one reward of each component for each row"
            )
        bad = (~r_KB.isfinite() & table.valid).nonzero().tolist()
        if bad:
            cases = ", ".join(
                f"{table.components[k]} of row {b} = {r_KB[k, b].item()}" for k, b in bad
            )
            raise ValueError(
                f"{signal} rewards of rows marked valid are not finite: {cases}; mark such rows invalid or repair the reward"
            )
    count = int(table.valid.sum())
    if B < 3 or not table.valid[-1] or count < max(3, MIN_VALID * B):
        missing = (~table.valid).nonzero().flatten().tolist()
        raise Unmeasurable(
            f"{count} of {B} rows have rewards (missing: {missing}; row {B - 1} is the anchor); the anchor, at least two branches and {MIN_VALID:.0%} of all rows "
            "are needed for a fair comparison; look at the reward's own error"
        )
    return table.valid


def _metrics(
    table: RewardTable, fused, values, clamped, local_KG, global_KG, ranked
) -> dict[str, float]:
    """Plain numbers for the log."""
    branches = table.valid[:-1]
    metrics = {
        "advantage/std": values[ranked].std().item(),
        "advantage/above_anchor": (fused[branches] > 0.0).double().mean().item(),
        "advantage/clamped": (values != clamped)[ranked].double().mean().item(),
        "advantage/tied": float(not values[ranked].any()),
        "advantage/valid": table.valid.double().mean().item(),
    }
    for signal, A_KG in (("local", local_KG), ("global", global_KG)):
        for name, A_G in zip(table.components, A_KG):
            metrics[f"advantage/{signal}/{name}"] = A_G[branches].mean().item()
    return metrics


def conflicts(components: Sequence[str], A_KG: torch.Tensor) -> dict[str, float]:
    """Metrics of how far components disagree, from A_KG of the branches that have rewards.

    Both signals are fused already. Pairs without spread have no rank correlation.
    """
    metrics = {f"conflict/{name}/flat": float(not A_G.any()) for name, A_G in zip(components, A_KG)}
    for (a, A_G), (b, B_G) in combinations(zip(components, A_KG), 2):
        metrics[f"conflict/{a}-{b}/sign"] = float((A_G * B_G < 0).double().mean())
        correlation = spearman(A_G, B_G)
        if correlation == correlation:
            metrics[f"conflict/{a}-{b}/rank"] = correlation
    return metrics


def spearman(a_N: torch.Tensor, b_N: torch.Tensor) -> float:
    """Correlation of ranks, ties sharing theirs; NaN where one of them is constant."""
    a, b = (ranks(x) - ranks(x).mean() for x in (a_N, b_N))
    room = float(a.norm() * b.norm())
    return float(a @ b) / room if room > 0 else float("nan")


def ranks(x_N: torch.Tensor) -> torch.Tensor:
    """0 = lowest; equal values have the mean of the ranks they span."""
    below = (x_N[None] < x_N[:, None]).double().sum(1)
    equal = (x_N[None] == x_N[:, None]).double().sum(1)
    return below + (equal - 1) / 2
