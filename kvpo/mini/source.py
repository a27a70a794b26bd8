"""Stories without end: the miniature's source of scripts (`kvpo.method.prompts.ScriptSource`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from kvpo.common.rng import stream
from kvpo.mini.stories import Story, chance, write_story
from kvpo.mini.world import FPS, pixel_frames
from kvpo.rewards.base import VideoBatch, to_uint8
from kvpo.rewards.clips import FRAMES
from kvpo.types import Script

MAX_SEGMENTS = 4
MEMORY_SEGMENTS = 3
"""A story of hide and seek shows, hides and brings back: it has at least three segments."""


@dataclass(frozen=True)
class StorySource:
    """Source of stories for training.

    Story ``index`` of step ``step`` is drawn from the stream of that name alone, whichever rank
    asks, so a run never sees one twice.
    """

    seed: int
    split: str = "train"
    """Names the streams: stories of another split are other stories."""
    blocks: int = 10
    memory: float = 0.25
    """Share of hide-and-seek stories, which only frames beyond the rolling window can resolve."""
    segments: int | None = None
    """Prompt segments of every story; None: drawn, 1 to 4."""
    open_forks: bool = False
    """Whether only windows that show the story's object are worth forking."""
    scripts: ClassVar[None] = None

    def __post_init__(self):
        most = MAX_SEGMENTS if self.segments is None else self.segments
        if not 1 <= most <= MAX_SEGMENTS:
            raise ValueError(
                f"segments = {self.segments}, but a story has 1 to {MAX_SEGMENTS}; set one of these, or None, which draws one"
            )
        if self.blocks < most:
            raise ValueError(
                f"blocks = {self.blocks} is too short for stories of up to {most} segments; lengthen the video or set segments"
            )
        if not 0.0 <= self.memory <= 1.0:
            raise ValueError(
                f"memory = {self.memory} must lie between 0 and 1: it is a share of all stories"
            )
        if self.memory > 0.0 and most < MEMORY_SEGMENTS:
            raise ValueError(
                f"segments = {self.segments} leaves no room for hide and seek, which takes {MEMORY_SEGMENTS}; set memory = 0 or more segments"
            )

    def story(self, step: int, index: int) -> Story:
        """The script with its truth."""
        if step < 0 or index < 0:
            raise ValueError(f"group {index} of step {step} does not exist; give both from 0 on")
        name = (self.split, step, index)
        memory = chance(self.memory, stream(self.seed, "memory", *name))
        return write_story(
            self.seed, *name, blocks=self.blocks, segments=self.segments, memory=memory
        )

    def script(self, step: int, index: int) -> Script:
        return self.story(step, index).script

    def worth_forking(
        self, step: int, index: int, windows: Mapping[int, tuple[int, int]]
    ) -> list[int]:
        """Fork blocks whose window shows the story's object, by its truth; where asked, else all."""
        if not self.open_forks:
            return list(windows)
        return [fork for fork, span in windows.items() if self.shows(step, index, *span)]

    def shows(self, step: int, index: int, first: int, stop: int) -> bool:
        """Whether a story shows any of its object in pixel frames [first, stop), by its truth."""
        return bool((self.story(step, index).truth().hidden[first:stop] < 1.0).any())


def story_clips(
    count: int, pillar: bool = False, seed: int = 7, frames: int = FRAMES
) -> list[VideoBatch]:
    """Make ``count`` true clips of the miniature's world, in batches of 8.

    They are the first ``frames`` of every prompt segment of stories that no training draws.
    """
    rows: list[tuple[torch.Tensor, str, tuple[str, ...]]] = []
    i = 0
    while len(rows) < count:
        story = write_story(seed, "rewards", i, blocks=12, memory=pillar)
        video = to_uint8(story.render())
        for k in range(len(story.scenes)):
            first, stop = (pixel_frames(3 * block) for block in story.script.span(k))
            if first + frames <= stop and story.scenes[0].pillar == pillar:
                rows.append(
                    (video[first : first + frames], story.script.texts[k], story.script.texts[:k])
                )
        i += 1
    rows = rows[:count]
    groups = [rows[j : j + 8] for j in range(0, count, 8)]
    return [
        VideoBatch(
            torch.stack([r[0] for r in g]), FPS, tuple(r[1] for r in g), tuple(r[2] for r in g)
        )
        for g in groups
    ]
