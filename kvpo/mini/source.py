"""Stories without end: the miniature's source of scripts (`kvpo.prompts.ScriptSource`)."""

from __future__ import annotations

from dataclasses import dataclass

from kvpo.mini.stories import Story, chance, write_story
from kvpo.rng import stream
from kvpo.types import Script

MAX_SEGMENTS = 4
MEMORY_SEGMENTS = 3
"""A story of hide and seek shows, hides and brings back: it has at least three segments."""


@dataclass(frozen=True)
class StorySource:
    """Story ``index`` of step ``step`` is drawn from the stream of that name alone, whichever rank asks, so a run never sees one twice."""

    seed: int
    split: str = "train"
    """Names the streams: stories of another split are other stories."""
    blocks: int = 10
    memory: float = 0.25
    """Share of hide-and-seek stories, which only frames beyond the rolling window can resolve."""
    segments: int | None = None
    """Prompt segments of every story; None: drawn, 1 to 4."""

    def __post_init__(self):
        most = MAX_SEGMENTS if self.segments is None else self.segments
        if not 1 <= most <= MAX_SEGMENTS:
            raise ValueError(f"segments = {self.segments}, but a story has 1 to {MAX_SEGMENTS}; None draws one of them")
        if self.blocks < most:
            raise ValueError(f"blocks = {self.blocks} is too short for stories of up to {most} segments; lengthen the video or set segments")
        if not 0.0 <= self.memory <= 1.0:
            raise ValueError(f"memory = {self.memory} is a share of all stories, from 0 to 1")
        if self.memory > 0.0 and most < MEMORY_SEGMENTS:
            raise ValueError(f"segments = {self.segments} leaves no room for hide and seek, which takes {MEMORY_SEGMENTS}; set memory = 0 or more segments")

    def story(self, step: int, index: int) -> Story:
        """The script with its truth."""
        if step < 0 or index < 0:
            raise ValueError(f"group {index} of step {step} does not exist; both count from 0")
        name = (self.split, step, index)
        memory = chance(self.memory, stream(self.seed, "memory", *name))
        return write_story(self.seed, *name, blocks=self.blocks, segments=self.segments, memory=memory)

    def script(self, step: int, index: int) -> Script:
        return self.story(step, index).script
