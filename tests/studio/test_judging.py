"""Rewards beside branches: those of the frames that the page got, the best one marked, and none."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from tabs import FORK, tab
from tiny import RED, Change, Unmeasured, Warmth

from kvpo.config import load_config, recipe_path
from kvpo.method.advantages import Advantages
from kvpo.rewards.base import VideoBatch
from kvpo.studio.judging import Judging, load_judging

RULE = Advantages(weights={"Warmth": 1.0, "Change": 0.25})


def forked(client):
    """What a tab gets of a fork, up to the answer to a question asked behind it."""
    with tab(client) as opened:
        opened.do("begin", prompt=RED, seed=3)
        opened.play_to(3)
        opened.do(**FORK)
        opened.until("forked")
        opened.do("status")
        opened.until("status")
        at = [message["is"] for message in opened.got].index("forked")
        (branches,) = [block["pixels"] for block in opened.blocks if block["kind"] == "branch"]
        return opened.got[at + 1 : -1], branches


def test_the_scores_are_those_of_the_frames_that_were_sent(client, studio):
    studio.judging = Judging([Warmth(), Change()], RULE)
    (scored,), branches = forked(client)
    batch = VideoBatch(torch.stack(branches), 16, (RED,) * 3)
    warm, change = (reward.score(batch).scores.double() for reward in (Warmth(), Change()))
    assert scored["names"] == ["Warmth", "Change"]
    assert scored["rows"] == torch.stack((warm, change), dim=1).tolist()
    above = sum(w * (r - r[-1]) / r.std() for w, r in ((1.0, warm), (0.25, change)))
    assert scored["best"] == above.argmax() and len(set(above.tolist())) == 3


def test_without_rewards_nothing_is_said(client):
    assert forked(client)[0] == []


def test_rows_that_can_not_be_compared_have_no_best(client, studio):
    """A number that was not measured is none, and never a 0, which would be a verdict."""
    studio.judging = Judging([Unmeasured()], Advantages())
    assert forked(client)[0] == [
        {"is": "scored", "names": ["Unmeasured"], "rows": [[None]] * 3, "best": None}
    ]


def test_a_reward_that_fails_leaves_the_fork(client, studio):
    class Failing(Warmth):
        def score(self, batch):
            raise ValueError("no such clip")

    studio.judging = Judging([Failing()], Advantages())
    (note,), branches = forked(client)
    assert note == {"is": "note", "message": "the branches have no rewards: no such clip"}
    assert len(branches) == 3


@pytest.mark.parametrize("scores", [[0.5, 0.5, 0.5], [0.2, 0.3, 0.9]])
def test_the_anchor_may_be_the_best_and_equal_rows_have_none(scores):
    found = Judging([], Advantages())._best(("a",), torch.tensor([scores]).double())
    assert found == (None if scores[0] == scores[2] else 2)


def test_a_recipe_without_trained_rewards_shows_none():
    mini = load_config(recipe_path("mini"))
    assert [r.spec.name for r in load_judging(mini, torch.device("cpu")).rewards] == [
        "VQ",
        "MQ",
        "TA",
    ]
    others = tuple(mini.rewards_of("eval"))
    assert load_judging(dataclasses.replace(mini, rewards=others), torch.device("cpu")) is None
