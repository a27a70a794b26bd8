"""Groups of independent videos: no prefix, all noise a branch's own, the whole video explored."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_rollout import plain
from tiny import embed, new_pipeline, new_rollout, story, with_geometry

from kvpo.config import from_dict
from kvpo.generators.sampler import SAMPLERS, NamedNoise, Stream
from kvpo.method.best_of import BestOf
from kvpo.method.energies import VelocityEnergy
from kvpo.method.replay import CONTEXTS, Replay
from kvpo.method.score import decode

WHOLE = BestOf().of(6)
SCRIPT = story(6, 3)


@pytest.fixture(scope="module")
def pipeline():
    return new_pipeline()


@pytest.fixture(scope="module")
def rollout(pipeline):
    return new_rollout(pipeline, SCRIPT, WHOLE, fork=0)


def test_branches_are_videos_of_their_own(pipeline, rollout):
    """Each is the stream of its own noise from the first block on; the anchor that of the group."""
    torch.testing.assert_close(rollout.latents[-1:], plain(pipeline, SCRIPT), rtol=1e-4, atol=1e-5)
    for g in range(3):
        noise = NamedNoise(pipeline.latent_shape(2), 0, ("group", "noise", "branch", g))
        stream = Stream(
            pipeline.generator,
            pipeline.geometry,
            SAMPLERS["renoise"],
            [SCRIPT],
            embed(pipeline, SCRIPT),
            noise,
            pipeline.new_cache(40),
        )
        alone = torch.cat([stream.advance() for _ in range(6)], dim=1)
        torch.testing.assert_close(rollout.latents[g : g + 1], alone, rtol=1e-4, atol=1e-5)
    assert len(rollout.prefix) == 0 and rollout.trajectory.clean.shape[:2] == (4, 6)


def test_the_policy_that_made_them_explains_them(pipeline, rollout):
    """Replay from an empty past over the whole video, a prompt switch in it, gives the recorded
    velocities: energies are 0, and an energy objective would learn nothing."""
    texts = embed(pipeline, SCRIPT)
    members = list(range(4))
    replay = Replay(pipeline, rollout, texts, CONTEXTS["branch"], VelocityEnergy(), members)
    assert float(replay.energies().max()) < 1e-8
    other = replace(
        rollout, trajectory=replace(rollout.trajectory, clean=rollout.trajectory.clean + 0.1)
    )
    moved = Replay(pipeline, other, texts, CONTEXTS["branch"], VelocityEnergy(), members)
    assert float(moved.energies().min()) > 1e-6


@pytest.mark.parametrize("frames", [1, 8, 9])
def test_pixels_are_those_of_the_video_from_its_beginning(pipeline, rollout, frames):
    """A video's first latent frame gives one pixel frame, so eight take three latent frames."""
    pixels = decode(pipeline, rollout, frames)
    assert pixels.shape[1] >= frames
    whole = pipeline.decoder()(rollout.latents[:, :4])
    assert (pixels.int() - whole[:, : pixels.shape[1]].int()).abs().max() <= 1


def test_the_window_is_the_video_unless_it_is_named():
    config = from_dict({"explorer": "best_of", "objective": {"kind": "nft"}, "data": {"blocks": 9}})
    assert config.exploring == BestOf(9) and config.best_of == BestOf()
    named = from_dict(
        {"explorer": "best_of", "objective": {"kind": "nft"}, "best_of": {"window_blocks": 4}}
    )
    assert named.exploring == BestOf(4)


def test_what_can_not_be_a_whole_video_is_refused(pipeline):
    with pytest.raises(ValueError, match="window_blocks = 7, but the video has 6 blocks"):
        new_rollout(pipeline, SCRIPT, BestOf(7), fork=0)
    other = with_geometry(pipeline, first_steps=2)
    with pytest.raises(ValueError, match="in 2 steps and others in 4; use explorer start_noise"):
        new_rollout(other, SCRIPT, WHOLE, fork=0)
    with pytest.raises(ValueError, match="block 1 can not be a fork"):
        new_rollout(pipeline, SCRIPT, WHOLE, fork=1)
