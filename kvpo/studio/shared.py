"""The things that the tabs of one server share: the generator, its folder, and the turns at it."""

from __future__ import annotations

from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch

from kvpo.generators.pipeline import Pipeline
from kvpo.studio.judging import Judging
from kvpo.studio.library import Library
from kvpo.studio.live import Live
from kvpo.studio.tree import EXPLORERS, MOST_BRANCHES, Tree
from kvpo.studio.turns import Turns

AHEAD = 2
"""Blocks on their way to a tab that it has not yet begun to show."""


@dataclass
class Studio:
    """Everything that the tabs of one server share."""

    pipeline: Pipeline
    label: str
    library: Library
    worker: Executor
    """One thread, in which all generation happens."""
    blocks: int
    cache_frames: int
    budget: int
    sampler: str = "renoise"
    branches: int = 8
    judging: Judging | None = None
    """Rewards that are shown beside the branches of a fork; None shows none."""
    turns: Turns = field(default_factory=Turns)
    tabs: int = 0
    told: dict[object, str] = field(default_factory=dict)
    """Tabs that are there -> names of the stories that they tell."""

    def live(self, tree: Tree, budget: int | None = None) -> Live:
        kept = self.budget if budget is None else budget
        return Live(self.pipeline, tree, self.blocks, self.cache_frames, kept)

    def tells(self, tab: object, name: str) -> None:
        """Note that a tab tells a story, which is its own from now on."""
        self.told[tab] = name

    def is_told(self, tab: object, name: str) -> bool:
        """Whether another tab tells a story now."""
        return any(told == name for other, told in self.told.items() if other is not tab)

    def closed_tab(self) -> None:
        self.tabs -= 1

    def hello(self) -> dict[str, Any]:
        """Describe the generator and what may be asked of it."""
        g = self.pipeline.geometry
        return {
            "is": "hello",
            "generator": self.label,
            "fps": g.fps,
            "block": g.block,
            "blocks": self.blocks,
            "ahead": AHEAD,
            "explorers": {name: kind().window_blocks for name, kind in EXPLORERS.items()},
            "branches": self.branches,
            "most_branches": MOST_BRANCHES,
            "stories": self.library.stories(),
        }


def new_worker(threads: int) -> ThreadPoolExecutor:
    """Make the one thread in which all generation happens; torch uses ``threads`` there, 0 = its own choice.

    A block is thousands of small operations. With a thread a core, each of them waits for the
    slowest thread, and where another program runs on that core, for the turn that it has to end:
    a block then takes many times as long as in one thread. One thread has nobody to wait for, and
    the number of threads is the same at every start, which a replay bit for bit needs.
    """
    if threads:
        torch.set_num_threads(threads)  # what is loaded before the worker begins
        return ThreadPoolExecutor(1, "generator", torch.set_num_threads, (threads,))
    return ThreadPoolExecutor(1, "generator")
