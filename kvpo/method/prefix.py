"""Stage 2, first half: the past that a group's branches share, of several groups side by side.

Prefixes of one step differ in length, because forks do. Rows of the batch stand in the order of
their forks, the latest first: who has reached its fork is always the last row, leaves, and no page
is copied for it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from kvpo.generators.pipeline import Pipeline
from kvpo.generators.sampler import NamedNoise, Sampler, StackedNoise, Stream
from kvpo.generators.streaming import StreamingDecoder
from kvpo.types import Script, Window


@dataclass(frozen=True)
class PrefixPlan:
    """Everything that decides a group's prefix, beside the weights."""

    script: Script
    window: Window
    noise: NamedNoise
    held: Sequence[int] = ()
    """Blocks whose network inputs are kept, for the velocity penalty."""


@dataclass(frozen=True)
class Start:
    """Common beginning of all rows of a group."""

    window: Window
    noise: NamedNoise
    past: Stream
    """Stream of the prefix, stopped at the fork; it has one row."""
    held: Mapping[int, torch.Tensor]
    """Blocks of the past that the velocity penalty holds -> z_SFCHW, their network inputs."""
    decoder: Callable[[int | None], StreamingDecoder]
    """Gives the decoder as the past has left it, see `PrefixDecoders.take`."""

    @property
    def script(self) -> Script:
        return self.past.scripts[0]


def generate_starts(
    pipeline: Pipeline,
    sampler: Sampler,
    plans: Sequence[PrefixPlan],
    embeddings: Mapping[str, torch.Tensor],
    cache_frames: int,
) -> list[Start]:
    """Generate the prefix of every group, with the weights now in the pipeline.

    Groups of one script and noise have one prefix up to the first of their forks: it is generated
    once, and those that fork early take a copy of its cache.
    """
    stories = _by_story(plans)
    copies: dict[int, Stream] = {}
    pasts, inputs = generate_prefixes(
        pipeline,
        sampler,
        [_whole_story([plans[i] for i in story]) for story in stories],
        embeddings,
        cache_frames,
        functools.partial(_copy_early, copies, plans, stories),
    )
    past = {story[-1]: stream for story, stream in zip(stories, pasts)} | copies
    kept = {i: inputs[row] for row, story in enumerate(stories) for i in story}
    order = sorted(past, key=lambda i: -plans[i].window.fork)
    decoders = PrefixDecoders(pipeline, [latents(past[i]) for i in order])
    return [
        Start(
            plan.window,
            plan.noise,
            past[i],
            {block: kept[i][block] for block in plan.held},
            functools.partial(decoders.take, order.index(i)),
        )
        for i, plan in enumerate(plans)
    ]


def _by_story(plans: Sequence[PrefixPlan]) -> list[list[int]]:
    """Groups that share a prefix, the earliest fork first; the story of the latest fork first."""
    found: dict[tuple[Script, NamedNoise], list[int]] = {}
    for i in sorted(range(len(plans)), key=lambda i: plans[i].window.fork):
        found.setdefault((plans[i].script, plans[i].noise), []).append(i)
    return sorted(found.values(), key=lambda story: -plans[story[-1]].window.fork)


def _whole_story(plans: Sequence[PrefixPlan]) -> PrefixPlan:
    """The longest prefix of a story's groups, which keeps what any of them holds."""
    return replace(plans[-1], held=sorted({block for plan in plans for block in plan.held}))


def _copy_early(
    copies: dict[int, Stream],
    plans: Sequence[PrefixPlan],
    stories: Sequence[Sequence[int]],
    batch: Stream,
    block: int,
) -> None:
    """Copy the rows whose story is forked at ``block`` and goes on to a later fork."""
    for row in range(batch.rows):
        for i in stories[row][:-1]:
            if plans[i].window.fork == block:
                copies[i] = batch.copied(row)
                copies[i].switch()


def generate_prefixes(
    pipeline: Pipeline,
    sampler: Sampler,
    plans: Sequence[PrefixPlan],
    embeddings: Mapping[str, torch.Tensor],
    cache_frames: int,
    visit: Callable[[Stream, int], None] = lambda batch, block: None,
) -> tuple[list[Stream], list[dict[int, torch.Tensor]]]:
    """Generate each plan's stream of one row up to its fork; the forks must fall.

    Returns the streams, and the inputs z_SFCHW of each one's held blocks. A prompt switch at the
    fork itself is part of the stream. ``visit`` is shown the streams that are left, and the number
    of the block that comes next.
    """
    n = len(plans)
    batch = Stream(
        pipeline.generator,
        pipeline.geometry,
        sampler,
        [plan.script for plan in plans],
        embeddings,
        StackedNoise(tuple(plan.noise for plan in plans)),
        pipeline.new_cache(cache_frames, rows=n),
    )
    pasts: list[Stream] = []
    kept: list[dict[int, list[torch.Tensor]]] = [{b: [] for b in plan.held} for plan in plans]
    for block in range(plans[0].window.fork + 1):
        visit(batch, block)
        while n and plans[n - 1].window.fork == block:
            n -= 1
            pasts.insert(0, batch.part(n, 1))
            pasts[0].switch()
            batch = batch.part(0, n)
        if n:
            batch.advance(
                observe=lambda i, x, v: _keep_inputs(kept[:n], block, x)  # noqa: B023, called at once
            )
    return pasts, [{b: torch.stack(inputs) for b, inputs in row.items()} for row in kept]


def _keep_inputs(
    kept: Sequence[dict[int, list[torch.Tensor]]], block: int, x_BFCHW: torch.Tensor
) -> None:
    """Keep a step's network inputs in those rows that hold the block."""
    for inputs, x in zip(kept, x_BFCHW):
        if block in inputs:
            inputs[block].append(x)


def latents(past: Stream) -> torch.Tensor:
    """x0_NCHW of a stream of one row; N is 0 before its first block."""
    if not past.blocks:
        g = past.geometry
        channels = past.model.transformer.config.in_channels
        shape = (0, channels, g.latent_height, g.latent_width)
        return torch.zeros(shape, device=past.model.device)
    return torch.cat(past.blocks, dim=1)[0]


class PrefixDecoders:
    """Decoders that have seen their prefix, each handed out once.

    The prefixes are decoded when the first is asked for, side by side: a row alone takes a CPU as
    long as two.
    """

    def __init__(self, pipeline: Pipeline, prefixes: Sequence[torch.Tensor]):
        """``prefixes``: x0_NCHW each, none longer than the one before it."""
        self.pipeline, self.prefixes = pipeline, prefixes
        self._ready: dict[int, StreamingDecoder] | None = None

    def take(self, row: int, lead: int | None = None) -> StreamingDecoder:
        """The decoder behind one prefix.

        ``lead``: latent frames of the prefix that it decodes, the last ones (default: its receptive
        field, which leaves out nothing that matters). The first call decides for all prefixes.
        """
        if self._ready is None:
            self._ready = self._decoded(range(len(self.prefixes)), lead)
        return self._ready.pop(row, None) or self._decoded([row], lead)[row]

    def _decoded(self, rows: Sequence[int], lead: int | None) -> dict[int, StreamingDecoder]:
        network = self.pipeline.scoring
        lead = network.field if lead is None else lead
        ends = [self.prefixes[row][-lead:] for row in rows]
        skipped = [len(self.prefixes[row]) - len(end) for row, end in zip(rows, ends)]
        decoder, done, ready = StreamingDecoder(network, skipped), 0, {}
        for n in range(len(rows), 0, -1):
            length = len(ends[n - 1])
            if length > done:
                decoder(torch.stack([end[done:length] for end in ends[:n]]))
            ready[rows[n - 1]], done = decoder.part(n - 1, 1), length
            decoder = decoder.part(0, n - 1)
        return ready
