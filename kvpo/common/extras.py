"""Packages that only some features need, by pyproject.toml's extras.

They are looked for where a feature is asked for, before anything is computed, and imported where
it is used.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence


def require_extra(feature: str, extra: str, modules: Sequence[str]) -> None:
    """Check that the modules of an extra can be imported; nothing is imported for it.

    Raises ValueError that names the feature, what is missing, and the command that installs it.
    """
    if missing := missing_modules(modules):
        raise ValueError(f"{feature} needs {', '.join(missing)}: pip install 'kvpo[{extra}]'")


def missing_modules(modules: Sequence[str]) -> list[str]:
    """Names among ``modules`` that can not be imported."""
    return [name for name in modules if importlib.util.find_spec(name.partition(".")[0]) is None]
