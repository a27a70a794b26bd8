"""`kvpo doctor`: the method's invariants on a generator and a recipe."""

from __future__ import annotations

from dataclasses import dataclass

from kvpo.commands.options import Positional
from kvpo.commands.settings import Settings


@dataclass(frozen=True)
class Doctor:
    """Check the method's invariants on a generator and a recipe, each with its measured number."""

    recipe: Positional[str]
    """A shipped recipe, a YAML file, or a run's folder, for its settings."""
    settings: Settings

    def __call__(self) -> None:
        from kvpo.doctor.doctor import examine
        from kvpo.planning.missing import refuse_missing

        refuse_missing(self.settings)
        if not examine(self.settings):
            raise ValueError("some invariants do not hold; see the lines marked FAILED above")
