"""Files that installed packages bring along: where the weights of the extra ``offline`` lie."""

from __future__ import annotations

import importlib.util
from pathlib import Path


def packaged(module: str, inside: str) -> Path:
    """Find a file or folder of an installed package, which is not imported for it.

    Raises ValueError where there is none.
    """
    found = importlib.util.find_spec(module)
    folders = found.submodule_search_locations if found else None
    path = Path(folders[0], inside) if folders else None
    if path is None or not path.exists():
        raise ValueError(
            f"package {module!r} has no {inside!r}; install the version that kvpo names: pip install 'kvpo[offline]'"
        )
    return path
