"""Command lines of the long work that the studio starts, as lists of arguments for no shell."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

PAIRS = 16
"""Pairs of videos of a blind comparison, each of another story."""


@dataclass(frozen=True)
class Programs:
    """The commands of this package as the studio calls them; folders are absolute."""

    program: tuple[str, ...] = (sys.executable, "-m", "kvpo")

    def fit(self, folder: Path, out: Path) -> list[str]:
        """Fit a preference to the answers of a studio's folder."""
        return [*self.program, "preference", "fit", str(folder), "--out", str(out)]

    def align(self, recipe: Path, out: Path) -> list[str]:
        """Begin a run."""
        return [*self.program, "align", str(recipe), "--out", str(out)]

    def resume(self, run: Path) -> list[str]:
        """Go on with a run by its own settings."""
        return [*self.program, "align", str(run), "--out", str(run), "--resume"]

    def compare(self, run: Path, seed: int, out: Path) -> list[str]:
        """Make videos of a run's trained weights (A) and of its start (B) for the same noise."""
        asked = ["--recipe", str(run), "--scripts", str(PAIRS), "--seeds", str(seed), "--apart"]
        return [*self.program, "ab", str(run), f"{run}:start", *asked, "--out", str(out)]
