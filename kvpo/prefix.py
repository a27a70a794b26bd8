"""Stage 2, its beginning: the past that a group's branches share; of several groups side by side.

Prefixes of one step differ in length, because forks do.  Rows of the batch stand in the order of their forks, the
latest first: who has reached its fork is always the last row, leaves, and no page is copied for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable, Mapping, Sequence

import torch

from kvpo.denoise import NamedNoise, Sampler, StackedNoise, Stream
from kvpo.generators.pipeline import Pipeline
from kvpo.generators.streaming import StreamingDecoder
from kvpo.types import Script, Window


@dataclass(frozen=True)
class Start:
    """What all rows of a group begin with."""

    window: Window
    noise: NamedNoise
    past: Stream
    """At the fork, of one row."""
    held: Mapping[int, torch.Tensor]
    """Blocks of the past that the velocity penalty holds -> z_SFCHW, their network inputs."""
    decoder: Callable[[], StreamingDecoder]
    """Gives the decoder as the past has left it."""

    @property
    def script(self) -> Script:
        return self.past.scripts[0]


def start_groups(
    pipeline: Pipeline, sampler: Sampler, scripts: Sequence[Script], windows: Sequence[Window], embeddings: Mapping[str, torch.Tensor],
    noises: Sequence[NamedNoise], cache_frames: int, held: Sequence[Sequence[int]],
) -> list[Start]:  # fmt: skip
    """One a script, with the weights now in the pipeline; ``held``: blocks of each prefix whose network inputs are kept."""
    order = sorted(range(len(scripts)), key=lambda i: -windows[i].fork)
    pick = lambda values: [values[i] for i in order]  # noqa: E731
    pasts, inputs = generate_prefixes(pipeline, sampler, pick(scripts), embeddings, pick(noises), [w.fork for w in pick(windows)], cache_frames, pick(held))
    decoders = PrefixDecoders(pipeline, [latents(past) for past in pasts])
    found = [Start(windows[i], noises[i], past, kept, lambda row=row: decoders.take(row)) for row, (i, past, kept) in enumerate(zip(order, pasts, inputs))]
    return [found[order.index(i)] for i in range(len(scripts))]


def generate_prefixes(
    pipeline: Pipeline, sampler: Sampler, scripts: Sequence[Script], embeddings: Mapping[str, torch.Tensor], noises: Sequence[NamedNoise],
    forks: Sequence[int], cache_frames: int, held: Sequence[Sequence[int]],
) -> tuple[list[Stream], list[dict[int, torch.Tensor]]]:  # fmt: skip
    """Each script's stream up to its fork (falling ``forks``), of one row, and the inputs z_SFCHW of its ``held`` blocks.  A prompt switch at the fork itself is part of it."""
    n = len(scripts)
    batch = Stream(pipeline.generator, pipeline.geometry, sampler, scripts, embeddings, StackedNoise(tuple(noises)), pipeline.new_cache(cache_frames, rows=n))
    pasts: list[Stream] = []
    kept: list[dict[int, list[torch.Tensor]]] = [{block: [] for block in blocks} for blocks in held]
    for block in range(forks[0] + 1):
        while n and forks[n - 1] == block:
            n -= 1
            pasts.insert(0, batch.part(n, 1))
            pasts[0].switch()
            batch = batch.part(0, n)
        if n:
            batch.advance(observe=lambda i, x, v: [kept[row][block].append(x[row]) for row in range(n) if block in kept[row]])  # noqa: B023, called before block moves on
    return pasts, [{block: torch.stack(inputs) for block, inputs in blocks.items()} for blocks in kept]


def latents(past: Stream) -> torch.Tensor:
    """x0_NCHW of a stream of one row."""
    return torch.cat(past.blocks, dim=1)[0]


class PrefixDecoders:
    """Decoders that have seen their prefix, each handed out once.  Decoded when the first is asked for, side by side: a row alone takes a CPU as long as two."""

    def __init__(self, pipeline: Pipeline, prefixes: Sequence[torch.Tensor]):
        """``prefixes``: x0_NCHW each, none longer than the one before it."""
        self.pipeline, self.prefixes = pipeline, prefixes
        self._ready: dict[int, StreamingDecoder] | None = None

    def take(self, row: int) -> StreamingDecoder:
        if self._ready is None:
            self._ready = self._decoded(range(len(self.prefixes)))
        return self._ready.pop(row, None) or self._decoded([row])[row]

    def _decoded(self, rows: Sequence[int]) -> dict[int, StreamingDecoder]:
        decoder, done, ready = self.pipeline.decoder(), 0, {}
        for n in range(len(rows), 0, -1):
            length = len(self.prefixes[rows[n - 1]])
            if length > done:
                decoder(torch.stack([self.prefixes[row][done:length] for row in rows[:n]]))
            ready[rows[n - 1]], done = decoder.part(n - 1, 1), length
            decoder = decoder.part(0, n - 1)
        return ready
