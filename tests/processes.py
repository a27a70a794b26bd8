"""Processes that tests start: what these import is what the tests import."""

from __future__ import annotations

import os
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def environment() -> dict[str, str]:
    """This process's, with pytest's own `pythonpath` of pyproject.toml, and one thread each.

    Three test files once had such a path each; when the tests moved into folders, two were mended
    and the third failed.
    """
    options = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"][
        "pytest"
    ]["ini_options"]
    folders = os.pathsep.join(str(ROOT / folder) for folder in options["pythonpath"])
    return os.environ | {"PYTHONPATH": folders, "OMP_NUM_THREADS": "1"}
