"""What the pages leave out of the gradient, and what each denoise step does: the doctor's
numbers, checked."""

from __future__ import annotations

import pytest
import torch
from test_replay import replay_of
from tiny import embed, new_pipeline, new_rollout, story

from kvpo.common.timing import Phases
from kvpo.config import RunConfig
from kvpo.doctor.page_gradient import left_out, on_a_tiny_generator
from kvpo.doctor.step_effects import step_effects, window_latents
from kvpo.generators.sampler import SAMPLERS
from kvpo.method.energies import VelocityEnergy
from kvpo.method.replay import CONTEXTS
from kvpo.method.rollout import roll_out_branches, start_groups
from kvpo.method.routing import KVRouting
from kvpo.method.settings import RolloutConfig

FORK = 4


@pytest.mark.parametrize("P", [1, 2, 3])
def test_the_exact_gradient_is_that_of_finite_differences(pipeline, P):
    """Through every page of the window.  Training's is that at P = 1, and only there."""
    config = RunConfig(
        kv_routing=KVRouting(window_blocks=P), data=RunConfig().data.__class__(blocks=9)
    )
    found = on_a_tiny_generator(config, pipeline)
    assert found.difference < 1e-6
    if P == 1:
        assert found.cosine == pytest.approx(1.0, abs=1e-12) and found.relative < 1e-9
    else:
        assert found.cosine < 0.999 and found.relative > 0.03, "the pages' part is no rounding"


def test_a_wrong_exact_gradient_would_be_seen(pipeline, monkeypatch):
    """With pages that keep no graph it is training's own, and finite differences tell."""
    import kvpo.doctor.page_gradient as module

    monkeypatch.setattr(module._Through, "commit", module.CausalWan.commit)
    config = RunConfig(
        kv_routing=KVRouting(window_blocks=2), data=RunConfig().data.__class__(blocks=9)
    )
    found = on_a_tiny_generator(config, pipeline)
    assert found.difference > 1e-2 and found.relative < 1e-9


def test_the_generator_is_left_as_it_was(own_pipeline):
    """Its pages carry no gradient again, also where a prompt switches in the window."""
    rollout = new_rollout(own_pipeline, story(7, FORK + 1), KVRouting(window_blocks=2), fork=FORK)
    parameters = list(own_pipeline.generator.requires_grad_(True).parameters())
    before = replay_of(own_pipeline, rollout).energies()
    found = left_out(
        own_pipeline,
        rollout,
        embed(own_pipeline, rollout.script),
        CONTEXTS["branch"],
        VelocityEnergy(),
        parameters,
        0,
    )
    assert 0.0 < found.cosine < 1.0 and found.difference != found.difference
    assert torch.equal(replay_of(own_pipeline, rollout).energies(), before)
    assert {
        type(p).__name__
        for name, p in own_pipeline.generator.transformer.attn_processors.items()
        if "attn1" in name
    } == {"PagedSelfAttention"}


# --- Steps ---


@pytest.fixture(scope="module")
def group():
    pipeline, script = new_pipeline(), story(7)
    explorer, config = KVRouting(window_blocks=2), RolloutConfig(branches=3, cache_frames=12)
    embeddings = embed(pipeline, script)
    (start,) = start_groups(
        pipeline,
        SAMPLERS["renoise"],
        explorer,
        config,
        [script],
        embeddings,
        0,
        [("g",)],
        [lambda fork: ()],
        [FORK],
    )
    return (
        pipeline,
        start,
        roll_out_branches(pipeline, explorer, config, start, 0, ("g",), Phases()),
        embeddings,
    )


def test_routed_everywhere_is_the_rollout_and_nowhere_the_anchor(group):
    pipeline, start, rollout, _ = group
    everywhere = window_latents(pipeline, start, rollout.plans[:-1], range(4), True)
    torch.testing.assert_close(
        everywhere, rollout.trajectory.clean.flatten(1, 2), rtol=0, atol=1e-5
    )
    nowhere = window_latents(pipeline, start, rollout.plans[:-1], (), False)
    assert torch.equal(nowhere, nowhere[-1:].expand_as(nowhere))
    torch.testing.assert_close(nowhere[-1], everywhere[-1], rtol=0, atol=1e-5)


def test_what_steps_say_and_do(group):
    """Shares of the energy add up to 1, by the recipe's weights; a few rows at a time are all at
    once."""
    pipeline, start, rollout, embeddings = group
    effects = step_effects(
        pipeline, start, rollout, embeddings, CONTEXTS["branch"], VelocityEnergy()
    )
    assert (
        sum(e.says for e in effects) == pytest.approx(1.0)
        and all(e.does > 0.0 for e in effects)
        and [e.weight for e in effects] == [1.0] * 4
    )
    for few, e in zip(
        step_effects(
            pipeline, start, rollout, embeddings, CONTEXTS["branch"], VelocityEnergy(), together=2
        ),
        effects,
    ):
        assert (few.says, few.does) == pytest.approx((e.says, e.does), rel=1e-3)
    late = step_effects(
        pipeline,
        start,
        rollout,
        embeddings,
        CONTEXTS["branch"],
        VelocityEnergy((0.0, 0.0, 1.0, 1.0)),
    )
    assert [e.says for e in late[:2]] == [0.0, 0.0] and late[3].says / late[
        2
    ].says == pytest.approx(effects[3].says / effects[2].says)
