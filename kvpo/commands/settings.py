"""The option group of a recipe's settings.

It is apart from the other options, because its type needs the whole package.
"""

from __future__ import annotations

from typing import Annotated

import tyro

from kvpo.config import RunConfig

Settings = Annotated[RunConfig, tyro.conf.arg(name="")]
