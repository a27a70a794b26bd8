"""Denoise steps that are Gaussians: x' = on_x x + on_v v + std eps.

Of the `renoise` sampler every step but the last is one. Of `ode` none is; `sde_step` gives it noise
and changes its drift, so that the states at every noise level keep their distribution. With s the
noise level, ds = s' - s < 0 and score(x) = -(x + (1 - s) v) / s:

    x' = x + [ v + sigma^2 / (2 s) (x + (1 - s) v) ] ds + sigma sqrt(-ds) eps

(Flow-GRPO, arXiv 2505.05470; derived in method.md section 9.)
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class GaussianStep:
    """A step whose mean is linear in the network's input x and its velocity v."""

    on_x: float
    on_v: float
    std: float

    def of(self, x: Any, v: Any, eps: Any) -> Any:
        """x' of tensors of any shape, or of numbers."""
        return self.on_x * x + self.on_v * v + self.std * eps


def renoise_step(sigma: float, after: float) -> GaussianStep:
    """The `renoise` sampler's step to noise level ``after``: (1 - after) x0 + after eps."""
    return GaussianStep(1.0 - after, -(1.0 - after) * sigma, after)


def sde_step(sigma: float, after: float, std: float) -> GaussianStep:
    """The Euler-Maruyama step to noise level ``after`` that adds noise of ``std``.

    std^2 is sigma_s^2 |ds|, so the drift's own term is std^2 / (2 s), whatever the step. ``std`` 0
    gives Euler's step, the `ode` sampler's.
    """
    pull = std**2 / (2.0 * sigma)
    return GaussianStep(1.0 - pull, after - sigma - pull * (1.0 - sigma), std)


def sde_stds(sigmas: Sequence[float], noise_level: float) -> tuple[float, ...]:
    """Standard deviation of the noise of every denoise step: a sqrt(s / (1 - s)) sqrt(|ds|).

    ``noise_level`` is a. The last step, which leads to clean latents, has none. At s = 1 that number
    is infinite: the next level stands for it in 1 - s, as in the public code of the paper.
    """
    found = []
    for sigma, after in itertools.pairwise(sigmas):
        left = 1.0 - (after if sigma >= 1.0 else sigma)
        found.append(noise_level * math.sqrt(sigma / left * (sigma - after)))
    return (*found, 0.0)
