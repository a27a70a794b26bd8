"""`kvpo prompts`: a public prompt set written as a prompt file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from kvpo.commands.options import Positional
from kvpo.evaluation.prompt_sets import SETS, write_set


@dataclass(frozen=True)
class Prompts:
    """Write a public prompt set as a prompt file; without a name, list the sets."""

    name: Positional[str] = ""
    """vbench, moviegen, interactive or ta_hard."""
    source: str = ""
    """The set's own file, downloaded, or an address of it; default: its authors' repository."""
    out: Path = Path("runs/prompts")
    """Folder to write to."""

    def __call__(self) -> None:
        if not self.name:
            print(
                "\n".join(
                    f"{name:<12} {s.what}; {s.licence}; {s.source}" for name, s in SETS.items()
                )
            )
            return
        if self.name not in SETS:
            raise ValueError(
                f"there is no prompt set {self.name!r}; choose one of {', '.join(SETS)}"
            )
        print(f"written to {write_set(self.name, self.source, self.out)}")
