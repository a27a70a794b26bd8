"""How far the components of a group's reward agree: where they pull apart, training on their sum gives one up for the other.

    rank    Spearman's rank correlation of two components' advantages over the branches
    sign    share of branches that one component puts above the anchor and the other below
    flat    1 where a component has no spread in the group, and so says nothing
"""

from __future__ import annotations

from itertools import combinations
from typing import Sequence

import torch


def conflicts(components: Sequence[str], A_KG: torch.Tensor) -> dict[str, float]:
    """Metrics of a group from the advantages of its branches that have rewards, both signals fused; pairs without spread have no rank correlation."""
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
    below, equal = (x_N[None] < x_N[:, None]).double().sum(1), (x_N[None] == x_N[:, None]).double().sum(1)
    return below + (equal - 1) / 2
