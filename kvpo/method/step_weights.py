"""Weight of each denoise step in a branch's energy: w_S, of mean 1 (method.md section 5).

    equal    1 at every step, the paper's
    kernel   the `renoise` sampler's own.  Its step x' = (1 - sigma') x0 + sigma' eps is a Gaussian of mean (1 - sigma') x0 and
             standard deviation sigma'; two policies at one input differ by x0 - x0' = -sigma (v -
             v'), so the KL of their steps is
                 w_s ||v - v'||^2,    w_s = sigma_s^2 (1 - sigma'_s)^2 / (2 sigma'_s^2)
    numbers  one a step

The last step has no re-noise behind it: sigma' = 0, a Dirac, and its KL is infinite wherever two
policies differ at all. Taken exactly it would be the only step that counts. Its output has to be
seen through some noise, of level ``last_sigma``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from kvpo.common.late import Late

if TYPE_CHECKING:
    import torch
else:
    torch = Late("torch")

StepWeights = Literal["equal", "kernel"] | tuple[float, ...]


def refuse_bad(weights: StepWeights, last_sigma: float) -> None:
    """Refuse what can be no weights, whatever the generator's steps.

    Raises ValueError.
    """
    if not 0.0 < last_sigma < 1.0:
        raise ValueError(
            f"last_sigma = {last_sigma} must lie in (0, 1): 0 would leave the last step alone, 1 would leave it out"
        )
    if isinstance(weights, str):
        if weights not in ("equal", "kernel"):
            raise ValueError(
                f"step weights {weights!r} are unknown; choose equal, kernel, or give a number for every denoise step"
            )
        return
    if not all(0.0 <= w < math.inf for w in weights) or not any(weights):
        raise ValueError(
            f"step weights {list(weights)} must not be negative, and at least one must be positive; a step of weight 0 is not replayed"
        )


def step_weights(weights: StepWeights, sigmas: Sequence[float], last_sigma: float) -> torch.Tensor:
    """w_S float64 of mean 1.  ValueError where they do not fit these steps."""
    if weights == "equal":
        return torch.ones(len(sigmas), dtype=torch.float64)
    found = (
        kernel(sigmas, last_sigma)
        if weights == "kernel"
        else torch.tensor(weights, dtype=torch.float64)
    )
    if len(found) != len(sigmas):
        raise ValueError(
            f"{len(found)} step weights {list(weights)}, but this generator takes {len(sigmas)} denoise steps; give one a step"
        )
    return found / found.mean()


def kernel(sigmas: Sequence[float], last_sigma: float) -> torch.Tensor:
    """sigma^2 (1 - sigma')^2 / (2 sigma'^2) of every step, float64.

    The last step's sigma' is ``last_sigma``.
    """
    here = torch.tensor([float(s) for s in sigmas], dtype=torch.float64)
    after = torch.tensor([*(float(s) for s in sigmas[1:]), last_sigma], dtype=torch.float64)
    if not (here > after).all():
        raise ValueError(
            f"kernel step weights need falling noise levels, not {[*map(float, sigmas)]} with last_sigma = {last_sigma} behind them; use equal or a number a step"
        )
    return here.square() * (1.0 - after).square() / (2.0 * after.square())
