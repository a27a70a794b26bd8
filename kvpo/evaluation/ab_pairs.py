"""`kvpo ab`: two generators' videos side by side on one static page.

People compare them without knowing which is which.

    OUT/page/index.html   what raters get; opens offline and asks for every pair VQ, MQ, TA and overall: left, same or right
    OUT/key.json          which side is whose, for `kvpo unblind`; not for raters

Both generators get the same scripts with the same noise. A is on the left in half of the pairs (one
more where their number is odd and the draw says so), drawn from the stream (seed, "ab", "sides"),
so that a preference for a side cancels.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from kvpo.common.files import write_atomic
from kvpo.common.rng import stream
from kvpo.generators.geometry import Geometry
from kvpo.types import Script


@dataclass(frozen=True)
class Pair:
    script: Script
    seed: int
    left: str
    """Owner of the video on the left, "a" or "b"."""

    def side(self, name: str) -> str:
        return "left" if name == self.left else "right"

    @property
    def record(self) -> dict:
        return {
            "script": self.script.id,
            "prompts": list(self.script.texts),
            "starts": list(self.script.starts),
            "blocks": self.script.blocks,
            "seed": self.seed,
            "left": self.left,
        }


def claim(path: Path, key: dict) -> None:
    """Add to the study's key.

    Raises ValueError where it says otherwise already: the videos there are then another study's.
    """
    there = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if differ := [name for name in key if there.get(name, key[name]) != key[name]]:
        raise ValueError(
            f"{path.parent} holds another study: its key.json differs in {', '.join(differ)}; give another --out"
        )
    write_atomic(path, json.dumps(there | key, indent=1) + "\n")


def draw_pairs(scripts: Sequence[Script], seeds: Sequence[int], seed: int) -> list[Pair]:
    """Every script with every seed, in random order, sides in random balance."""
    both = [(script, s) for script in scripts for s in seeds]
    generator = stream(seed, "ab", "sides")
    order = torch.randperm(len(both), generator=generator).tolist()
    sides = torch.randperm(len(both), generator=generator)
    # whose is the one more where the number is odd
    first = int(torch.randint(2, (), generator=generator))
    left = ["ab"[(side + first) % 2] for side in sides.tolist()]
    return [Pair(both[i][0], both[i][1], name) for i, name in zip(order, left)]


def check_alike(a: Geometry, b: Geometry) -> None:
    """Check that the two sides look alike and share their noise.

    Raises ValueError where they could be told apart by size or length.
    """
    of_a, of_b = (
        {name: getattr(g, name) for name in ("block", "latent_height", "latent_width", "fps")}
        for g in (a, b)
    )
    if of_a != of_b:
        raise ValueError(
            f"A makes videos of {of_a}, B of {of_b}: such pairs are not blind, and share no noise; compare generators of one geometry"
        )
