"""Scoring: which clips are cut where, what is decoded, and what the rewards are asked. Blocks of 2
latent frames.

Block 0 shows pixel frames 0 to 4, block b > 0 shows 8 b - 3 to 8 b + 4.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import pytest
import torch
from tiny import BLUE, GEOMETRY, RED, SMALL, Broken, Change, Unmeasured, Warmth, new_rollout, story

from kvpo.common.timing import Phases
from kvpo.generators.geometry import pixel_span
from kvpo.method.routing import KVRouting
from kvpo.method.score import (
    Clip,
    ScoreConfig,
    decode,
    global_clips,
    group_clips,
    horizon,
    local_clips,
    pixel_diversity,
    score,
)
from kvpo.rewards.registry import RewardEntry
from kvpo.rewards.scorer import Scorer
from kvpo.types import Window

CONFIG = ScoreConfig(clip_frames=8, min_frames=4)


@pytest.mark.parametrize(
    ("blocks", "frames"),
    [
        ((0, 1), (0, 5)),
        ((0, 3), (0, 21)),
        ((1, 2), (5, 13)),
        ((4, 6), (29, 45)),
        ((2, 2), (13, 13)),
    ],
)
def test_pixel_span(blocks, frames):
    assert pixel_span(blocks, GEOMETRY) == frames


@pytest.mark.parametrize(
    ("script", "window", "config", "clips"),
    [
        (story(8), (4, 2), CONFIG, [(0, 29, 45)]),
        (story(8, 4), (4, 2), CONFIG, [(1, 29, 45)]),
        (story(8, 5), (4, 2), CONFIG, [(0, 29, 37), (1, 37, 45)]),
        (story(8, 2, 5), (4, 3), CONFIG, [(1, 29, 37), (2, 37, 53)]),
        (story(8, 5), (4, 3), ScoreConfig(20, 10), [(1, 37, 53)]),
        (story(8, 5, 6), (4, 2), ScoreConfig(20, 10), [(1, 29, 45)]),
        (story(8, 1, 6), (4, 2), ScoreConfig(99, 99), [(1, 29, 45)]),
    ],
    ids=[
        "one prompt",
        "switch at the fork",
        "switch inside",
        "earlier ones do not count",
        "short piece left out",
        "all pieces short: one clip, last prompt",
        "short window",
    ],
)
def test_local_clips(script, window, config, clips):
    assert local_clips(script, Window(*window), GEOMETRY, config) == [Clip(*c) for c in clips]


@pytest.mark.parametrize(
    ("script", "fork", "config", "clips"),
    [
        (story(8), 4, CONFIG, [(0, 41, 49)]),
        (story(8), 4, ScoreConfig(100, 4), [(0, 29, 61)]),
        (story(8, 2), 4, CONFIG, [(1, 41, 49)]),
        (story(8, 2, 6), 4, CONFIG, [(1, 33, 41), (2, 49, 57)]),
        (story(8, 4, 7), 4, CONFIG, [(1, 37, 45), (2, 53, 61)]),
        (story(8, 4, 7), 4, ScoreConfig(16, 9), [(1, 33, 49)]),
        (story(8, 6), 4, ScoreConfig(99, 99), []),
    ],
    ids=[
        "middle",
        "whole stretch",
        "segment before the fork",
        "cut at the fork",
        "switch at the fork",
        "short segment left out",
        "all too short",
    ],
)
def test_global_clips(script, fork, config, clips):
    """The middle of what each segment has from the fork on; a segment wholly before it is equal
    in all rows, and not asked about."""
    assert global_clips(script, Window(fork, 2), GEOMETRY, config) == [Clip(*c) for c in clips]


@pytest.mark.parametrize(
    ("script", "config", "block"),
    [
        (story(8), CONFIG, 7),
        (story(8), ScoreConfig(100, 4), 8),
        (story(8, 2, 6), CONFIG, 8),
        (story(8, 7), ScoreConfig(9, 9), 6),
    ],
    ids=["frame 49 ends block 6", "whole stretch", "last segment", "the window at least"],
)
def test_horizon(script, config, block):
    assert horizon(script, Window(4, 2), GEOMETRY, config) == block


@pytest.mark.parametrize(
    ("segments", "global_", "block"),
    [(None, [(1, 33, 41), (2, 49, 57)], 8), (1, [(1, 33, 41)], 6), (0, [(1, 29, 45)], 6)],
)
def test_fewer_segments_need_a_shorter_video(segments, global_, block):
    """The fork's own segment is the first; without any the local signal stands for both."""
    script, window, config = story(8, 2, 6), Window(4, 2), ScoreConfig(8, 4, segments)
    assert group_clips(script, window, GEOMETRY, config) == {
        "local": [Clip(1, 29, 45)],
        "global": [Clip(*c) for c in global_],
    }
    assert horizon(script, window, GEOMETRY, config) == block
    assert global_clips(script, window, GEOMETRY, config) == [Clip(1, 33, 41), Clip(2, 49, 57)], (
        "an evaluation looks at all"
    )


def test_negative_segments_are_refused():
    with pytest.raises(ValueError, match="segments = -1"):
        ScoreConfig(segments=-1)


def test_rewards_are_the_same_without_what_lies_beyond_the_horizon(pipeline):
    script = story(9)

    def seen(window):
        return horizon(script, window, pipeline.geometry, CONFIG)

    whole, cut = (
        new_rollout(pipeline, script, KVRouting(window_blocks=2), fork=4, horizon=h)
        for h in (None, seen)
    )
    assert cut.latents.shape[1] < whole.latents.shape[1]
    a, b = (score(pipeline, r, [Warmth()], CONFIG, Phases())[0] for r in (whole, cut))
    assert torch.equal(a.local, b.local) and torch.equal(a.global_, b.global_)


@dataclass
class Listening(Warmth):
    asked: list = field(default_factory=list)

    def score(self, batch):
        self.asked.append(batch)
        return super().score(batch)


def test_rewards_see_the_clips_with_their_prompts(pipeline):
    reward, script = Listening(), story(8, 2, 6)
    rollout = new_rollout(pipeline, script, KVRouting(window_blocks=2), fork=4)
    table, pixels = score(pipeline, rollout, [reward], CONFIG, Phases())
    asked = {(b.prompts[0], b.length): b for b in reward.asked}
    assert set(asked) == {(BLUE, 16), (BLUE, 8), (SMALL, 8)}, (
        "the first segment is over before the fork"
    )
    assert all(
        len(b) == 4 and set(b.prompts) == {b.prompts[0]} and b.fps == 16 for b in reward.asked
    )
    assert asked[BLUE, 8].history == ((RED,),) * 4 and asked[SMALL, 8].history == ((RED, BLUE),) * 4
    assert (
        torch.equal(asked[BLUE, 16].frames, pixels[:, :16])
        and torch.equal(asked[BLUE, 8].frames, pixels[:, 4:12])
        and torch.equal(asked[SMALL, 8].frames, pixels[:, 20:28])
    )
    by_hand = [
        (pixels[:, a:b, 0].float().mean(dim=(1, 2, 3)) / 255.0).double()
        for a, b in ((8, 16), (8, 12), (24, 28))
    ]
    torch.testing.assert_close(table.local[0], by_hand[0], atol=1e-6, rtol=0)
    torch.testing.assert_close(table.global_[0], (by_hand[1] + by_hand[2]) / 2, atol=1e-6, rtol=0)
    assert (
        table.components == ("Warmth",) and table.local.dtype == torch.float64 and table.valid.all()
    )


def test_every_reward_has_its_row(pipeline):
    rollout = new_rollout(pipeline, story(6), fork=4)
    together, pixels = score(pipeline, rollout, [Warmth(), Change()], CONFIG, Phases())
    for k, reward in enumerate((Warmth(), Change())):
        alone, _ = score(pipeline, rollout, [reward], CONFIG, Phases())
        assert torch.equal(alone.local[0], together.local[k]) and torch.equal(
            alone.global_[0], together.global_[k]
        )
    assert pixels.shape == (4, 16, 3, 32, 32)


def test_without_a_global_clip_the_window_serves_as_one(pipeline):
    rollout = new_rollout(pipeline, story(6), fork=4)
    table, _ = score(pipeline, rollout, [Warmth()], ScoreConfig(99, 99), Phases())
    assert torch.equal(table.local, table.global_)


def test_clips_are_decoded_as_the_middle_of_a_video(pipeline):
    """Not as if the fork's latents started one: the causal VAE goes on from its state at the
    fork."""
    rollout = new_rollout(pipeline, story(8), fork=4)
    for row in (0, 3):
        video = pipeline.decoder()(torch.cat((rollout.prefix, rollout.latents[row]))[None])[0]
        got = decode(pipeline, rollout, 32)[row]
        assert got.shape == video[29:].shape
        assert (got.int() - video[29:].int()).abs().max() <= 1
    assert torch.equal(decode(pipeline, rollout, 13), decode(pipeline, rollout, 32)[:, :16]), (
        "only as many latent frames as are asked for"
    )


def test_nan_called_valid_is_refused(pipeline):
    rollout = new_rollout(pipeline, story(6), fork=4)
    with pytest.raises(ValueError, match="reward 'Warmth': clip 0 = nan, .* but marked valid"):
        score(pipeline, rollout, [Scorer(Broken(), RewardEntry("tiny:Broken"))], CONFIG, Phases())


def test_what_can_not_be_measured_is_invalid(pipeline):
    table, _ = score(
        pipeline, new_rollout(pipeline, story(6), fork=4), [Unmeasured()], CONFIG, Phases()
    )
    assert not table.valid.any() and table.local.isnan().all()


def test_pixel_diversity_by_hand():
    """Rows of two pixels: squared distances 1 + 0, 1 + 1, 0 + 1 over 2 pixels, mean over the 3
    pairs."""
    rows = torch.tensor([[0, 0], [255, 0], [255, 255]], dtype=torch.uint8).view(3, 1, 1, 1, 2)
    assert pixel_diversity(rows) == pytest.approx((0.5 + 1.0 + 0.5) / 3)
    assert pixel_diversity(rows[:1].expand(4, -1, -1, -1, -1)) == pytest.approx(0.0, abs=1e-6)


def test_pixel_diversity_of_almost_equal_bright_rows():
    """One pixel of many, off by one: the difference must not drown in the rounding of sums of
    squares."""
    rows = torch.full((4, 16, 3, 32, 32), 250, dtype=torch.uint8)
    rows[0, 0, 0, 0, 0] = 251
    n = 16 * 3 * 32 * 32
    assert pixel_diversity(rows) == pytest.approx(3 / 6 * (1 / 255) ** 2 / n, rel=1e-3)


@pytest.mark.parametrize(("clip", "least"), [(8, 0), (8, 9)])
def test_bad_lengths_are_refused(clip, least):
    with pytest.raises(
        ValueError,
        match=f"score.min_frames = {least} must lie between 1 and score.clip_frames = {clip}",
    ):
        ScoreConfig(clip, least)


def test_phases_are_timed(pipeline):
    phases = Phases()
    score(pipeline, new_rollout(pipeline, story(6), fork=4), [Warmth()], CONFIG, phases)
    taken = phases.take()
    assert set(taken) == {"time/decode", "time/reward"} and all(
        math.isfinite(s) and s > 0 for s in taken.values()
    )


def test_rows_decoded_a_few_at_a_time(pipeline):
    """Convolutions over a batch may be summed in another order: a pixel on the edge of rounding
    may differ by 1."""
    rollout = new_rollout(pipeline, story(6, 3), KVRouting(window_blocks=2), fork=3)
    whole = decode(pipeline, rollout, 9)
    for together in (1, 3):
        assert (decode(pipeline, rollout, 9, together).int() - whole.int()).abs().max() <= 1
    with pytest.raises(ValueError, match="score.together = -1"):
        ScoreConfig(together=-1)
