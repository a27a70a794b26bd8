"""Signal in a group's gradient: mean cosine rho between gradients of different groups.

It is measured while training.

Gradients of pure noise are orthogonal. If every group's is a common direction plus noise of its
own, the mean of N has a cosine of about sqrt(N rho / (1 + N rho)) with the common direction: N = 1
/ rho groups are needed until it is more signal than noise. Gradients are those before the clip,
brought to length 1, and kept as sketches (`kvpo.method.sketch`) over the last groups, several
steps' where a step has few: weights hardly move between them. Tied groups are left out. The KL's
pull back to the start, which all groups share, is part of them, and counts as agreement where it is
large. They are in every checkpoint, so a resumed run measures what the uninterrupted one does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from kvpo.distributed.ranks import Ranks
from kvpo.method.settings import LEAST_GROUPS, AgreementConfig
from kvpo.method.sketch import SIZE

NAME = "agreement.sketches"
"""Name of the sketches' tensor in a checkpoint."""


class Agreement:
    """Sketches of the latest groups' gradients, alike on all ranks."""

    def __init__(self, config: AgreementConfig):
        self.config = config
        self._latest = torch.zeros(0, SIZE)
        self._noted: dict[int, torch.Tensor] = {}
        """Group number -> sketch: this rank's groups of the step at work."""

    def note(self, group: int, sketch: torch.Tensor | None) -> None:
        """A group of this step; None where it has nothing to say."""
        if sketch is not None and self.config.window:
            self._noted[group] = sketch.float()

    def take(self, ranks: Ranks) -> dict[str, float]:
        """End the step: all ranks' groups join the window, in their order.

        Returns the metrics, empty until there are enough groups. All ranks must enter.
        """
        if not self.config.window:
            return {}
        noted, self._noted = self._noted, {}
        found = {group: sketch for part in ranks.gather(noted) for group, sketch in part.items()}
        self._latest = torch.cat([self._latest, *(found[group][None] for group in sorted(found))])[
            -self.config.window :
        ]
        return metrics_of(self._latest)

    def state(self) -> dict[str, torch.Tensor]:
        """Tensors for a checkpoint, by name."""
        return {NAME: self._latest} if len(self._latest) else {}

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take over a checkpoint's sketches; checkpoints older than the measurement have none."""
        if NAME in tensors and self.config.window:
            self._latest = tensors[NAME][-self.config.window :].clone()


def metrics_of(x_ND: torch.Tensor) -> dict[str, float]:
    """Metrics of gradients x_ND of length 1, or of their sketches; empty if they are too few."""
    N = len(x_ND)
    if N < LEAST_GROUPS:
        return {}
    cosine, error = mean_cosine(x_ND)
    needed = {"agreement/needed": needed_groups(cosine)} if cosine > error else {}
    return {"agreement/cosine": cosine, "agreement/error": error, "agreement/groups": N} | needed


def mean_cosine(x_ND: torch.Tensor) -> tuple[float, float]:
    """Mean over pairs of different rows of their product, and its standard error.

    The jackknife over rows has what rows have in common, but counts chance agreement of single
    pairs twice; taken off once, it is right where rows are pure noise as well, and where they are
    not it is the smaller part.
    """
    x = x_ND.double()
    N, products = len(x), x @ x.T
    products.fill_diagonal_(0.0)
    by_row, pairs = products.sum(dim=1), products[*torch.triu_indices(N, N, 1)]
    mean = by_row.sum() / (N * (N - 1))
    without = (by_row.sum() - 2.0 * by_row) / ((N - 1) * (N - 2))
    jackknife = (N - 1) / N * (without - without.mean()).square().sum()
    chance = pairs.var() / len(pairs)
    return float(mean), math.sqrt(float(torch.maximum(jackknife - chance, chance)))


def needed_groups(cosine: float) -> float:
    """N at which N rho = 1; infinite where there is no agreement."""
    return 1.0 / cosine if cosine > 0.0 else math.inf


def signal(groups: int, cosine: float) -> float:
    """Common share of the squared length of the mean of so many groups' gradients.

    It is N rho / (1 + N rho).
    """
    return max(groups * cosine, 0.0) / (1.0 + max(groups * cosine, 0.0))


def sentence(cosine: float, error: float, groups: int, step: int) -> str:
    """Explain the mean cosine and its standard error in a sentence.

    ``groups``: number over which it was measured. ``step``: groups of one step.
    """
    begin = f"Over the last {groups} groups, gradients of two groups have a mean cosine of {cosine:.3f} (standard error {error:.3f})"
    most = cosine + 2.0 * error
    if cosine < 2.0 * error:
        least = (
            f"at least {needed_groups(most):.0f} groups are"
            if most > 0.0
            else "more groups than can be said are"
        )
        return f"{begin}, which can not be told from none: {least} needed until their mean direction is more signal than noise; a step has {step}"
    low, high = needed_groups(most), needed_groups(cosine - 2.0 * error)
    about = (
        f"about {needed_groups(cosine):.0f} groups ({low:.0f} to {high:.0f})"
        if math.isfinite(high) and high < 1e5
        else f"about {needed_groups(cosine):.0f} groups (at least {low:.0f})"
    )
    return f"{begin}: {about} until their mean direction is more signal than noise; a step has {step}, and {signal(step, cosine):.0%} of its squared length is signal"


def latest(records: Sequence[Mapping[str, float]]) -> Mapping[str, float] | None:
    """The last record that has it."""
    return next((r for r in reversed(records) if "agreement/cosine" in r), None)
