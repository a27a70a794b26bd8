"""A block as it was made, and the digest that says whether it was made the same again."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Made:
    """A block as it was made."""

    node: int
    block: int
    pixels: torch.Tensor
    """Frames of every row, uint8 [R, T, 3, H, W]; a story has one row."""
    seconds: float
    same: bool | None = None
    """Whether it equals what was made here before, bit for bit; None: made for the first time."""


def digest(pixels_T3HW: torch.Tensor) -> str:
    """Digest of a block's frames: equal for equal bytes and, but for chance, for nothing else."""
    return hashlib.blake2b(pixels_T3HW.contiguous().numpy().tobytes(), digest_size=8).hexdigest()
