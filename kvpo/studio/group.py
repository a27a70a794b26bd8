"""The branches of one block and their anchor, made in step."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch

from kvpo.common.rng import stream
from kvpo.generators.cache import frame_lists
from kvpo.generators.history import Routed
from kvpo.generators.sampler import StackedNoise
from kvpo.method.branches import PlannedNoise, branch_out
from kvpo.studio.made import Made
from kvpo.studio.state import State, cut_out
from kvpo.studio.tree import Fork
from kvpo.types import BranchPlan, Script, Window

if TYPE_CHECKING:
    from kvpo.studio.live import Live


class Group:
    """Branches of one block and their anchor, made in step."""

    def __init__(self, live: Live, fork: Fork):
        explorer, pipeline = fork.explorer(), live.pipeline
        self.fork, self.live = fork, live
        self.window = Window(fork.block, explorer.window_blocks)
        prefix = live.here.copied()
        # Later prompts of the story that is left do not hold here: a replay would not know them.
        held = {b: t for b, t in live.tree.prompts(live.tree.at).items() if b <= fork.block}
        prefix.stream.scripts = [Script("story", tuple(held.values()), tuple(held), live.blocks)]
        prefix.stream.switch()
        draws = stream(live.tree.seed, "studio", "plan", fork.block, fork.draw)
        resident = prefix.stream.cache.resident
        g = pipeline.geometry
        plans = explorer.plan(self.window, g, fork.branches, draws, resident)
        self.plans = (*plans, BranchPlan())
        noise = PlannedNoise(live.noise, self.plans, self.window, fork.draw * fork.branches)
        self.history = Routed(g.history, self.plans, self.window, g.block)
        self.stream = branch_out(pipeline, prefix.stream, self.plans, noise, self.window)
        self.decoder = prefix.decoder.fork(len(self.plans))
        self.pixels: list[torch.Tensor] = []
        """Frames of each explored block so far, uint8 [G + 1, T, 3, H, W]."""

    @property
    def complete(self) -> bool:
        return len(self.pixels) == self.window.blocks

    def reads(self) -> list[list[list[int]]]:
        """Past frames that each row reads at each explored block; slots of a bank are left out."""
        g = self.live.pipeline.geometry
        found = []
        for block in range(self.window.fork, self.window.stop):
            past = self.history.past(block * g.block, g.block)
            lists = frame_lists(past)
            rows = lists if len(lists) > 1 else lists * len(self.plans)
            found.append([[frame for frame in row if frame >= 0] for row in rows])
        return [list(row) for row in zip(*found)]

    @torch.no_grad()
    def advance(self) -> Made:
        """Make the next explored block of every row."""
        started, block = time.perf_counter(), len(self.stream.blocks)
        pixels = self.decoder(self.stream.advance(self.history)).cpu()
        self.pixels.append(pixels)
        return Made(self.live.tree.at, block, pixels, time.perf_counter() - started)

    def chosen(self, row: int, script: Script) -> State:
        """Cut out the state of one row after the explored blocks."""
        noise, capacity = StackedNoise((self.live.noise,)), self.live.capacity
        state = cut_out(self.stream, self.decoder, row, capacity, script, noise)
        state.stream.forget()
        return state
