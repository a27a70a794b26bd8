"""A module that is imported where it is first used.

torch takes seconds. Help, the settings of a recipe and a refused one need the files that define
settings, but nothing that is computed in them; those files take torch from here.
"""

from __future__ import annotations

import importlib
from typing import Any


class Late:
    """Stands for the module ``name``; its first attribute imports it."""

    def __init__(self, name: str):
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(importlib.import_module(self._name), attribute)
