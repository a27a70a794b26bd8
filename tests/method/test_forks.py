"""Several groups on one prefix are the groups that each would be alone on that story and noise."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from test_align import settings
from test_prefix import HISTORIES, pages
from tiny import embed, new_pipeline, story, with_geometry

from kvpo.common.progress import Progress
from kvpo.common.rng import stream
from kvpo.common.timing import Phases
from kvpo.config import from_dict
from kvpo.generators.sampler import SAMPLERS
from kvpo.method.forks import spread_forks
from kvpo.method.rollout import roll_out_branches, start_groups
from kvpo.method.routing import KVRouting
from kvpo.method.settings import RolloutConfig
from kvpo.train import Alignment

EXPLORER, CONFIG = KVRouting(window_blocks=2), RolloutConfig(branches=3, cache_frames=9)
SCRIPTS = (story(8, 3, id="a"), story(8, 5, id="b"))
GROUPS = ((0, 3), (1, 4), (0, 5), (0, 3))
"""Story and fork of each: story a three times, twice at one block, which is a switch."""
HELD = (lambda fork: (1,), lambda fork: (), lambda fork: (0, 2), lambda fork: ())


def begun(pipeline, which: list[int]):
    return start_groups(
        pipeline,
        SAMPLERS["renoise"],
        EXPLORER,
        CONFIG,
        [SCRIPTS[GROUPS[i][0]] for i in which],
        embed(pipeline, *SCRIPTS),
        0,
        [("train", 0, i) for i in which],
        [HELD[i] for i in which],
        [GROUPS[i][1] for i in which],
        [("story", GROUPS[i][0]) for i in which],
    )


def rolled(pipeline, start, i: int):
    return roll_out_branches(pipeline, EXPLORER, CONFIG, start, 0, ("train", 0, i), Phases())


@pytest.mark.parametrize("history", ["window", "bank"])
def test_groups_on_one_prefix_are_the_groups_alone(history):
    """Pages, held inputs, plans, and every latent of the branches; whichever goes on first."""
    pipeline, close = with_geometry(new_pipeline(), **HISTORIES[history]), {"atol": 1e-4, "rtol": 0}
    together = begun(pipeline, [0, 1, 2, 3])
    for i in (2, 0, 3, 1):
        (alone,) = begun(pipeline, [i])
        assert together[i].past.cache.resident == alone.past.cache.resident
        for a, b in zip(pages(together[i]), pages(alone), strict=True):
            torch.testing.assert_close(a, b, **close)
        assert together[i].held.keys() == alone.held.keys()
        for block, inputs in alone.held.items():
            torch.testing.assert_close(together[i].held[block], inputs, **close)
        ours, theirs = rolled(pipeline, together[i], i), rolled(pipeline, alone, i)
        assert ours.plans == theirs.plans and ours.window == theirs.window
        torch.testing.assert_close(ours.latents, theirs.latents, **close)
        a, b = ours.decoder(), theirs.decoder()
        assert (a(ours.latents[:1]).int() - b(theirs.latents[:1]).int()).abs().max() <= 1


def test_a_prefix_is_generated_once():
    """Forks 3, 5 and 3 of one story cost five blocks of five passes, not eleven, and what its
    switch encodes again."""
    pipeline = new_pipeline()
    before = pipeline.generator.calls
    begun(pipeline, [0, 2, 3])
    switches = 3  # a copy before it each for the two that fork there, and the prefix's own
    assert pipeline.generator.calls - before == 5 * 5 + switches


def test_forks_are_spread_and_every_block_is_as_likely():
    """Seven blocks, three groups: distinct, ascending, about a third of the way apart."""
    eligible, seen = list(range(3, 10)), Counter()
    for i in range(700):
        forks = spread_forks(eligible, 3, stream(0, "forks", i))
        assert forks == sorted(set(forks)) and 2 <= forks[1] - forks[0] <= 3
        seen.update(forks)
    assert set(seen) == set(eligible) and all(abs(n - 300) < 75 for n in seen.values())
    assert spread_forks([4, 5], 2, stream(0, "x")) == [4, 5]


def test_a_step_with_several_forks_of_a_story(folder, tmp_path):
    """Four groups of two stories: groups of one story have its prompts, and other forks; in fewer
    calls than four stories take."""
    calls = {}
    for forks in (1, 2):
        rollout = {"branches": 3, "cache_frames": 12, "forks": forks}
        data = {"blocks": 9, "segments": 1, "memory": 0.0}
        config = from_dict(settings(folder, groups=4, rollout=rollout, data=data))
        run = Alignment(config, tmp_path, Progress())
        if forks == 2:
            assert list(run._side_by_side([0, 1, 2, 3])) == [[0, 2], [1, 3]]
            first, second = run.parts.starts(0, [0, 2])
            assert first.script == second.script and first.window != second.window
            assert first.noise == second.noise
        assert run.step(0)["optim/step_norm"] > 0.0
        calls[forks] = run.step(1)["calls/generator"]
    assert calls[2] < calls[1]


@pytest.mark.parametrize("forks", [1, 2])
def test_stories_of_a_step_fork_at_the_same_blocks(folder, tmp_path, forks):
    """Two processes with a group each waited for the one that forked early, a sixth of the time."""
    rollout = {"branches": 3, "cache_frames": 12, "forks": forks, "alike_forks": True}
    data = {"blocks": 9, "segments": 1, "memory": 0.0}
    config = from_dict(settings(folder, groups=2 * forks, rollout=rollout, data=data))
    run, seen = Alignment(config, tmp_path, Progress()), []
    for step in range(4):
        begun = run.parts.starts(step, list(range(2 * forks)))
        at = [start.window.fork for start in begun]
        assert at[0::2] == at[1::2] and len(set(at)) == forks
        assert begun[0].script != begun[1].script
        seen.append(tuple(at))
    assert len(set(seen)) > 1


def test_bad_settings_are_refused(folder):
    with pytest.raises(ValueError, match="groups = 3 is no multiple of rollout.forks = 2"):
        from_dict(settings(folder, groups=3, rollout={"branches": 3, "forks": 2}))
    with pytest.raises(ValueError, match="rollout.forks = 0 must be 1 or more"):
        RolloutConfig(forks=0)


def test_more_forks_than_blocks_are_refused(folder, tmp_path):
    rollout = {"branches": 3, "cache_frames": 12, "forks": 8}
    config = from_dict(settings(folder, groups=8, rollout=rollout, data={"blocks": 5}))
    with pytest.raises(ValueError, match="rollout.forks = 8, but a video of 5 blocks can be fork"):
        Alignment(config, tmp_path, Progress())
