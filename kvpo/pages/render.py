"""Pages from this folder's templates (Jinja2); styles and scripts are files beside them.

A page opens from a file without a network: style, script, pictures and videos are inside it.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup

FOLDER = Path(__file__).parent


def render(template: str, **values: object) -> str:
    """HTML of a template; values are escaped unless the template says that they are HTML.

    Raises jinja2.UndefinedError for a value that the template needs and is not given.
    """
    return _environment().get_template(template).render(values)


def anchor(title: str) -> str:
    """The name of a section within the page."""
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")


def source(name: str) -> Markup:
    """Text of a file of this folder, to stand in a page as it is."""
    from markupsafe import Markup

    return Markup((FOLDER / name).read_text(encoding="utf-8"))


@functools.cache
def _environment() -> Environment:
    """Imported late: whoever only counts a study's answers need not wait for it."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(FOLDER), autoescape=True, undefined=StrictUndefined
    )
    environment.globals.update(source=source, anchor=anchor)
    return environment
