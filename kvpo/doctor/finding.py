"""One line of the doctor: an invariant, what was measured of it, and whether it holds."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Finding:
    """One invariant, and what was measured."""

    name: str
    value: float
    rule: str
    holds: bool


def at_most(name: str, value: float, limit: float) -> Finding:
    """Judge a value that must not be above ``limit``."""
    return Finding(name, value, f"<= {limit:g}", value <= limit)


def spread(x: torch.Tensor) -> float:
    """Largest difference of any row from the last."""
    return float((x - x[-1:]).abs().max())


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference of two tensors, as a share of the largest value of ``b``."""
    return float((a - b).abs().max() / b.abs().max())
