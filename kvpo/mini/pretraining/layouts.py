"""Layouts of the flat sequences that the miniature's transformer is trained on.

They say which block reads which frames.

A flat sequence holds clean blocks (network time 0) and noisy blocks (a noise level each); every
block reads a short list of clean frames and itself, exactly as the streaming generator reads its
cache.

A crop is a few blocks of a story, its *sources*. A *slot* is one block of the flat sequence: a
source, clean or noisy, under the prompt of some source. So a frame that the deployment encodes
twice (at a prompt switch the window's past is encoded again under the new prompt) simply has two
slots.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvpo.mini.pretraining.networks import BLOCK, SINK, WINDOW

PAST = WINDOW - BLOCK
"""Past frames a block reads at most: the sink and 6 more."""
SLOTS = 15
"""Blocks of a flat sequence; one number for all layouts, so that one compiled graph serves them."""
ROUTED_SOURCES = 2
"""Far blocks that a routed layout adds to its stretch."""


@dataclass(frozen=True)
class Slot:
    source: int
    """Number of the block in the crop."""
    noisy: bool
    prompt: int
    """The source whose prompt it is encoded under."""
    reads: tuple[int, ...]
    """Past frames it attends to, as frame positions of the flat sequence.

    Slot i holds 3 i, 3 i + 1, 3 i + 2.
    """


@dataclass(frozen=True)
class Layout:
    """A flat sequence.

    ``kind``: opening (sources are blocks 0, 1, ... of a story), later (source 0 is the story's
    block 0, its sink; the others a stretch further on), or routed (as later, then far blocks
    between the two). ``switch``: the position in the stretch at which the prompt changes, None =
    nowhere.
    """

    kind: str
    switch: int | None
    slots: tuple[Slot, ...]

    @property
    def sources(self) -> int:
        return 1 + max(slot.source for slot in self.slots)

    def keys(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Frames whose keys each slot reads, [slots, 12], and which of them count, bool.

        They stand in the order past, padding, itself.
        """
        index = torch.zeros(len(self.slots), WINDOW, dtype=torch.long)
        real = torch.zeros(len(self.slots), WINDOW, dtype=torch.bool)
        for i, slot in enumerate(self.slots):
            index[i, : len(slot.reads)] = torch.tensor(slot.reads, dtype=torch.long)
            index[i, PAST:] = torch.arange(BLOCK * i, BLOCK * (i + 1))
            real[i, : len(slot.reads)], real[i, PAST:] = True, True
        return index, real

    def frames(self) -> torch.Tensor:
        """Frame of the crop behind every frame of the sequence, [3 slots]."""
        return torch.tensor([BLOCK * slot.source + f for slot in self.slots for f in range(BLOCK)])


def stretch(kind: str) -> range:
    """Sources of the consecutive blocks, in time order."""
    return {"opening": range(6), "later": range(1, 8), "routed": range(1, 7)}[kind]


class _Builder:
    """Adds slots in time order; remembers under which slot each source's frames are read."""

    def __init__(self, kind: str, switch: int | None, generator: torch.Generator | None):
        self.kind, self.switch, self.generator = kind, switch, generator
        self.stretch = stretch(kind)
        self.slots: list[Slot] = []
        self.clean: dict[int, int] = {}
        self.sink: tuple[int, ...] = ()
        self.far: tuple[int, ...] = ()

    def add(
        self, source: int, noisy: bool, reads: tuple[int, ...], prompt: int | None = None
    ) -> int:
        self.slots.append(Slot(source, noisy, source if prompt is None else prompt, reads))
        return len(self.slots) - 1

    def past(self, position: int) -> tuple[int, ...]:
        """All readable frames of the stretch before ``position``, oldest first.

        The sink is left out.
        """
        before = [s for s in self.stretch[:position] if s != 0]
        return tuple(f for s in before for f in frames_of(self.clean[s]))

    def history(self, position: int) -> tuple[int, ...]:
        past = self.past(position)
        if self.kind != "routed" or position < 2:
            return self.sink + past[-(PAST - SINK) :]
        nearest = int(torch.randint(1, 5, (), generator=self.generator))
        pool = self.far + past[:-nearest]
        drawn = (
            torch.randperm(len(pool), generator=self.generator)[: PAST - SINK - nearest]
            .sort()
            .values
        )
        return self.sink + tuple(pool[int(i)] for i in drawn) + past[-nearest:]

    def encode_again(self, position: int) -> None:
        """Encode the window's past, but not the sink, once more under the new prompt.

        It is one pass, at a prompt switch.

        In that pass all frames see the sink and the latest 9 of themselves, later ones included.
        (Older frames of the pass, which only a route could read later, keep their first encoding
        here.)
        """
        again = [
            s
            for s in self.stretch[max(0, position - (WINDOW - SINK) // BLOCK) : position]
            if s != 0
        ]
        self.clean |= {source: len(self.slots) + i for i, source in enumerate(again)}
        for source in again:
            others = tuple(f for s in again if s != source for f in frames_of(self.clean[s]))
            self.add(source, False, self.sink + others, prompt=self.stretch[position])

    def build(self) -> Layout:
        if self.stretch[0] != 0:
            self.sink = frames_of(self.add(0, False, ()))
        if self.kind == "routed":
            far = range(len(self.stretch) + 1, len(self.stretch) + 1 + ROUTED_SOURCES)
            self.far = tuple(f for s in far for f in frames_of(self.add(s, False, self.sink)))
        reads = {}
        for position, source in enumerate(self.stretch):
            if position == self.switch:
                self.encode_again(position)
            reads[source] = self.history(position)
            if position < len(self.stretch) - 1:
                self.clean[source] = self.add(source, False, reads[source])
            if source == 0:
                self.sink = frames_of(self.clean[0])
        # A story's block 0 is taught elsewhere (kvpo.mini.pretraining.openings); blocks 0 and 1 of
        # a later stretch have no full past of their own.
        noisy = self.stretch[1:] if self.stretch[0] == 0 else self.stretch[2:]
        for source in [*noisy, *noisy[::-1]][: SLOTS - len(self.slots)]:
            self.add(source, True, reads[source])
        return Layout(self.kind, self.switch, tuple(self.slots))


def frames_of(slot: int) -> tuple[int, ...]:
    return tuple(range(BLOCK * slot, BLOCK * (slot + 1)))


def layout(kind: str, switch: int | None, generator: torch.Generator | None = None) -> Layout:
    """``generator`` draws the routes of a routed layout."""
    return _Builder(kind, switch, generator).build()


def draw_layout(generator: torch.Generator) -> Layout:
    """3 in 10 openings, 1 in 5 routed; a switch in half of them."""
    kinds = ("opening",) * 3 + ("later",) * 5 + ("routed",) * 2
    kind = kinds[int(torch.randint(10, (), generator=generator))]
    return layout(kind, draw_switch(kind, generator), generator)


def draw_switch(kind: str, generator: torch.Generator) -> int | None:
    """Draw the position of a prompt switch: None in half of the draws, else 2 or later.

    Stories switch at block 1 too rarely to be cut there.
    """
    length = len(stretch(kind))
    at = int(torch.randint(2, 2 * length - 2, (), generator=generator))
    return at if at < length else None
