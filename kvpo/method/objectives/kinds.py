"""Every objective there is: a recipe chooses one by `objective.kind`."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, get_args

from kvpo.method.objectives.denoised_distance import DenoisedDistance
from kvpo.method.objectives.kernel_grpo import KernelGrpo
from kvpo.method.objectives.nft import Nft
from kvpo.method.objectives.regression import Regression
from kvpo.method.objectives.rvm import Rvm
from kvpo.method.objectives.sde_grpo import SdeGrpo
from kvpo.method.objectives.tve_ppo import TvePpo

AnyObjective = TvePpo | Regression | Nft | Rvm | KernelGrpo | SdeGrpo | DenoisedDistance
"""Type of the setting `objective`; its `kind` tells which of them it is."""

OBJECTIVES: Mapping[str, type] = {kind.kind: kind for kind in get_args(AnyObjective)}
"""Name in a recipe -> the objective, which is its own settings."""


def objective_kind(name: Any) -> type:
    """An objective by its name.  ValueError with the nearest name where there is none."""
    if name in OBJECTIVES:
        return OBJECTIVES[name]
    near = difflib.get_close_matches(str(name), OBJECTIVES, n=1)
    raise ValueError(
        f"objective.kind = {name!r} is unknown"
        + (f"; did you mean {near[0]}?" if near else f"; choose one of {', '.join(OBJECTIVES)}")
    )
