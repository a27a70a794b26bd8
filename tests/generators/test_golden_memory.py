"""MemFlow's bank against outputs of its public code, tiny, float32, free running: every choice
in every layer is our own."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from golden import case
from reference.memory import OverwritingBank, RepeatingBank
from test_golden_generator import assert_block, geometry_of, run_block, stream_of

from kvpo.generators.geometry import Geometry
from kvpo.generators.history import MemoryBank, SinkWindow
from kvpo.generators.memory import Bank


@dataclass(frozen=True)
class PublicGeometry(Geometry):
    """Streams with one of the public code's banks."""

    kind: type[MemoryBank] = field(default=RepeatingBank, kw_only=True)

    @property
    def history(self) -> MemoryBank:
        return self.kind(SinkWindow(self.sink, self.window), self.bank, self.bank_every, self.block)


@dataclass(frozen=True)
class SlotRouting:
    """The public routing of MemFlow: bank, cache slots instead of frames, no sink, and nothing
    but the block itself as nearest."""

    base: MemoryBank
    fork: int
    blocks: int
    slots: tuple[int, ...]
    capacity: int

    def past(self, start, count):
        if not self.fork <= start // count < self.fork + self.blocks:
            return self.base.past(start, count)
        bank = tuple(f for f in self.base.kept(start) if f < 0)
        evicted = max(0, start + count - self.capacity)  # the block itself has its slots already
        return (*bank, *(s if s < self.base.base.sink else s + evicted for s in self.slots))


def memory_stream(name: str, kind: type[MemoryBank]):
    config, tensors = case(name)
    model, stream = stream_of(config, tensors)
    geometry, _ = geometry_of(config)
    keep = config["bank_size"] if config["sma"] else 0
    stream.geometry = PublicGeometry(
        **vars(geometry)
        | {"bank": config["bank_size"], "bank_every": config["record_interval"], "bank_keep": keep},
        kind=kind,
    )
    stream.cache.bank = Bank.empty(stream.cache.k, keep)
    return config, tensors, model, stream


def slots_of(config, block: int) -> torch.Tensor:
    """[layer, row, slot] of the public bank as it stands before ``block`` reads it, -1 = empty."""
    listed = config["bank_after_block"][block]
    return torch.tensor(
        [[[-1 if f is None else f for f in row] for row in layer["slots"]] for layer in listed]
    )


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("memflow_stream", RepeatingBank),
        ("memflow_sma", RepeatingBank),
        ("memflow_inference", OverwritingBank),
        ("memflow_routing", RepeatingBank),
    ],
)
def test_golden_memory(name, kind):
    config, tensors, model, stream = memory_stream(name, kind)
    g, routing, history = stream.geometry, config["routing"], None
    if routing is not None:
        history = SlotRouting(
            g.history,
            routing["fork_block"],
            routing["P"],
            tuple(routing["slots"]),
            config["capacity"],
        )
    for block in range(config["blocks"]):
        result = run_block(model, stream, history)
        expected = slots_of(config, block)
        ours = stream.cache.bank.frames.expand(-1, config["batch"], -1)
        assert (
            torch.equal(ours.sort(dim=2).values, expected[..., : ours.shape[2]].sort(dim=2).values)
            and (expected[..., ours.shape[2] :] == -1).all()
        ), block
        assert_block(config, tensors, block, *result)


def test_golden_memory_would_show_a_missing_bank():
    _config, tensors, model, stream = memory_stream("memflow_stream", RepeatingBank)
    for block in range(5):
        velocity, _ = run_block(
            model,
            stream,
            SinkWindow(stream.geometry.sink, stream.geometry.window) if block == 4 else None,
        )
    assert (velocity[0] - tensors["velocity"][4][0]).abs().max() > 0.05
