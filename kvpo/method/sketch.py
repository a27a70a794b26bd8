"""A gradient in 4,096 numbers, whose inner products are those of the gradients on average.

    y = R x,   R[c ^ mask_row, (row, c)] = +-1        x cut into rows of 4,096 weights, tensor by tensor

Every weight has a random sign, every row a random shift of its places, both from hashes of the
weight's number that a named stream has salted: nothing as large as the gradient is kept, and every
device and any number of ranks has the same. Signs are independent pair by pair, so E<Ra, Rb> = <a,
b>; where no few weights hold all of a gradient, its standard deviation is about
|a| |b| / 64 (a count sketch; Charikar, Chen and Farach-Colton 2002).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.functional import pad

from kvpo.common.rng import stream

SIZE = 4096
PART = 1024 * SIZE
"""Weights at a time: their numbers take eight bytes each."""


class Sketch:
    """One random projection for gradients of ``count`` tensors."""

    def __init__(self, count: int, seed: int):
        self.salts = torch.randint(2**32, (count, 2), generator=stream(seed, "agreement")).tolist()

    @torch.no_grad()
    def __call__(self, gradients: Sequence[torch.Tensor | None]) -> torch.Tensor:
        """y [SIZE] float64, in main memory; None counts as zeros."""
        total = torch.zeros(SIZE, dtype=torch.float64)
        for x, (signs, places) in zip(gradients, self.salts, strict=True):
            if x is None:
                continue
            for number, part in enumerate(x.flatten().split(PART)):
                total += _folded(part, number * PART, signs, places).cpu()
        return total


def _folded(x: torch.Tensor, first: int, signs: int, places: int) -> torch.Tensor:
    """Sum of the signed weights at their rows' places, [SIZE] float64.

    ``first``: number of the first weight, a multiple of SIZE.
    """
    rows = -(-len(x) // SIZE)
    number = torch.arange(first, first + len(x), device=x.device)
    x = pad(
        torch.where(_mixed(number, signs) & 1 == 1, -x.float(), x.float()),
        (0, rows * SIZE - len(x)),
    ).view(rows, SIZE)
    mask = _mixed(torch.arange(first // SIZE, first // SIZE + rows, device=x.device), places) % SIZE
    return x.gather(1, torch.arange(SIZE, device=x.device) ^ mask[:, None]).sum(
        dim=0, dtype=torch.float64
    )


def _mixed(x: torch.Tensor, salt: int) -> torch.Tensor:
    """A hash of 32 bits: every bit of the input turns over about half of them.

    Held in int64, in which no product overflows.
    """
    x = (x + salt) & 0xFFFFFFFF
    for factor in (0x45D9F3B, 0x119DE1F3):
        x = ((x ^ (x >> 16)) * factor) & 0xFFFFFFFF
    return x ^ (x >> 16)
