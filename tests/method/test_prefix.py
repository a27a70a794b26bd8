"""Prefixes of several groups side by side are the prefixes of each group alone, whenever each
reaches its fork."""

from __future__ import annotations

import pytest
import torch
from test_align import settings
from test_branch_parallel import Given, aligned
from tiny import draw, embed, story, with_geometry

from kvpo.config import from_dict
from kvpo.generators.sampler import SAMPLERS, NamedNoise
from kvpo.method.prefix import PrefixDecoders, PrefixPlan, Start, generate_starts
from kvpo.method.settings import RolloutConfig
from kvpo.types import Window

CACHE = 9
SCRIPTS = (story(8, 2, id="a"), story(8, 3, 5, id="b"), story(8, id="c"), story(8, 4, id="d"))
FORKS = (4, 6, 2, 4)
"""One at a switch, two at one block, none in the order in which they leave."""
HELD = ((0, 3), (), (1,), (2,))
HISTORIES = {"window": {}, "all the past": {"window": -1}, "bank": {"bank": 2, "bank_every": 1}}


def started(pipeline, which: list[int]) -> list[Start]:
    g = pipeline.geometry
    shape = pipeline.latent_shape(g.block)
    plans = [
        PrefixPlan(SCRIPTS[i], Window(FORKS[i], 1), NamedNoise(shape, 0, ("group", i)), HELD[i])
        for i in which
    ]
    cache = CACHE if g.window > 0 else 40
    embeddings = embed(pipeline, *SCRIPTS)
    return generate_starts(pipeline, SAMPLERS["renoise"], plans, embeddings, cache)


def pages(start: Start) -> list[torch.Tensor]:
    """All that can be read of a past, frame by frame, layer by layer."""
    cache = start.past.cache
    bank = [] if cache.bank is None else [*cache.bank.k, *cache.bank.v, cache.bank.frames.float()]
    return [
        *(
            x
            for frame in cache.resident
            for layer in range(cache.layers)
            for x in cache.page(frame, layer)
        ),
        *bank,
    ]


@pytest.mark.parametrize("changes", HISTORIES.values(), ids=HISTORIES)
def test_side_by_side_is_alone(pipeline, changes):
    """Latents, what the cache and the bank hold, held inputs, and how each goes on from there;
    the last with all others' memory in use."""
    pipeline = with_geometry(pipeline, **changes)
    together, close = started(pipeline, [0, 1, 2, 3]), {"atol": 2e-5, "rtol": 0}
    for i, ours in enumerate(together):
        (theirs,) = started(pipeline, [i])
        assert (
            ours.script.id == theirs.script.id
            and ours.window == theirs.window
            and ours.past.rows == 1
        )
        assert (
            len(ours.past.blocks) == FORKS[i]
            and ours.past.cache.resident == theirs.past.cache.resident
        )
        for a, b in zip(pages(ours), pages(theirs), strict=True):
            torch.testing.assert_close(a, b, **close)
        assert ours.held.keys() == set(HELD[i])
        for block in HELD[i]:
            torch.testing.assert_close(ours.held[block], theirs.held[block], **close)
        for _ in range(FORKS[i], 8):
            torch.testing.assert_close(
                ours.past.advance(), theirs.past.advance(), atol=1e-4, rtol=0
            )


def test_a_row_that_goes_on_leaves_the_others_alone(pipeline):
    """They share memory, row by row."""
    first, second = started(pipeline, [0, 1])
    before = [x.clone() for x in pages(second)]
    first.past.advance()
    assert all(torch.equal(a, b) for a, b in zip(before, pages(second), strict=True))


def test_decoders_go_on_where_each_prefix_ended(pipeline):
    """Against decoding prefix and continuation in one; each is handed out once from memory, and
    made anew after that."""
    prefixes = [draw(n, 4, 4, 4, seed=n) for n in (6, 3, 3, 1)]
    decoders, after = PrefixDecoders(pipeline, prefixes), draw(1, 2, 4, 4, 4, seed=9)
    for row in (2, 0, 3, 1, 0):
        expected = pipeline.decoder()(torch.cat([prefixes[row][None], after], dim=1))[:, -8:]
        assert (decoders.take(row)(after).int() - expected.int()).abs().max() <= 1


@pytest.mark.parametrize("train", ["full", "lora"])
def test_a_step_with_prefixes_side_by_side(folder, tmp_path, train):
    """Three groups by twos: the weights of one after the other but for rounding, in fewer calls.
    Rewards are drawn: pixels are whole numbers, and rounding may tip one."""
    found = {}
    for prefixes in (1, 2):
        changes = {
            "groups": 3,
            "rollout": {"branches": 3, "cache_frames": 12, "prefixes": prefixes},
            "policy": {"train": train, "rank": 2},
        }
        changes |= {"optimizer": {"lr": 1e-3, "warmup": 1, "eps": 1e-3}}
        run = aligned(from_dict(settings(folder, **changes)), tmp_path, Given)
        calls = [run.step(step)["calls/generator"] for step in range(2)]
        found[prefixes] = calls, run.parts.policy.snapshot(), run.parts.policy.reference
    (few, ours, start), (many, theirs, _) = found[2], found[1]
    assert all(a < b for a, b in zip(few, many))
    moved = max(float((a - b).abs().max()) for a, b in zip(ours, start))
    assert moved > 1e-4 and max(float((a - b).abs().max()) for a, b in zip(ours, theirs)) < 1e-6


def test_bad_number():
    with pytest.raises(ValueError, match="rollout.prefixes = 0 must be 1 or more"):
        RolloutConfig(prefixes=0)
