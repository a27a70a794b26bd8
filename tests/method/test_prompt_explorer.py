"""Branches whose prompt lies between or beyond the old and the new one, at prompt switches."""

from __future__ import annotations

import pytest
import torch
from test_config import refused
from test_rollout import plain
from tiny import BLUE, RED, embed, new_pipeline, new_rollout, story

from kvpo.common.rng import stream
from kvpo.generators.sampler import SAMPLERS, NamedNoise, Stream
from kvpo.method.energies import VelocityEnergy
from kvpo.method.explorers import forks_of
from kvpo.method.prompt_explorer import PromptExplorer
from kvpo.method.replay import CONTEXTS, Replay
from kvpo.types import Window

EXPLORER = PromptExplorer(strength=0.8, window_blocks=2)
SCRIPT = story(6, 3, 4)
"""Forked at block 3, its second prompt holds for one of the window's two blocks."""


@pytest.fixture(scope="module")
def pipeline():
    return new_pipeline()


@pytest.fixture(scope="module")
def rollout(pipeline):
    return new_rollout(pipeline, SCRIPT, EXPLORER, fork=3)


def test_shifts_are_spread_over_their_range(pipeline):
    """One in each of four equal parts of [-0.8, 0.8], and the same from the same stream."""
    found = [
        [
            plan.prompt_shift
            for plan in EXPLORER.plan(Window(3, 2), pipeline.geometry, 4, stream(0, "test"))
        ]
        for _ in range(2)
    ]
    assert found[0] == found[1] and len(set(found[0])) == 4
    assert [int((w + 0.8) / 0.4) for w in found[0]] == [0, 1, 2, 3]


def test_forks_are_at_switches_only(pipeline):
    geometry = pipeline.geometry
    assert forks_of(EXPLORER, story(8, 5, 7), geometry) == [5]
    assert new_rollout(pipeline, story(6, 4), EXPLORER).window == Window(4, 2)
    with pytest.raises(ValueError, match=r"block 2 can not be a fork.*eligible are \[3, 4\]"):
        new_rollout(pipeline, SCRIPT, EXPLORER, fork=2)
    with pytest.raises(ValueError, match="can be forked at 1 to 4 only; give every story a second"):
        new_rollout(pipeline, story(6), EXPLORER)


def test_branches_read_the_moved_prompt_while_it_holds(pipeline, rollout):
    """By hand: the second prompt's embedding is e + w (e - the first's) in the window, and as it
    is after it and in the re-encoding at the fork; the third prompt is nobody's business."""
    torch.testing.assert_close(
        rollout.latents[-1:], plain(pipeline, SCRIPT)[:, 6:], rtol=1e-4, atol=1e-4
    )
    texts = embed(pipeline, SCRIPT)
    for g, plan in enumerate(rollout.plans[:-1]):
        noise = NamedNoise(pipeline.latent_shape(2), 0, ("group", "noise"))
        alone = Stream(
            pipeline.generator,
            pipeline.geometry,
            SAMPLERS["renoise"],
            [SCRIPT],
            texts,
            noise,
            pipeline.new_cache(40),
        )
        for _ in range(3):
            alone.advance()
        alone.switch()
        moved = texts[BLUE] + plan.prompt_shift * (texts[BLUE] - texts[RED])
        alone.embeddings = texts | {BLUE: moved}
        blocks = [alone.advance(), alone.advance()]
        alone.embeddings = texts
        blocks.append(alone.advance())
        expected = torch.cat(blocks, dim=1)
        torch.testing.assert_close(rollout.latents[g : g + 1], expected, rtol=1e-4, atol=1e-4)
        assert (expected - rollout.latents[-1:]).abs().max() > 1e-3


def test_the_deployed_prompt_does_not_explain_them(pipeline, rollout):
    """Their energies are not 0, that of the anchor is."""
    texts = embed(pipeline, SCRIPT)
    context, members = CONTEXTS["branch"], list(range(4))
    energies = Replay(pipeline, rollout, texts, context, VelocityEnergy(), members).energies()
    assert float(energies[-1]) < 1e-8 and float(energies[:-1].min()) > 1e-6


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({}, "data.segments = None gives stories of one prompt too; set 2 or more"),
        ({"data": {"segments": 1}}, "data.segments = 1 gives stories of one prompt too"),
        ({"prompt": {"strength": 0}}, "strength = 0.0 must lie in (0, 1]"),
        ({"objective": {"kind": "kernel_grpo"}}, "share the noise behind every step"),
    ],
)
def test_what_has_no_second_prompt_is_refused(content, reason):
    assert reason in refused({"explorer": "prompt"} | content)
