"""Velocities of a branch that are replayed: all, or a random few with the energy's exact mean.

    E_drawn(g) = 1 / (P S) sum_{(b, s) drawn} f_{b,s} w_s e_{b,s}(g)        f_{b,s} = 1 / P((b, s) is drawn)

The mean of E_drawn over the draw is E, and so is that of its gradient. All branches of a group have
one draw, and so have all weights that replay it: what a pair adds to every branch alike cancels in
the comparison. The temperature, the clip and the KL see the drawn energies; of those, which are no
linear functions of them, the expectation is not exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvpo.common.late import Late

if TYPE_CHECKING:
    import torch
else:
    torch = Late("torch")


@dataclass(frozen=True)
class PairSampling:
    """Draw of the (block, step) pairs of a window that a group's replays evaluate."""

    count: int = 0
    """Pairs of a window that are replayed, drawn anew for every group; 0 = all.
    Of 5 blocks and 4 steps there are 20; replays cost as much as pairs are replayed, and the
    gradient's noise grows as they get fewer."""

    def __post_init__(self):
        if self.count < 0:
            raise ValueError(f"pairs.count = {self.count} must be 1 or more, or 0 for all pairs")

    def replayed(self, pairs: int) -> int:
        """Number of pairs that are replayed, of so many."""
        return min(self.count or pairs, pairs)

    def factors(self, weights_PS: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """f_PS float64: 0 for pairs that are not replayed, else what their energy is multiplied by.

        Among the pairs whose weight is not 0 every subset of ``count`` is as likely as any other.
        """
        worth = (weights_PS > 0.0).flatten().nonzero().flatten()
        drawn = self.replayed(len(worth))
        factors = torch.zeros(weights_PS.numel(), dtype=torch.float64)
        chosen = worth
        if drawn < len(worth):
            chosen = worth[torch.randperm(len(worth), generator=generator)[:drawn]]
        factors[chosen] = len(worth) / drawn
        return factors.reshape(weights_PS.shape)
