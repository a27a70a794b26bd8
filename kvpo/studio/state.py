"""The state of a stream between two blocks: copied, kept within a budget, cut out of a group."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch

from kvpo.generators.cache import FrameCache
from kvpo.generators.sampler import Noise, Stream
from kvpo.generators.streaming import StreamingDecoder
from kvpo.types import Script


@dataclass
class State:
    """Everything that the next block of one video depends on."""

    stream: Stream
    decoder: StreamingDecoder

    @property
    def block(self) -> int:
        """Number of the next block."""
        return len(self.stream.blocks)

    @property
    def nbytes(self) -> int:
        held = [x for x in (*self.stream.blocks, *self.decoder._cache) if torch.is_tensor(x)]
        return self.stream.cache.nbytes + sum(x.nbytes for x in held)

    def copied(self) -> State:
        """Give a state that can go on without changing this one.

        Only the cache's pages are written in place, so they alone are copied.
        """
        old = self.stream
        stream = Stream(
            old.model,
            old.geometry,
            old.sampler,
            old.scripts,
            old.embeddings,
            old.noise,
            _copied(old.cache),
            old.blocks,
        )
        stream.reencoded = old.reencoded
        return State(stream, self.decoder.part(0, 1))


class Kept:
    """States by node and block, as many as fit a budget of bytes; the oldest goes first."""

    def __init__(self, budget: int):
        self.budget = budget
        self._states: dict[tuple[int, int], tuple[State, int]] = {}

    def keep(self, node: int, state: State) -> None:
        """Keep a copy of a state under its node and next block."""
        key, size = (node, state.block), state.nbytes
        if key in self._states or size > self.budget:
            return
        while sum(kept for _, kept in self._states.values()) + size > self.budget:
            self._states.pop(next(iter(self._states)))
        self._states[key] = (state.copied(), size)

    def latest(self, node: int, first: int, last: int) -> State | None:
        """Give a copy of the latest state of a node from ``first`` to ``last``; None if none."""
        blocks = [b for n, b in self._states if n == node and first <= b <= last]
        return self._states[node, max(blocks)][0].copied() if blocks else None


def cut_out(
    group: Stream, decoder: StreamingDecoder, row: int, capacity: int, script: Script, noise: Noise
) -> State:
    """Make one row of a group a stream of its own that holds nothing of the others.

    Its cache has ``capacity`` frames: the sink and the latest ones.
    """
    blocks = [b if b is None or len(b) == 1 else b[row : row + 1].clone() for b in group.blocks]
    stream = Stream(
        group.model,
        group.geometry,
        group.sampler,
        [script],
        group.embeddings,
        noise,
        _cut_out(group.cache, row, capacity),
        blocks,
    )
    stream.reencoded = group.reencoded
    return State(stream, decoder.part(row, 1))


def _copied(cache: FrameCache) -> FrameCache:
    other = copy.copy(cache)
    other.slots, other.evicted, other.frozen = dict(cache.slots), set(cache.evicted), False
    other.k, other.v = ([pages.clone() for pages in layers] for layers in (cache.k, cache.v))
    return other


def _cut_out(cache: FrameCache, row: int, capacity: int) -> FrameCache:
    _, _, tokens, heads, dim = cache.k[0].shape
    own = FrameCache(
        cache.layers,
        capacity,
        tokens,
        heads,
        dim,
        sink=cache.sink,
        dtype=cache.k[0].dtype,
        device=cache.k[0].device,
    )
    resident = cache.resident
    sink = [frame for frame in resident if frame < cache.sink]
    rest = resident[len(sink) :]
    frames = [*sink, *rest[max(0, len(rest) - (capacity - len(sink))) :]]
    own.slots = {frame: slot for slot, frame in enumerate(frames)}
    for layer in range(cache.layers):
        for frame, slot in own.slots.items():
            for pages, page in zip((own.k, own.v), cache.page(frame, layer)):
                pages[layer][0, slot] = page[row if len(page) > 1 else 0]
    own.bank = cache.bank and cache.bank.part(row, 1)
    return own
