"""How the site shows the docstrings: examples as code, and of settings the fields alone.

A griffe extension, which mkdocs.yml names. It reads the sources; kvpo is not imported.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

EXAMPLE = re.compile(r"^>>> .*(?:\n(?!\n).+)*", flags=re.M)
"""From a prompt to the next blank line, what it prints included."""
LIBRARY = ("kvpo.api", "kvpo.types", "kvpo.rewards.base")
"""Where a class's methods are for users; elsewhere the site shows settings."""


class Docstrings(griffe.Extension):
    """Changes what was read, before it is shown."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Interpreter sessions become code, without doctest's marks."""
        if obj.docstring is not None:
            obj.docstring.value = fenced(obj.docstring.value)

    def on_class_members(self, *, cls: griffe.Class, **_: Any) -> None:
        """Of settings, what a recipe can set stays: annotated fields."""
        if not cls.path.startswith(LIBRARY):
            for name, member in list(cls.members.items()):
                if not is_field(member):
                    cls.del_member(name)


def is_field(member: griffe.Object | griffe.Alias) -> bool:
    """Whether it is a dataclass's field."""
    if not member.is_attribute or "property" in member.labels:
        return False
    return member.annotation is not None and "ClassVar" not in str(member.annotation)


def fenced(text: str) -> str:
    """The text with each session between code fences."""
    plain = re.sub(r" *# doctest: \+SKIP", "", text)
    return EXAMPLE.sub(lambda found: f"```pycon\n{found[0]}\n```", plain)
