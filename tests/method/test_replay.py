"""Replay: energies in the unperturbed context, in however many passes."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from test_rollout import FORK, SWITCHES
from tiny import draw, embed, new_pipeline, new_rollout, story, with_geometry

from kvpo.generators.cache import FrameCache
from kvpo.generators.flow import denoised
from kvpo.generators.sampler import Stream
from kvpo.method.energies import DenoisedEnergy, VelocityEnergy
from kvpo.method.explorers import StartNoise
from kvpo.method.replay import CONTEXTS, Replay
from kvpo.method.routing import KVRouting
from kvpo.types import Trajectory

CASES = [
    pytest.param(context, starts, id=f"{context}, switch {where}")
    for context in CONTEXTS
    for where, starts in SWITCHES.items()
    if where != "after"
]
TVE = VelocityEnergy()


def rollout_of(pipeline, starts=(), **kwargs):
    return new_rollout(pipeline, story(8, *starts), KVRouting(window_blocks=3), fork=FORK, **kwargs)


def replay_of(
    pipeline, rollout, context="branch", surrogate=TVE, rows=None, size=0, together=0
) -> Replay:
    return Replay(
        pipeline,
        rollout,
        embed(pipeline, rollout.script),
        CONTEXTS[context],
        surrogate,
        rows,
        size,
        together,
    )


@pytest.fixture(scope="module")
def moved():
    """Weights that are not those that made the rollouts."""
    other = new_pipeline()
    for i, p in enumerate(other.generator.parameters()):
        p.data += 0.02 * draw(*p.shape, seed=i)
    return other


@torch.no_grad()
def one_by_one(pipeline, rollout, context: str, surrogate=TVE) -> torch.Tensor:
    """E_G as method.md section 4 says it, without a thought for speed: every branch alone, block
    after block, step after step."""
    g, energies = pipeline.geometry, []
    for branch in range(rollout.num_branches):
        prefix = [
            rollout.prefix[None, i : i + g.block] for i in range(0, len(rollout.prefix), g.block)
        ]
        stream = Stream(
            pipeline.generator,
            g,
            None,
            [rollout.script],
            embed(pipeline, rollout.script),
            None,
            rollout.cache.fork(1, 40),
            prefix,
        )
        stream.reencoded = rollout.window.fork
        total = 0.0
        for p in range(rollout.window.blocks):
            stream.switch()
            block = rollout.window.fork + p
            frames = list(range(block * g.block, (block + 1) * g.block))
            past, text = g.history.past(frames[0], g.block), stream.text(block)
            for s, sigma in enumerate(g.sigmas):
                z, u = (
                    x[branch, p, s][None]
                    for x in (rollout.trajectory.inputs, rollout.trajectory.velocities)
                )
                v = pipeline.generator.velocity(z, sigma, text, frames, stream.cache, past)
                total += float(
                    surrogate.step_weights(g.sigmas)[s] * (v - u).double().square().mean()
                )
            clean = {
                "branch": rollout.trajectory.clean[branch, p][None],
                "anchor": rollout.trajectory.clean[-1, p][None],
                "self": denoised(z, v, sigma),
            }[context]
            pipeline.generator.commit(clean, text, frames, stream.cache, past)
            stream.blocks.append(clean)
        energies.append(total / (rollout.window.blocks * len(g.sigmas)))
    return torch.tensor(energies, dtype=torch.float64)


@pytest.mark.parametrize(("context", "starts"), CASES)
def test_batched_is_one_by_one(pipeline, moved, context, starts):
    """In one pass where the prompt allows, in passes of a few rows, and as the definition says;
    under other weights than the rollout's."""
    rollout = rollout_of(pipeline, starts)
    expected = one_by_one(moved, rollout, context)
    for size, together in ((0, 0), (1, 0), (5, 0), (0, 2), (3, 1)):
        torch.testing.assert_close(
            replay_of(moved, rollout, context, size=size, together=together).energies(),
            expected,
            rtol=1e-5,
            atol=0,
        )
    assert expected.min() > 1e-3 and expected.std() / expected.mean() > 1e-3


@pytest.mark.parametrize(("context", "starts"), CASES)
def test_the_anchor_has_no_energy(pipeline, context, starts):
    """The unperturbed policy explains completely what it made itself, and a routed branch not."""
    rollout = rollout_of(pipeline, starts)
    assert float(replay_of(pipeline, rollout, context, rows=[3]).energies()) < 1e-9
    assert replay_of(pipeline, rollout, context).energies().min() > 1e-5


def test_contexts_agree_on_a_single_block(pipeline):
    rollout = new_rollout(pipeline, story(6), KVRouting(window_blocks=1), fork=FORK)
    a, b, c = (replay_of(pipeline, rollout, context).energies() for context in CONTEXTS)
    assert torch.equal(a, b) and torch.equal(a, c)


def test_contexts_differ_on_later_blocks(pipeline):
    rollout = rollout_of(pipeline)
    energies = [replay_of(pipeline, rollout, context).energies() for context in CONTEXTS]
    assert all((a - b).abs().max() / a.mean() > 1e-3 for a, b in itertools.pairwise(energies))


def test_start_noise_has_no_energy(pipeline):
    """Why the config refuses that pair: the unperturbed policy makes these branches itself."""
    for window in (7, -1):
        streaming = with_geometry(pipeline, window=window)
        rollout = new_rollout(streaming, story(6, 3), StartNoise(window_blocks=3), fork=2)
        assert replay_of(streaming, rollout).energies().max() < 1e-9


def test_denoised_energy_weighs_by_sigma(pipeline, moved):
    rollout = rollout_of(pipeline, (FORK + 1,))
    torch.testing.assert_close(
        replay_of(moved, rollout, surrogate=DenoisedEnergy()).energies(),
        one_by_one(moved, rollout, "branch", DenoisedEnergy()),
        rtol=1e-5,
        atol=0,
    )


def test_replay_only_reads(pipeline, moved):
    """The rollout's cache is shared by all replays of it."""
    rollout = rollout_of(pipeline, (FORK + 1,))
    before = [t.clone() for t in (*rollout.cache.k, *rollout.cache.v)]
    first = replay_of(pipeline, rollout).energies()
    replay_of(moved, rollout, "self").energies()
    assert all(torch.equal(a, b) for a, b in zip(before, (*rollout.cache.k, *rollout.cache.v)))
    assert torch.equal(replay_of(pipeline, rollout).energies(), first)


@pytest.mark.parametrize(
    "starts", [(), (FORK,), (FORK + 1,)], ids=["none", "at the fork", "in the window"]
)
def test_passes_cover_every_velocity_once(pipeline, starts):
    rollout = rollout_of(pipeline, starts)
    for size, together in ((0, 0), (1, 0), (7, 0), (7, 2)):
        replay = replay_of(pipeline, rollout, size=size, together=together)
        rows = [
            (r.branch, r.position, r.step) for parts in replay.plan for part in parts for r in part
        ]
        assert sorted(rows) == [(g, p, s) for g in range(3) for p in range(3) for s in range(4)]
        assert all(len(part) <= (size or 99) for parts in replay.plan for part in parts)
    assert replay_of(pipeline, rollout).single_pass == (starts != (FORK + 1,))


def test_fewer_branches_at_a_time_hold_less_past(pipeline, monkeypatch):
    """No more pages than blocks that others read: 2 blocks of 2 frames for each of the branches
    at work."""
    made, fork = [], FrameCache.fork
    monkeypatch.setattr(
        FrameCache,
        "fork",
        lambda self, rows, capacity: made.append((rows, capacity)) or fork(self, rows, capacity),
    )
    rollout = rollout_of(pipeline)
    made.clear()
    replay_of(pipeline, rollout).energies()
    replay_of(pipeline, rollout, together=2).energies()
    assert made == [(3, 4), (2, 4), (1, 4)]


def test_a_replay_is_few_calls(pipeline):
    """12 velocities of each of 3 branches and the clean passes between the blocks: one call and
    two."""
    rollout = rollout_of(pipeline)
    before = pipeline.generator.calls
    replay_of(pipeline, rollout).energies()
    assert pipeline.generator.calls - before == 3


def test_the_gradient_is_the_energys(monkeypatch):
    """Against finite differences in float64, through two blocks of other prompts: a few weights of
    every kind.

    The stock network computes its norms in float32 whatever its dtype; here `float` means float64
    to it.
    """
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    exact = new_pipeline()
    exact.generator.double()
    rollout = new_rollout(
        exact, story(7, FORK + 1), KVRouting(window_blocks=2), fork=FORK, branches=2
    )
    t = rollout.trajectory
    rollout = replace(
        rollout, trajectory=Trajectory(t.inputs.double(), t.velocities.double(), t.clean.double())
    )
    replay = Replay(
        exact,
        rollout,
        {k: v.double() for k, v in embed(exact, rollout.script).items()},
        CONTEXTS["branch"],
        TVE,
    )
    names = (
        "blocks.0.attn1.to_q.weight",
        "blocks.1.attn1.to_out.0.weight",
        "blocks.0.attn2.to_k.weight",
        "blocks.1.attn2.to_v.bias",
        "blocks.1.scale_shift_table",
        "proj_out.weight",
        "patch_embedding.weight",
    )
    parameters = dict(exact.generator.transformer.named_parameters())
    for name in names:
        parameters[name].requires_grad_(True)
    pull = torch.tensor([1.0, -0.5], dtype=torch.float64)
    for branch, share in replay.passes():
        (pull[branch] * share).sum().backward()

    def value(p, at: int, delta: float) -> float:
        p.data.view(-1)[at] += delta
        result = float(pull @ replay.energies())
        p.data.view(-1)[at] -= delta
        return result

    # The branch's own latents are re-encoded without gradient, so a weight's effect on later
    # blocks' PAST is not in the
    # gradient, by definition.  The last layer's output side has no such effect: there finite
    # differences must agree exactly.
    for name in ("proj_out.weight", "blocks.1.attn1.to_out.0.weight", "blocks.1.attn2.to_v.bias"):
        p = parameters[name]
        for at in (0, p.numel() // 2, p.numel() - 1):
            numeric = (value(p, at, 1e-5) - value(p, at, -1e-5)) / 2e-5
            assert float(p.grad.view(-1)[at]) == pytest.approx(numeric, rel=1e-5, abs=1e-9), name
    # For the others the past is held still by replaying the fork's block alone.
    single = Replay(
        exact,
        replace(rollout, window=replace(rollout.window, blocks=1)),
        replay.embeddings,
        CONTEXTS["branch"],
        TVE,
    )
    for name in names:
        p = parameters[name]
        p.grad = None
        for branch, share in single.passes():
            (pull[branch] * share).sum().backward()
        for at in (1, p.numel() // 3):
            replay = single
            numeric = (value(p, at, 1e-5) - value(p, at, -1e-5)) / 2e-5
            assert float(p.grad.view(-1)[at]) == pytest.approx(numeric, rel=1e-5, abs=1e-9), name
