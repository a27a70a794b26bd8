"""`kvpo reward-env`: environments for rewards that need other packages."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from kvpo.commands.options import Positional
from kvpo.rewards.isolated.environments import create, default_folder, table


@dataclass(frozen=True)
class RewardEnv:
    """Make an environment for a reward that needs other packages than kvpo, or list them."""

    action: Positional[Literal["create", "list"]]
    name: Positional[str] = ""
    """A shipped environment, or a requirements file."""
    python: str = sys.executable
    """The Python that it is for; with uv also a version, 3.10."""
    folder: Path | None = None
    """Folder of the environments; default: KVPO_ENVS, or the user's cache."""

    def __call__(self) -> None:
        folder = self.folder or default_folder()
        if self.action == "list":
            print("\n".join(table(folder)))
        else:
            made = create(self.name, folder, self.python)
            print(f"{made.name}: {made}")
