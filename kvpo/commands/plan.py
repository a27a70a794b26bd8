"""`kvpo plan`: memory, work and time of a recipe, before anything is loaded."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from kvpo.commands.options import Positional
from kvpo.commands.settings import Settings
from kvpo.common.files import write_atomic


@dataclass(frozen=True)
class Plan:
    """Memory, work and time of a recipe, computed from its own code.

    The code runs on tensors without memory; no weights are needed.
    """

    recipe: Positional[str]
    """A shipped recipe, a YAML file, or a run's folder, for its settings."""
    settings: Settings
    gpus: int = 1
    """Cards of a node; each takes its share of a step's groups.
    With branch_parallel it takes its share of a group's branches."""
    nodes: int = 1
    """Machines of so many cards."""
    card: Literal[
        "b300",
        "gb200",
        "b200",
        "gh200",
        "h200",
        "h100",
        "h100nvl",
        "h100pcie",
        "h20",
        "a100",
        "a100-40gb",
        "l40s",
        "rtxpro6000",
        "rtx6000ada",
        "rtx5090",
        "rtx4090",
        "rtx3090",
    ] = "h100"
    """Card that gives the time, and the memory unless that is given."""
    gpu_memory: float = 0.0
    """GB of one card, as sold; 0 = the card's."""
    price: float = 0.0
    """Euros an hour of one card; 0 = no price is said."""
    size: Literal["", "1.3b", "5b", "14b"] = ""
    """Plan as if the generator had this size; default: that of the recipe's pipeline folder.
    5b is Wan2.2's, with its VAE."""
    out: Path | None = None
    """File to write everything to as JSON; default: none."""

    def __call__(self) -> None:
        from kvpo.planning.missing import missing, numbered
        from kvpo.planning.plan import planned

        absent = missing(self.settings, download=False)
        try:
            lines, content = planned(
                self.recipe,
                self.settings,
                self.gpus,
                self.nodes,
                self.card,
                self.gpu_memory,
                self.size,
                self.price,
            )
        except FileNotFoundError:  # no size to plan with: said with all else that is missing
            print("\n".join(["before `kvpo plan` and `kvpo align` can start:", *numbered(absent)]))
            raise
        print("\n".join(lines))
        if absent:
            print("\n".join(["", "before `kvpo align` can start:", *numbered(absent)]))
        if self.out is not None:
            write_atomic(self.out, json.dumps(content, indent=1) + "\n")
