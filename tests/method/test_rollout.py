"""Rollouts: everything but the plans is shared bit for bit, and the anchor is the video that
deployment would have made."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from tiny import RED, embed, new_rollout, new_stream, story, with_geometry

from kvpo.generators.sampler import SAMPLERS, NamedNoise, Stream
from kvpo.method.explorers import Exploration, StartNoise, mix_noise
from kvpo.method.forks import check_room
from kvpo.method.routing import KVRouting
from kvpo.method.settings import RolloutConfig
from kvpo.types import BranchPlan, Window

ROUTING = KVRouting(window_blocks=2)
FORK = 4


@dataclass(frozen=True)
class Planned(Exploration):
    """An explorer whose plans are given."""

    plans: tuple[BranchPlan, ...]
    window_blocks: int = 2
    deterministic_replay = False

    def eligible_forks(self, blocks, geometry):
        return list(range(1, blocks - self.window_blocks + 1))

    def plan(self, window, geometry, num_branches, generator, resident=None):
        return self.plans


def plain(pipeline, script, seed=0, name=("group",), sampler="renoise"):
    """The video without any exploration [1, N, C, H, W], from the same streams of noise."""
    noise = NamedNoise(pipeline.latent_shape(pipeline.geometry.block), seed, (*name, "noise"))
    stream = Stream(
        pipeline.generator,
        pipeline.geometry,
        SAMPLERS[sampler],
        [script],
        embed(pipeline, script),
        noise,
        pipeline.new_cache(40),
    )
    return torch.cat([stream.advance() for _ in range(script.blocks)], dim=1)


SWITCHES = {
    "none": (),
    "before": (2,),
    "at the fork": (FORK,),
    "in the window": (FORK + 1,),
    "after": (FORK + 2,),
    "everywhere": (3, FORK),
}


@pytest.mark.parametrize("sampler", ["renoise", "ode"])
@pytest.mark.parametrize("starts", SWITCHES.values(), ids=SWITCHES)
def test_the_anchor_is_the_deployed_video(pipeline, starts, sampler):
    script = story(8, *starts)
    rollout = new_rollout(pipeline, script, ROUTING, fork=FORK, sampler=sampler)
    expected = plain(pipeline, script, sampler=sampler)
    assert torch.equal(rollout.prefix, expected[0, : 2 * FORK]), (
        "the prefix runs alone, so it is equal bit for bit"
    )
    torch.testing.assert_close(rollout.latents[-1], expected[0, 2 * FORK :], atol=3e-5, rtol=0)


@pytest.mark.parametrize("starts", SWITCHES.values(), ids=SWITCHES)
def test_an_empty_plan_is_the_anchor(pipeline, starts):
    """Bit for bit, beside branches that are not."""
    plans = (BranchPlan(), BranchPlan(frames=(1, 2, 4)), BranchPlan())
    rollout = new_rollout(pipeline, story(8, *starts), Planned(plans), fork=FORK)
    for x in (
        rollout.latents,
        rollout.trajectory.inputs,
        rollout.trajectory.velocities,
        rollout.trajectory.clean,
    ):
        assert torch.equal(x[0], x[-1]) and torch.equal(x[2], x[-1])
        assert not torch.equal(x[1], x[-1])


def test_routing_the_rolling_window_is_the_anchor(pipeline):
    """At the fork the routed branch whose frames are the rolling window's reads what the anchor
    reads."""
    plans = (BranchPlan(frames=ROUTING.rolling(Window(FORK, 1), pipeline.geometry)),) * 3
    assert plans[0].frames == (4, 5, 6)
    rollout = new_rollout(pipeline, story(6), Planned(plans, window_blocks=1), fork=FORK)
    assert torch.equal(rollout.latents[0], rollout.latents[-1])


def test_a_plan_acts_in_its_window_only(pipeline):
    """The tail reads the deployed window again: given the window's frames, it is what deployment
    would continue with."""
    script, plans = story(8), (BranchPlan(frames=(1, 2, 4)), BranchPlan(frames=(1, 3, 6)))
    rollout = new_rollout(pipeline, script, Planned(plans), fork=FORK)
    noise = NamedNoise(pipeline.latent_shape(2), 0, ("group", "noise"))
    for row in (0, 1):
        video = torch.cat((rollout.prefix, rollout.latents[row]))[None]
        stream = Stream(
            pipeline.generator,
            pipeline.geometry,
            SAMPLERS["renoise"],
            [script],
            embed(pipeline, script),
            noise,
            pipeline.new_cache(40),
        )
        for b in range(
            FORK + 2
        ):  # rebuild the keys: inside the window they were written with the routed past
            frames = [2 * b, 2 * b + 1]
            past = (
                (0, *plans[row].frames, 2 * b - 1)
                if b >= FORK
                else pipeline.geometry.history.past(frames[0], 2)
            )
            stream.model.commit(video[:, frames], stream.text(b), frames, stream.cache, past)
            stream.blocks.append(video[:, frames])
        torch.testing.assert_close(
            stream.advance(), video[:, 2 * (FORK + 2) :][:, :2], atol=3e-5, rtol=0
        )


def test_branches_share_all_noise(pipeline):
    """Start noise and, recovered from what the sampler made of it, every re-noise."""
    rollout, sigmas = new_rollout(pipeline, story(7), fork=FORK), pipeline.geometry.sigmas
    z, u = (t.double() for t in (rollout.trajectory.inputs, rollout.trajectory.velocities))
    noise = NamedNoise(pipeline.latent_shape(2), 0, ("group", "noise"))
    for p in range(2):
        assert torch.equal(
            rollout.trajectory.inputs[:, p, 0], noise.start(FORK + p).expand(4, -1, -1, -1, -1)
        )
        for s in range(3):
            x0 = z[:, p, s] - sigmas[s] * u[:, p, s]
            eps = (z[:, p, s + 1] - (1 - sigmas[s + 1]) * x0) / sigmas[s + 1]
            torch.testing.assert_close(
                eps, noise.renoise(FORK + p, s).double().expand_as(eps), atol=1e-5, rtol=0
            )
    x0 = z[:, :, -1] - sigmas[-1] * u[:, :, -1]
    torch.testing.assert_close(rollout.trajectory.clean.double(), x0, atol=1e-5, rtol=0)
    assert torch.equal(rollout.latents[:, :4], rollout.trajectory.clean.flatten(1, 2))


def test_shapes(pipeline):
    rollout = new_rollout(pipeline, story(8), fork=FORK)
    assert (
        rollout.num_branches == 3
        and len(rollout.plans) == 4
        and rollout.plans[-1] == BranchPlan()
        and rollout.window == Window(FORK, 2)
    )
    assert (
        rollout.trajectory.inputs.shape
        == rollout.trajectory.velocities.shape
        == (4, 2, 4, 2, 4, 4, 4)
    )
    assert (
        rollout.trajectory.clean.shape == (4, 2, 2, 4, 4, 4)
        and rollout.prefix.shape == (8, 4, 4, 4)
        and rollout.latents.shape == (4, 8, 4, 4, 4)
    )
    assert rollout.cache.frozen and rollout.cache.resident == list(range(8))


def test_branches_differ(pipeline):
    rollout = new_rollout(pipeline, story(6), fork=FORK)
    assert all(
        (rollout.latents[a] - rollout.latents[b]).abs().max() > 1e-3
        for a in range(4)
        for b in range(a)
    )


def test_a_name_and_a_seed_decide_everything(pipeline):
    a, b = new_rollout(pipeline), new_rollout(pipeline)
    assert (
        a.window == b.window
        and a.plans == b.plans
        and torch.equal(a.latents, b.latents)
        and torch.equal(a.trajectory.velocities, b.trajectory.velocities)
    )
    for other in (new_rollout(pipeline, seed=1), new_rollout(pipeline, name=("other",))):
        assert not torch.equal(other.prefix[:2], a.prefix[:2])


def test_the_number_of_branches_changes_no_other_draw(pipeline):
    few, many = (new_rollout(pipeline, story(12), branches=g) for g in (2, 5))
    assert few.window == many.window and torch.equal(few.prefix, many.prefix)
    torch.testing.assert_close(few.latents[-1], many.latents[-1], atol=3e-5, rtol=0)


def test_the_horizon_only_cuts_the_tail(pipeline):
    whole, cut, short = (
        new_rollout(pipeline, story(9), fork=FORK, horizon=h)
        for h in (None, lambda _: 7, lambda _: 1)
    )
    assert [len(r.latents[0]) for r in (whole, cut, short)] == [10, 6, 4], (
        "the window is always there"
    )
    assert torch.equal(whole.latents[:, :6], cut.latents)


def test_routing_draws_from_what_the_cache_keeps(pipeline):
    rollout = new_rollout(pipeline, story(14), fork=12, cache_frames=9)
    assert rollout.cache.resident == [0, *range(16, 24)]
    assert all(set(p.frames) <= set(range(16, 23)) for p in rollout.plans)


# --- Start noise ---


@pytest.mark.parametrize("window", [7, -1])
def test_start_noise(pipeline, window):
    """Mixed as planned in the window's blocks, and nothing else changes; also where everything
    is read and a switch re-encodes it all."""
    pipeline = with_geometry(pipeline, window=window)
    script = story(6, 2, 3)
    rollout = new_rollout(pipeline, script, StartNoise(0.6, window_blocks=2), fork=2)
    shared = NamedNoise(pipeline.latent_shape(2), 0, ("group", "noise"))
    for row in range(4):
        fresh = NamedNoise(shared.shape, 0, ("group", "noise", "branch", row))
        for p in range(2):
            expected = (
                shared.start(2 + p)
                if row == 3
                else mix_noise(shared.start(2 + p), fresh.start(2 + p), 0.6)
            )
            assert torch.equal(rollout.trajectory.inputs[row, p, 0], expected)
    torch.testing.assert_close(
        rollout.latents[-1], plain(pipeline, script)[0, 4:], atol=3e-5, rtol=0
    )


# --- What is refused ---


@pytest.mark.parametrize("branches", [-1, 0, 1])
def test_a_group_needs_two_branches(branches):
    with pytest.raises(
        ValueError, match=f"rollout.branches = {branches}, but a group compares at least 2 branches"
    ):
        RolloutConfig(branches=branches)


def test_a_fork_that_is_not_eligible(pipeline):
    with pytest.raises(
        ValueError, match=r"block 2 can not be a fork of script 'story'; eligible are \[3, 4\]"
    ):
        new_rollout(pipeline, fork=2)


def test_a_window_longer_than_the_video(pipeline):
    with pytest.raises(
        ValueError, match="window longer than the video: window_blocks = 7, the video has 6 blocks"
    ):
        new_rollout(pipeline, explorer=KVRouting(window_blocks=7))


def test_a_video_too_short_to_route_in(pipeline):
    with pytest.raises(ValueError, match="no block can be a fork: .* 6 frames of history"):
        new_rollout(pipeline, story(4))


def test_a_cache_too_small_to_stream(pipeline):
    """Said before anything is generated: the cache used to be enlarged in silence, or to run out
    of pages at a prompt switch."""
    with pytest.raises(
        ValueError,
        match=r"rollout.cache_frames = 7, but this generator \(sink 1, window 7\) streams 6 blocks from a cache of at least 8",
    ):
        new_rollout(pipeline, cache_frames=7)
    check_room(ROUTING, RolloutConfig(cache_frames=8), 6, pipeline.geometry)
    with pytest.raises(ValueError, match="no room for routed frames: window -1"):
        check_room(ROUTING, RolloutConfig(), 6, with_geometry(pipeline, window=-1).geometry)


def test_the_smallest_cache_rolls_out(pipeline):
    for starts in SWITCHES.values():
        small, large = (
            new_rollout(pipeline, story(8, *starts), fork=FORK, cache_frames=c) for c in (8, 33)
        )
        assert torch.equal(small.latents[-1], large.latents[-1])


def test_a_stream_is_its_script(pipeline):
    """The helper of these tests itself: a stream's rows follow their own scripts."""
    assert new_stream(pipeline, story(2, 1)).text(0).equal(pipeline.encode_text([RED]))


@pytest.mark.parametrize(
    "explorer", [KVRouting(window_blocks=2), StartNoise(window_blocks=2)], ids=["routing", "noise"]
)
def test_branches_a_few_at_a_time_are_the_same_branches(pipeline, explorer):
    whole = new_rollout(pipeline, story(8, FORK + 1), explorer, fork=FORK, branches=4)
    for together in (1, 2, 4):
        parts = new_rollout(
            pipeline, story(8, FORK + 1), explorer, fork=FORK, branches=4, together=together
        )
        assert parts.plans == whole.plans
        for a, b in (
            (parts.latents, whole.latents),
            (parts.trajectory.inputs, whole.trajectory.inputs),
            (parts.trajectory.velocities, whole.trajectory.velocities),
            (parts.trajectory.clean, whole.trajectory.clean),
        ):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=0)
