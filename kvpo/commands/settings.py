"""The option group of a recipe's settings.

It is apart from the other options, because its type needs the whole package.
"""

from __future__ import annotations

from typing import Annotated

import tyro

from kvpo.config import RunConfig

# an objective is chosen by its kind, which `main` reads first; its own settings are then options
Settings = Annotated[RunConfig, tyro.conf.arg(name=""), tyro.conf.AvoidSubcommands]
