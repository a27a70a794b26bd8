"""The public code's planning: chunks, forks and routed frames, clips, prompt switches.

Kept only so that its published numbers can be reproduced. It generates a video in chunks of several
blocks and keeps a fork's window inside one chunk; ours has neither chunks nor that limit.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from kvpo.method.routing import Frames, dispersed

# --- Where branches fork, and what they read ---


@dataclass(frozen=True)
class Chunk:
    index: int
    start: int
    """First latent frame."""
    frames: int


def chunk_layout(total: int, first: int = 21, following: int = 18) -> list[Chunk]:
    """Chunks of a video of ``total`` latent frames; the last is cut short at its end."""
    starts = [0, *range(first, total, following)]
    return [
        Chunk(i, start, min(following if i else first, total - start))
        for i, start in enumerate(starts)
    ]


@dataclass(frozen=True)
class Backend:
    """What a branch reads, in frames; LongLive names absolute frames, MemFlow slots of its
    cache."""

    name: Literal["longlive", "memflow"]
    window: int
    capacity: int
    nearest: int
    """Newest frames that are always read, the current block included."""
    block: int = 3
    sink: int = 3

    @property
    def routed(self) -> int:
        """n, frames drawn per branch.  MemFlow does not keep the sink."""
        return self.window - self.nearest - (self.sink if self.name == "longlive" else 0)

    def pool(self, fork: int, window_blocks: int) -> range:
        """LongLive: frames that stay resident until the window's last block; MemFlow: slots
        filled at the fork."""
        if self.name == "memflow":
            return range(0, min(fork, self.capacity) - self.nearest)
        last_block = fork + (window_blocks - 1) * self.block
        return range(max(self.sink, last_block - (self.capacity - self.sink)), fork - self.nearest)


@dataclass(frozen=True)
class Fork:
    frame: int
    chunk: int
    block_in_chunk: int
    pool: range


def eligible_forks(backend: Backend, chunks: Sequence[Chunk], window_blocks: int) -> list[Fork]:
    """Blocks with a full window of history, a large enough pool, and their P blocks inside one
    of ``chunks``."""
    forks = []
    for chunk in chunks:
        for b in range(chunk.frames // backend.block - window_blocks + 1):
            frame = chunk.start + b * backend.block
            pool = backend.pool(frame, window_blocks)
            if frame >= backend.window and len(pool) >= backend.routed:
                forks.append(Fork(frame, chunk.index, b, pool))
    return forks


@dataclass(frozen=True)
class Seeds:
    """Which rollout is planned: everything in a plan follows from these three."""

    base: int
    sample: int
    context: int = 0

    def generator(self, extra: int = 0) -> torch.Generator:
        return torch.Generator().manual_seed(self.base + 97 * self.sample + self.context + extra)

    def branch(self, branch: int, num_branches: int) -> int:
        return self.base + self.sample * num_branches + self.context + branch


def selected_frames(pool: Sequence[int], n: int, num_branches: int, seeds: Seeds) -> list[Frames]:
    return dispersed(pool, n, num_branches, seeds.generator(1))


@dataclass(frozen=True)
class Plan:
    fork: Fork
    eligible: int
    """Forks it was chosen from."""
    branches: list[Frames]


def plan(
    backend: Backend,
    chunks: Sequence[Chunk],
    window_blocks: int,
    num_branches: int,
    seeds: Seeds,
    chunk: int | None = None,
    block_in_chunk: int | None = None,
) -> Plan:
    """A fork drawn uniformly (in that ``chunk``, at that ``block_in_chunk``, where given) and
    its branches' frames."""
    forks = [
        f
        for f in eligible_forks(backend, chunks, window_blocks)
        if chunk in (None, f.chunk) and block_in_chunk in (None, f.block_in_chunk)
    ]
    if not forks:
        raise ValueError(
            f"no fork for {window_blocks} blocks in {len(chunks)} chunks (chunk {chunk}, block in it {block_in_chunk}; None = any): it needs {backend.window} frames "
            f"of history, {backend.routed} in the pool and its window inside one chunk; shorten the window or allow more chunks"
        )
    fork = forks[int(torch.randint(len(forks), (1,), generator=seeds.generator()))]
    return Plan(fork, len(forks), selected_frames(fork.pool, backend.routed, num_branches, seeds))


def backward_chunks(num_branches: int, size: int) -> list[list[int]]:
    """Branches that are back-propagated together; size 0 = all."""
    size = size if size > 0 else num_branches
    return [
        list(range(first, min(first + size, num_branches)))
        for first in range(0, num_branches, size)
    ]


# --- Clips and prompt switches ---


def latent_to_pixel_frame(latent: int, stride: int = 4) -> int:
    """First pixel frame of a latent frame: latent 0 holds one pixel frame, every other
    ``stride``."""
    return max(0, (latent - 1) * stride + 1)


def clip_window(center: int, total: int, length: int) -> tuple[int, int]:
    """Pixel frames [start, stop) of a clip around ``center``, pushed inside [0, total) and cut
    to it."""
    start = max(0, min(center - length // 2, total - length))
    return start, min(start + length, total)


@dataclass(frozen=True)
class Clip:
    start: int
    stop: int
    segment: int


def segment_clips(
    pixel_frames: int, segments: int, switches: Sequence[int], length: int, stride: int = 4
) -> list[Clip]:
    """One clip in the middle of every prompt segment; ``switches`` are latent frames.

    A switch outside the video does not count, so the segments after it have no clip; nor has one of
    under 2 pixel frames.
    """
    inner = [
        p
        for s in switches[: max(0, segments - 1)]
        if 0 < (p := latent_to_pixel_frame(s, stride)) < pixel_frames
    ]
    bounds = [0, *inner, pixel_frames]
    spans = list(itertools.pairwise(bounds))[:segments]
    return [
        Clip(*clip_window((start + stop) // 2, pixel_frames, max(1, length)), segment=i)
        for i, (start, stop) in enumerate(spans)
        if stop - start >= 2
    ]


def segment_of_frame(frame: int, switches: Sequence[int]) -> int:
    """Segment that holds at a latent frame."""
    return next((i for i, switch in enumerate(switches) if switch > frame), len(switches))


def switch_frames(raw: str | Sequence[int], segments: int) -> list[int]:
    """The first ``segments`` - 1 switch frames of a list such as "39,75,111"."""
    frames = (
        [int(part) for part in raw.split(",") if part.strip()]
        if isinstance(raw, str)
        else list(raw)
    )
    wanted = max(0, segments - 1)
    if len(frames) < wanted:
        raise ValueError(
            f"{segments} prompt segments need {wanted} switch frames, but {raw!r} has {len(frames)}; add switches or drop prompts"
        )
    return frames[:wanted]


def align_switches(
    raw: str | Sequence[int], segments: int, chunks: Sequence[Chunk], align: bool = True
) -> list[int]:
    """Switch frames, each moved to the next chunk start (beyond the last: to the last).
    ValueError if two coincide."""
    frames = switch_frames(raw, segments)
    starts = [chunk.start for chunk in chunks[1:]]
    if align and frames:
        if not starts:
            raise ValueError(
                f"switches {frames} cannot move to a chunk start: the video is a single chunk; lengthen it or use one prompt"
            )
        frames = [
            next((start for start in starts if start >= frame), starts[-1]) for frame in frames
        ]
    if any(a >= b for a, b in itertools.pairwise(frames)):
        raise ValueError(
            f"switch frames {raw!r} become {frames}, which do not increase; put them at least a chunk apart"
        )
    return frames
