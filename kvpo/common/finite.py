"""Numbers that are not finite: found before they become a black video or a checkpoint."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

from kvpo.common.wording import count_of


def finite(tensor: torch.Tensor) -> torch.Tensor:
    """Whether no number in it is NaN or infinite, as a bool tensor where ``tensor`` lies.

    It is one pass that allocates nothing, also over gigabytes.
    """
    if not tensor.numel() or not tensor.dtype.is_floating_point:
        return torch.ones((), dtype=torch.bool, device=tensor.device)
    if tensor.dtype.itemsize == 1:  # torch has no minimum of float8
        tensor = tensor.float()
    low, high = tensor.detach().aminmax()
    return low.isfinite() & high.isfinite()


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether all its numbers are finite.

    A tensor without memory, as `kvpo plan` counts with, has none.
    """
    return isinstance(tensor, FakeTensor) or bool(finite(tensor))


def not_finite(named: Iterable[tuple[str, torch.Tensor]]) -> list[str]:
    """Every tensor that holds such numbers, with how many."""
    return [
        f"{name} ({int((~t.isfinite()).sum())} of {t.numel()} numbers)"
        for name, t in named
        if not is_finite(t)
    ]


def check_finite(named: Iterable[tuple[str, torch.Tensor]], source: str, way_out: str) -> None:
    """Check that all numbers are finite.

    Raises FloatingPointError that names ``source`` and its tensors where one is not.
    """
    if faults := not_finite(named):
        listed = ", ".join(faults[:3]) + (" ..." if len(faults) > 3 else "")
        raise FloatingPointError(
            f"{source} holds numbers that are NaN or infinite, in {count_of(len(faults), 'tensor')}: {listed}; "
            f"{way_out}"
        )


def check_finite_json(path: Path) -> None:
    """Check that a network's description holds finite numbers alone; ValueError with the key if not.

    Python's JSON reads NaN, Infinity and 1e999, and what the network then makes would be blamed on
    its weights. A file that is no JSON is named by whoever loads it.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return
    if fault := _not_finite_in(content):
        raise ValueError(
            f"{path}: {fault} is no finite number, and a network can not compute with it; correct it, or copy the file again"
        )


def _not_finite_in(value: Any, name: str = "") -> str:
    """The first number of a JSON value that is NaN or infinite, with its key; "" where none is."""
    inside: Iterable[tuple[Any, Any]]
    if isinstance(value, dict):
        inside = value.items()
    elif isinstance(value, list):
        inside = enumerate(value)
    else:
        wrong = isinstance(value, float) and not math.isfinite(value)
        return f"{name} = {value}" if wrong else ""
    found = (_not_finite_in(v, f"{name}[{k}]" if name else str(k)) for k, v in inside)
    return next(filter(None, found), "")
