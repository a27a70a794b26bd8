"""Options that several commands have.

This module imports nothing heavy: every command's help waits for it.
"""

from __future__ import annotations

import tyro

Positional = tyro.conf.Positional
