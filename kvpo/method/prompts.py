"""Stage 1: scripts, and which of them each group of each step gets.

`kvpo.method.prompt_files` reads the lines of a prompt file; here they become scripts for videos of
a length.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from kvpo.common.rng import stream
from kvpo.common.wording import count_of
from kvpo.method.prompt_files import records
from kvpo.types import Script


class ScriptSource(Protocol):
    """Interface of a source of scripts: a prompt file, or stories without end.

    These are `PromptSet` and `kvpo.mini.source.StorySource`.
    """

    @property
    def scripts(self) -> tuple[Script, ...] | None:
        """All of them; None where they are stories without end, which are met one by one."""
        ...

    def script(self, step: int, index: int) -> Script:
        """The script of group ``index`` of a step, whichever rank asks."""
        ...

    def worth_forking(
        self, step: int, index: int, windows: Mapping[int, tuple[int, int]]
    ) -> list[int]:
        """Fork blocks at which a group's branches can differ, as far as the source knows.

        ``windows``: fork block -> pixel frames [first, stop) that a group explores from there.
        """
        ...


@dataclass(frozen=True)
class PromptSet:
    """Scripts in an endless shuffled order.

    Every epoch is a permutation, and the place in it follows from the step alone.
    """

    scripts: tuple[Script, ...]
    groups: int
    """Groups of one step, over all ranks."""
    seed: int

    def __post_init__(self):
        if not self.scripts:
            raise ValueError(
                "a prompt set needs at least one script; give it those of a prompt file"
            )
        if self.groups < 1:
            raise ValueError(
                f"groups = {self.groups}, but a step has at least one group; set 1 or more"
            )

    def script(self, step: int, index: int) -> Script:
        if step < 0 or not 0 <= index < self.groups:
            raise ValueError(
                f"group {index} of step {step} does not exist; give a step from 0 on and a group from 0 to {self.groups - 1}"
            )
        epoch, place = divmod(step * self.groups + index, len(self.scripts))
        order = torch.randperm(len(self.scripts), generator=stream(self.seed, "order", epoch))
        return self.scripts[int(order[place])]

    def worth_forking(
        self, step: int, index: int, windows: Mapping[int, tuple[int, int]]
    ) -> list[int]:
        """Return all of them: prompts do not say what a video shows when."""
        return list(windows)


def even_starts(segments: int, blocks: int) -> tuple[int, ...]:
    """First block of every segment; lengths differ by at most one block.

    Raises ValueError if there are more segments than blocks.
    """
    if not 1 <= segments <= blocks:
        raise ValueError(
            f"{segments} segments in a video of {count_of(blocks, 'block')}: every segment needs at least one block; lengthen the video or drop segments"
        )
    return tuple(i * blocks // segments for i in range(segments))


def starts_at(switches: Sequence[int], segments: int) -> tuple[int, ...]:
    """First block of every segment, from a list of switch blocks.

    A script of fewer segments uses the first switches. Raises ValueError if there are too few.
    """
    if len(switches) < segments - 1:
        raise ValueError(
            f"{segments} segments need {segments - 1} switch blocks, but switches = {list(switches)}; add switches, drop segments, or leave switches out"
        )
    return (0, *switches[: segments - 1])


def read_scripts(
    path: str | Path,
    blocks: int,
    *,
    switches: Sequence[int] | None = None,
    max_segments: int | None = None,
) -> tuple[Script, ...]:
    """Every script of a prompt file, for videos of ``blocks`` blocks.

    ``switches``: blocks at which the second, third, ... prompt takes over, for scripts without
    their own ``starts`` (the paper's latent frames 39, 75, 111 of 147 are blocks 13, 25, 37 of 49);
    None: `even_starts`. ``max_segments``: only the first prompts of every script are kept.
    ValueError naming file, line and column.
    """
    path = Path(path)
    if max_segments is not None and max_segments < 1:
        raise ValueError(
            f"max_segments = {max_segments} would leave scripts without a prompt; set 1 or more, or leave it out"
        )
    scripts: dict[str, Script] = {}
    for where, id, texts, starts in records(path):
        texts = texts[:max_segments]
        try:
            if starts is None:
                starts = (
                    even_starts(len(texts), blocks)
                    if switches is None
                    else starts_at(switches, len(texts))
                )
            script = Script(
                id or where.id, texts, starts[:max_segments], blocks, f"{path}, line {where.line}"
            )
        except ValueError as error:
            raise where.error(str(error)) from None
        if script.id in scripts:
            raise where.error(
                f"the id {script.id!r} is taken by an earlier line, and ids name the random streams; give every script its own"
            )
        scripts[script.id] = script
    if not scripts:
        raise ValueError(f"{path}: no prompts in it; write one prompt a line, N,[a],[b] or JSONL")
    return tuple(scripts.values())
