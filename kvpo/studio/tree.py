"""The tree of a story's choices: what was asked, block by block, and how to make it again.

A tree holds no picture. Its nodes are stretches of one video: the first begins at block 0, every
other one leaves its parent at a block, by a chosen branch or by another prompt. Seed, prompts and
choices determine every frame, so a tree is replayed, and the digest of each block says whether the
replay is the same bit for bit.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from kvpo.common.access import check_readable
from kvpo.common.files import write_atomic
from kvpo.generators.sampler import SAMPLERS
from kvpo.method.explorers import Explorer, StartNoise
from kvpo.method.prompt_files import readable
from kvpo.method.routing import KVRouting

EXPLORERS: Mapping[str, type] = {"kv_routing": KVRouting, "start_noise": StartNoise}
"""Explorers by the names that recipes give them."""
MOST_BRANCHES = 16
FORMAT = 1
LARGEST = 16 * 2**20
"""Bytes of a story's file beyond which it is not read."""


class NoTree(Exception):
    """A part of a file that is no tree; the reader's error names the file and the way out."""


@dataclass(frozen=True)
class Fork:
    """Request for the branches of one block."""

    block: int
    by: str
    """Name of the explorer."""
    settings: Mapping[str, Any]
    """Settings of the explorer that differ from its defaults."""
    branches: int
    """G, beside the anchor."""
    draw: int = 0
    """Number of the draw: another one gives other branches of the same block."""

    def explorer(self) -> Explorer:
        """Make the explorer.  ValueError for a name or setting that does not exist."""
        if not isinstance(self.by, str) or self.by not in EXPLORERS:
            raise ValueError(
                f"there is no explorer {self.by!r}; choose one of {', '.join(EXPLORERS)}"
            )
        known = [f.name for f in fields(EXPLORERS[self.by])]
        if unknown := sorted(set(self.settings) - set(known)):
            raise ValueError(f"{self.by} has no settings {unknown}; use {', '.join(known)}")
        if type(self.branches) is not int or not 2 <= self.branches <= MOST_BRANCHES:
            raise ValueError(
                f"{self.branches!r} branches: a group compares 2 to {MOST_BRANCHES} of them; give a number between"
            )
        if type(self.draw) is not int or not 0 <= self.draw < 2**31:
            raise ValueError(f"draw = {self.draw!r} must be a whole number, 0 or more, below 2**31")
        return EXPLORERS[self.by](**self.settings)

    @property
    def stop(self) -> int:
        """First block after the explored ones."""
        return self.block + self.explorer().window_blocks


@dataclass
class Node:
    """Stretch of a story: how it leaves its parent, its prompts, and what has been made of it."""

    parent: int | None
    first: int
    """Block at which it leaves the parent."""
    fork: Fork | None = None
    chosen: int = 0
    """Row of the fork's group that was chosen; G is the anchor."""
    prompts: dict[int, str] = field(default_factory=dict)
    """Block -> prompt that takes over there."""
    digests: list[str] = field(default_factory=list)
    """Digest of the pixels of each block, from ``first`` on."""

    @property
    def stop(self) -> int:
        return self.first + len(self.digests)


@dataclass
class Tree:
    """A story with all of its choices, the taken ones and those that were undone."""

    name: str
    generator: str
    sampler: str
    seed: int
    nodes: list[Node]
    at: int = 0
    """Node that is being told."""

    def path(self, node: int) -> list[int]:
        """Nodes from the first one to ``node``."""
        found = [node]
        while (parent := self.nodes[found[0]].parent) is not None:
            found.insert(0, parent)
        return found

    def prompts(self, node: int) -> dict[int, str]:
        """Prompts that hold on the way to a node and in it, by their first block, ascending."""
        held: dict[int, str] = {}
        for number in self.path(node):
            own = self.nodes[number]
            held = {block: text for block, text in held.items() if block <= own.first}
            held |= own.prompts
        return dict(sorted(held.items()))

    def leave(self, node: Node) -> int:
        """Add a node, and be in it.  Returns its number."""
        self.nodes.append(node)
        self.at = len(self.nodes) - 1
        return self.at

    def write(self, path: Path) -> Path:
        """Write the tree as JSON; an older file stays until the new one is whole."""
        return write_atomic(path, json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n")

    @classmethod
    def read(cls, path: Path) -> Tree:
        """Read a tree.  ValueError that names the file where it is none."""
        check_readable(path)
        if path.stat().st_size > LARGEST:
            raise ValueError(f"{path} is larger than any story ({LARGEST} bytes); open another one")
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            if found.pop("format") != FORMAT:
                raise NoTree(f"format {FORMAT} is needed")
            nodes = [_node(node) for node in found.pop("nodes")]
            tree = cls(nodes=nodes, **found)
            tree.check()
        except (NoTree, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ValueError(
                f"{path} is no story of the studio ({error}); open another one"
            ) from None
        return tree

    def check(self) -> None:
        """Check that nodes, blocks and prompts belong together.  NoTree where they do not."""
        names = (self.name, self.generator, self.sampler)
        if not self.nodes or not all(isinstance(name, str) for name in names):
            raise NoTree("a story has a name, a generator, a sampler and a node")
        if (
            type(self.seed) is not int
            or type(self.at) is not int
            or self.at not in range(len(self.nodes))
        ):
            raise NoTree(f"seed {self.seed!r} and node {self.at!r} must be whole numbers in range")
        if self.sampler not in SAMPLERS:
            raise NoTree(f"there is no sampler {self.sampler!r}")
        for number, node in enumerate(self.nodes):
            self._check_node(number, node)

    def _check_node(self, number: int, node: Node) -> None:
        root = number == 0
        if type(node.first) is not int or (node.parent is None) != root:
            raise NoTree(f"node {number} must leave another one at a block")
        parent = None
        if node.parent is not None:
            if type(node.parent) is not int or not 0 <= node.parent < number:
                raise NoTree(f"node {number} has no parent before it")
            parent = self.nodes[node.parent]
        least = 0 if parent is None else parent.first
        if node.first < least or (root and (node.first or 0 not in node.prompts)):
            raise NoTree(f"node {number} begins before its parent, or without a prompt")
        if parent is not None and node.first > parent.stop:
            raise NoTree(f"node {number} begins behind its parent's end")
        if any(type(block) is not int or block < node.first for block in node.prompts):
            raise NoTree(f"node {number} has a prompt before its first block")
        if type(node.digests) is not list or any(type(d) is not str for d in node.digests):
            raise NoTree(f"node {number} has digests that are not text")
        for text in node.prompts.values():
            readable(text)
        if node.fork is not None:
            node.fork.explorer()
            if node.stop < node.fork.stop:
                raise NoTree(f"node {number} lacks digests of the branch that was chosen")
            if node.fork.block != node.first or node.chosen not in range(node.fork.branches + 1):
                raise NoTree(f"node {number} chose row {node.chosen!r} of a fork that it has not")


def new_tree(name: str, generator: str, sampler: str, seed: int, prompt: str) -> Tree:
    """Begin a story by its first prompt."""
    if type(seed) is not int or not 0 <= seed < 2**53:
        raise ValueError(f"seed {seed!r} must be a whole number, 0 or more, below 2**53")
    return Tree(name, generator, sampler, seed, [Node(None, 0, prompts={0: readable(prompt)})])


def _node(found: dict[str, Any]) -> Node:
    fork = found.pop("fork")
    prompts = {int(block): text for block, text in found.pop("prompts").items()}
    return Node(fork=fork and Fork(**fork), prompts=prompts, **found)
