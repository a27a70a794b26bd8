"""The option group that a recipe's settings are."""

from __future__ import annotations

from typing import Annotated

import tyro

from kvpo.config import RunConfig

Settings = Annotated[RunConfig, tyro.conf.arg(name="")]
