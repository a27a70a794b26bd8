"""The records: a script's segments, windows, plans, and what each refuses."""

from __future__ import annotations

import pytest
import torch

from kvpo.types import BranchPlan, Rollout, Script, Trajectory, Window

STORY = Script("cat", ("a cat sleeps", "it wakes", "it leaves"), (0, 13, 25), 49)


def test_segments_cover_the_video_once():
    assert [STORY.span(i) for i in range(3)] == [(0, 13), (13, 25), (25, 49)]
    for i in range(3):
        first, stop = STORY.span(i)
        assert {STORY.segment(block) for block in range(first, stop)} == {i}
        assert STORY.text(first) == STORY.text(stop - 1) == STORY.texts[i]


@pytest.mark.parametrize("block", (-1, 49))
def test_a_block_outside_the_video_is_refused(block):
    with pytest.raises(ValueError, match=f"'cat' has no block {block}; give one from 0 to 48"):
        STORY.segment(block)


@pytest.mark.parametrize(
    ("texts", "starts", "blocks", "message"),
    [
        ((), (), 4, "0 prompts"),
        (("a", "b"), (0,), 4, "2 prompts but 1 start blocks; give one start per prompt"),
        (("a", "b"), (1, 2), 4, r"\(1, 2\) must begin at 0"),
        (("a", "b", "c"), (0, 2, 2), 4, "must begin at 0 and increase"),
        (("a", "b"), (0, 4), 4, "the video has 4 blocks; lengthen the video or drop segments"),
        (("a",), (0,), 0, "the video has 0 blocks"),
    ],
)
def test_scripts_that_cannot_be_played_are_refused(texts, starts, blocks, message):
    with pytest.raises(ValueError, match=message):
        Script("s", texts, starts, blocks)


def test_window():
    window = Window(fork=7, blocks=3)
    assert window.stop == 10
    assert [block for block in range(20) if block in window] == [7, 8, 9]


def test_the_anchor_is_not_counted_as_a_branch():
    plans = (BranchPlan((3,)), BranchPlan((4,)), BranchPlan())
    empty = torch.empty(0)
    rollout = Rollout(
        STORY, Window(7, 3), plans, Trajectory(empty, empty, empty), empty, empty, cache=None
    )
    assert rollout.num_branches == 2


def test_records_are_frozen():
    with pytest.raises(AttributeError):
        STORY.id = "dog"


def test_a_report_says_what_sets_branches_apart():
    """Groups of `renoise` once differed, by their report, in "which past frames they read"."""
    words = [
        BranchPlan(**plan).differ
        for plan in (
            {"frames": (1, 2)},
            {"noise_mix": 0.5},
            {"renoise_from": 1},
            {"noise_mix": 1.0, "renoise_from": 0},
            {"step_noise": (0.3, 0.0)},
            {"prompt_shift": -0.2},
        )
    ]
    assert len(set(words)) == 6 and "past frames" in words[0] and "prompt" in words[-1]
