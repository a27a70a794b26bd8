"""Defaults that commands and library share; importing them costs nothing."""

from __future__ import annotations

from pathlib import Path

OUT = Path("runs/align")
"""Folder of a run that is given none."""
SCRIPTS = 128
"""Scripts of an evaluation that is asked for; a run's own are fewer, and set by its recipe."""
