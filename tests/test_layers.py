"""Imports point one way: a folder of the package imports only from itself and from those above it
in this list.

A newcomer can then read the package from the top of the list, and importing a leaf never drags in
Wan or a reward model.
"""

from __future__ import annotations

import ast
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "kvpo"
ROOMS = [
    "types",
    "common",
    "distributed",
    "generators",
    "rewards",
    "policy",
    "pages",
    "mini",
    "method",
    "evaluation",
    "preference",
    "report",
    "config",
    "runs",
    "train",
    "convert",
    "doctor",
    "planning",
    "bench",
    "api",
    "studio",
    "commands",
    "__main__",
    "__init__",
]
"""Folders, and files beside them, in the order of the README's tree; last what names the public
names of all of them."""


def imported(tree: ast.AST) -> set[str]:
    """Rooms that a file imports from, wherever in the file; imports are absolute."""
    nodes = list(ast.walk(tree))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [
        f"{node.module}.{alias.name}"
        for node in nodes
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    ]
    return {name.split(".")[1] for name in names if name.startswith("kvpo.")}


def upward(root: Path) -> list[str]:
    """Files that import from a room below their own, and the room."""
    found = []
    for path in sorted(root.rglob("*.py")):
        room = path.relative_to(root).parts[0].removesuffix(".py")
        rooms = ROOMS[: ROOMS.index(room) + 1]
        found += [
            f"{path.relative_to(root)} imports {name}"
            for name in sorted(imported(ast.parse(path.read_text(encoding="utf-8"))))
            if name not in rooms
        ]
    return found


def test_a_folder_imports_only_from_those_above():
    assert not upward(PACKAGE)


def test_an_import_upward_is_seen(tmp_path):
    (tmp_path / "method").mkdir()
    (tmp_path / "method" / "new.py").write_text(
        "from kvpo.types import Script\n\ndef late():\n    from kvpo import train\n    import kvpo.rewards.base"
    )
    assert upward(tmp_path) == ["method/new.py imports train"]
