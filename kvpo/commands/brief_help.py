"""Short help of a command that takes a recipe.

It has the command's own options, and says where the recipe's settings are explained, which would
fill fifteen screens.
"""

from __future__ import annotations

import shutil
import textwrap
from dataclasses import make_dataclass
from typing import Annotated, Any

import tyro

from kvpo.commands.setting_list import sections
from kvpo.config import RunConfig


def print_brief_help(name: str, default: Any) -> None:
    """Print the help of command ``name``; ``default`` is the command with its recipe."""
    command = type(default)
    hidden = ("settings", Annotated[RunConfig, tyro.conf.Suppress])
    brief = make_dataclass(command.__name__, [hidden], bases=(command,), frozen=True)
    brief.__doc__ = command.__doc__
    try:
        tyro.cli(
            brief,
            args=["--help"],
            prog=f"kvpo {name}",
            default=brief(default.recipe, default.settings),
        )
    except SystemExit:  # how the parser ends --help
        print(settings_help(name, default.recipe))


def settings_help(name: str, recipe: str) -> str:
    """One line for each section of the recipe's settings, and how to see all of them.

    Each setting is an option of the command too.
    """
    width = max(60, shutil.get_terminal_size().columns)
    about = {"--*": "What stands in no section: steps, seed, device, pipeline and others."}
    about |= {f"--{section}.*": sentence for section, sentence in sections().items()}
    column = max(map(len, about))
    return "\n".join(
        [
            "settings of the recipe, every one an option (--optimizer.lr 1e-4):",
            *(
                f"  {option:<{column}}  {textwrap.shorten(text, width - column - 4, placeholder=' ...')}"
                for option, text in about.items()
            ),
            f"kvpo config show {recipe} lists them with values and defaults, kvpo {name} --help-all explains them as options.",
        ]
    )
