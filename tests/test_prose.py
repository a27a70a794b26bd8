"""Every docstring of the package and of the benchmarks begins with a line that stands alone.

A first line is all that an editor, an index or `--help` may show. Two hundred and fifty of them once
were fragments, such as "Of its text; of one that says nothing, its name."
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = [*sorted((ROOT / "kvpo").rglob("*.py")), *sorted((ROOT / "benchmarks").rglob("*.py"))]
FRAGMENT = re.compile(
    r"(Of|And|But|Or|So|Those|What|Which|Who|Whose|Whom|Where|How|With|Until|From|Its|Their|Also"
    r"|Likewise|Same|As (the|in|if|a|an|far|their|its)|The same[.,:;]|The same (as|for|of|in|with|block)"
    r"|[A-Z]\w+Error)(?!\w)"
)
"""Beginnings of a line that only makes sense after another one, and errors without a verb."""
WAY_OUT = "begin with a sentence, or a noun phrase that stands alone, and put the rest below it"


def docstrings(tree: ast.AST) -> Iterator[ast.Constant]:
    """Every string that stands as a statement: of a function, a class, a field, a constant."""
    for node in ast.walk(tree):
        value = node.value if isinstance(node, ast.Expr) else None
        if isinstance(value, ast.Constant) and isinstance(value.value, str):
            yield value


def fault(text: str) -> str:
    """Fault of a docstring's first line; "" if it stands alone."""
    first, _, rest = text.strip().partition("\n")
    if begin := FRAGMENT.match(first):
        return f"begins with {begin[0]!r}"
    runs_on = rest.split("\n")[0].strip() and first.rstrip()[-1:] not in (".", ":", "?", "!")
    return "has a first sentence that runs over two lines" if runs_on else ""


def test_first_lines_stand_alone():
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno} {reason}: {node.value.strip().splitlines()[0]!r}"
        for path in FILES
        for node in docstrings(ast.parse(path.read_text(encoding="utf-8")))
        if (reason := fault(node.value))
    ]
    assert not found, "\n".join([f"{len(found)} docstrings; {WAY_OUT}:", *found])


@pytest.mark.parametrize(
    "text",
    [
        "Of its text; of one that says nothing, its name.",
        "As the reward it stands for.",
        "The same, loaded.",
        "ValueError if something is there.",
        "A folder to fill, which becomes ``path`` when that went well; nothing of it\nis left.",
    ],
)
def test_fragments_are_refused(text):
    assert fault(text)


@pytest.mark.parametrize(
    "text",
    [
        "First line of the message, or the class name if it is empty.",
        "The same ranks on a separate CPU process group, for another thread.",
        "Assemble the page.\n\nIt opens offline.",
        "Precision of the moments.\nWhat is trained is float32 in any case.",
        "Error for a part of the run that cannot be shown.",
    ],
)
def test_lines_that_stand_alone_pass(text):
    assert not fault(text)
