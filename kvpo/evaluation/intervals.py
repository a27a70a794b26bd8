"""The interval of a mean over scripts: a bootstrap, bias-corrected and accelerated (BCa).

Differences over scripts are skewed (most stories change a little, a few change a lot), and an
interval of plain percentiles is then shifted towards the long tail's other side. BCa (Efron 1987)
moves its ends by the bias and the skewness that the sample itself shows; `scipy.stats.bootstrap`
computes it.

No bootstrap is honest with a handful of scripts: the sample does not show how far the next script
may lie. Of normal differences, 95 % intervals held the true mean in 78 % of 400 trials with 4
scripts, 88 % with 8, 92 % with 16 and 94 % with 32. So below `VERDICT_PAIRS` scripts the interval
is shown, and nothing is called better or worse by it.
"""

from __future__ import annotations

import numpy as np
import torch

RESAMPLES = 4000
TOTAL = "mean of trained"
"""The component that an evaluation is judged by: the mean of the rewards that were trained on."""
VERDICT_PAIRS = 16
"""Scripts from which on an interval that leaves out 0 is called better or worse."""


def bootstrap_interval(
    values_N: torch.Tensor, generator: torch.Generator, level: float = 0.95
) -> tuple[float, float]:
    """BCa interval of the mean over scripts.

    ``generator`` seeds the resampling, so the same stream gives the same interval.
    """
    values = values_N.double().numpy()
    seed = int(torch.randint(2**62, (), generator=generator))
    # Equal values, of equal weights say, have no distribution to correct; nor have those that
    # differ by rounding.
    if np.ptp(values) <= 1e-12 * np.abs(values).max():
        return (float(values.mean()),) * 2
    import scipy.stats  # a second to import, which only evaluations pay

    found = scipy.stats.bootstrap(
        (values,),
        np.mean,
        n_resamples=RESAMPLES,
        confidence_level=level,
        method="BCa",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return float(found.low), float(found.high)
