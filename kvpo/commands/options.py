"""What the commands' options have in common."""

from __future__ import annotations

from typing import Annotated

import tyro

from kvpo.config import RunConfig

Positional = tyro.conf.Positional
Settings = Annotated[RunConfig, tyro.conf.arg(name="")]
