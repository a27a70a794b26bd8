"""The folder of cached files.  It imports nothing heavy, so `kvpo env` can name it at once."""

from __future__ import annotations

import os
from pathlib import Path

from kvpo.common.files import first_line


def cache_folder() -> Path:
    """Folder of cached files: $KVPO_CACHE, or ~/.cache/kvpo.

    Raises OSError where the user has no home, as in a container under a number that no list of
    users has.
    """
    if given := os.environ.get("KVPO_CACHE"):
        return Path(given)
    try:
        return Path.home() / ".cache" / "kvpo"
    except RuntimeError as error:
        raise OSError(
            f"there is no home folder ({first_line(error)}); set KVPO_CACHE to a folder for them"
        ) from None
