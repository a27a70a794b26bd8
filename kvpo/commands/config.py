"""`kvpo config`: a recipe's settings, each with its default and a line of what it is."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from kvpo.commands.options import Positional
from kvpo.commands.setting_list import Setting, settings_of, unused_sections
from kvpo.config import load_config, recipe_path

HEAD = ("setting", "value", "default", "what it is")


@dataclass(frozen=True)
class Config:
    """Show a recipe's settings.

    Each has its value, its default where that is another one, and a line that says what it is.
    """

    action: Positional[Literal["show"]]
    recipe: Positional[str]
    """A shipped recipe (mini) or a YAML file."""
    all: bool = False
    """Show also the sections of explorers and energies that the recipe does not choose."""

    def __call__(self) -> None:
        config = load_config(recipe_path(self.recipe))
        unused = [] if self.all else unused_sections(config)
        settings = settings_of(config, unused)
        if sys.stdout.isatty():
            _print_table(settings)
        else:
            print("\n".join(plain(settings)))
        if unused:
            print(f"not used by this recipe: {', '.join(unused)}; --all shows them too")


def plain(settings: Sequence[Setting]) -> list[str]:
    """A line a setting, whatever its length, for grep and for files."""
    rows = [HEAD, *map(_cells, settings)]
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ["  ".join(c.ljust(w) for c, w in zip(row, widths)).rstrip() for row in rows]


def _cells(setting: Setting) -> tuple[str, str, str, str]:
    return setting.name, setting.value, setting.default, setting.about


def _print_table(settings: Sequence[Setting]) -> None:
    """For a person at a terminal; what differs from its default stands out."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*HEAD, box=box.SIMPLE_HEAD)
    table.columns[0].overflow = "fold"
    for setting in settings:
        style = "bold" if setting.default else ""
        table.add_row(*(Text(cell, style=style) for cell in _cells(setting)))
    Console().print(table)
