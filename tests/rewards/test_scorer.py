"""Rewards by name, and a recipe's rewards at work: checked, remembered, in calls that fit."""

from __future__ import annotations

import itertools
import sys
from dataclasses import dataclass, field, replace
from importlib.metadata import EntryPoint
from types import ModuleType
from typing import Any, ClassVar

import pytest
import torch

from kvpo.rewards import registry
from kvpo.rewards.base import RewardSpec, VideoBatch
from kvpo.rewards.measured import (
    FrameScorer,
    Measured,
    Pretrained,
    check_frame_options,
    require,
    sampled,
)
from kvpo.rewards.registry import RewardEntry, check_held_out, make_reward
from kvpo.rewards.scorer import Scorer, load_rewards


def clips(*values: int, frames: int = 4, side: int = 8) -> VideoBatch:
    """One clip of plain colour per value."""
    pixels = torch.stack(
        [torch.full((frames, 3, side, side), v, dtype=torch.uint8) for v in values]
    )
    return VideoBatch(pixels, 16.0, tuple("a red circle" for _ in values))


@dataclass
class Brightness(Measured):
    """Mean brightness; remembers how it was asked."""

    gain: float = 1.0
    spec: RewardSpec = RewardSpec("brightness", "toy", (0.0, 255.0), needs_prompt=False)
    asked: list[int] = field(default_factory=list, init=False)

    def measure(self, batch: VideoBatch):
        self.asked.append(len(batch))
        scores = batch.frames.float().mean(dim=(1, 2, 3, 4)) * self.gain
        return torch.where(scores == 255, float("nan"), scores), {
            "first": batch.frames[:, 0].float().mean(dim=(1, 2, 3))
        }


def mean_red(batch: VideoBatch, power: float = 1.0):
    return batch.frames[:, :, 0].float().mean(dim=(1, 2, 3)) ** power


def no_batch():
    return 0.0


def broken(batch: VideoBatch):
    raise KeyError("weights")


def too_few(batch: VideoBatch):
    return torch.zeros(1)


@pytest.fixture
def mine(monkeypatch):
    """This file's rewards, as a module that a recipe can name."""
    module = ModuleType("mine")
    for thing in (Brightness, mean_red, no_batch, broken, too_few):
        setattr(module, thing.__name__, thing)
    module.number = 3
    module.Empty = type("Empty", (), {})
    monkeypatch.setitem(sys.modules, "mine", module)


# --- By name ---


@pytest.mark.parametrize(
    ("name", "params", "reason"),
    [
        ("world_vw", {}, "reward 'world_vw' is unknown; did you mean world_v"),
        ("nowhere:Thing", {}, "reward 'nowhere:Thing' can not be imported"),
        ("mine:Cold", {}, "module 'mine' has no 'Cold'"),
        ("mine:number", {}, "is a int; it must be a class, a function, or an object"),
        ("mine:Empty", {}, "has no spec, load, score, offload; derive it from"),
        ("mine:no_batch", {}, r"write it as def f\(batch, ...\)"),
        ("mine:mean_red", {"powr": 2}, "can not be called with a VideoBatch and params"),
        ("mine:Brightness", {"gian": 2}, "has no parameter 'gian'; did you mean gain"),
        ("mine:Brightness", {"spec": 2}, "has no parameter 'spec'"),
        ("mine:Brightness", {"asked": 2}, "has no parameter 'asked'"),
    ],
)
def test_what_can_not_be_a_reward(mine, name, params, reason):
    with pytest.raises(ValueError, match=reason) as caught:
        make_reward(name, params)
    assert "\n" not in str(caught.value)


def test_parameters_reach_the_class_and_the_function(mine):
    batch = clips(3, 100)
    assert make_reward("mine:Brightness", {"gain": 2.0}).score(batch).scores.tolist() == [
        6.0,
        200.0,
    ]
    squared = make_reward("mine:mean_red", {"power": 2.0})
    assert (
        squared.score(batch).scores.tolist() == [9.0, 10000.0] and squared.spec.name == "mean_red"
    )


def test_an_installed_package_offers_rewards_by_entry_point(mine, monkeypatch):
    point = EntryPoint("glow", "mine:Brightness", registry.GROUP)
    monkeypatch.setattr(
        registry, "entry_points", lambda group: [point] if group == registry.GROUP else []
    )
    assert (
        isinstance(make_reward("glow"), Brightness)
        and registry.known()["glow"] == "mine:Brightness"
    )
    with pytest.raises(ValueError, match="did you mean glow"):
        make_reward("glw")


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"isolation": "http"}, "isolation http and url belong together"),
        ({"url": "http://a:1"}, "belong together"),
        ({"environment": "x"}, "are for isolation: process; set that"),
        ({"devices": "1"}, "are for isolation: process; set that"),
        ({"timeout": 0}, "above 0 seconds"),
    ],
)
def test_entries_that_contradict_themselves(settings, reason):
    with pytest.raises(ValueError, match=reason):
        RewardEntry("world_vq", **settings)


def test_every_shipped_reward_has_its_identity_card():
    """What `kvpo rewards list` says is there without weights, network or optional packages."""
    names = []
    for name in registry.SHIPPED:
        spec = registry.find(name).spec
        names.append(spec.name)
        assert (
            spec.family and spec.looks_at and spec.licence and (spec.extra or not spec.packages)
        ), name
    assert len(set(names)) == len(names)


# --- Held out ---


def test_an_evaluator_of_a_trained_family_is_refused():
    vq = RewardSpec("VQ", "qwen-vl")
    entries = [RewardEntry("a"), RewardEntry("b", role="eval")]
    with pytest.raises(
        ValueError, match="'TA' .role eval. is of family 'qwen-vl' like 'VQ', which is trained on"
    ):
        check_held_out(entries, [vq, RewardSpec("TA", "qwen-vl")])
    check_held_out(entries, [vq, RewardSpec("TA", "clip")])
    check_held_out([entries[0], RewardEntry("b", role="guard")], [vq, RewardSpec("TA", "qwen-vl")])


# --- Frames that are looked at ---


@pytest.mark.parametrize(
    ("length", "fps", "spec", "frames"),
    [
        (36, 16.0, {"fps": 2.0}, 4),  # the trap: four frames of a branch of three blocks
        (36, 16.0, {"fps": 2.0, "min_frames": 8}, 8),
        (48, 16.0, {"fps": 2.0}, 6),
        (81, 16.0, {"fps": 2.0}, 10),
        (96, 16.0, {"fps": 2.0, "max_frames": 5}, 5),
        (36, 16.0, {}, 36),
        (36, 16.0, {"fps": 30.0}, 36),
        (6, 16.0, {"fps": 2.0, "min_frames": 8}, 6),
        (3, 16.0, {"fps": 1.0}, 1),
    ],
)
def test_sampling(length, fps, spec, frames):
    taken = sampled(length, fps, RewardSpec("x", "toy", **spec))
    assert (
        len(taken) == frames
        and taken[0] == 0
        and taken == sorted(set(taken))
        and taken[-1] < length
    )
    steps = {b - a for a, b in itertools.pairwise(taken)}
    assert not steps or max(steps) - min(steps) <= 1


def test_a_scorer_sees_its_own_rate():
    seen = []

    @dataclass
    class Rate(Measured):
        spec: RewardSpec = RewardSpec("rate", "toy", fps=4.0)

        def measure(self, batch):
            seen.append((batch.length, batch.fps, batch.frames[0, :, 0, 0, 0].tolist()))
            return torch.zeros(len(batch)), {}

    pixels = torch.arange(16, dtype=torch.uint8)[None, :, None, None, None].expand(1, 16, 3, 8, 8)
    Rate().score(VideoBatch(pixels, 16.0, ("x",)))
    assert seen == [(4, 4.0, [0, 4, 8, 12])]


# --- At work ---


def test_equal_clips_are_scored_once():
    reward = Brightness()
    scorer = Scorer(reward, RewardEntry("x"))
    first = scorer.score(clips(1, 2, 1))
    again = scorer.score(clips(2, 1, 7))
    assert reward.asked == [2, 1]
    assert (
        first.scores.tolist() == [1, 2, 1]
        and again.scores.tolist() == [2, 1, 7]
        and again.parts["first"].tolist() == [2, 1, 7]
    )


def test_what_is_remembered_depends_on_prompt_history_and_rate():
    reward = Brightness()
    scorer, batch = Scorer(reward, RewardEntry("x")), clips(1)
    for other in (
        batch,
        replace(batch, prompts=("a blue circle",)),
        replace(batch, history=(("before",),)),
        replace(batch, fps=8.0),
        batch,
    ):
        scorer.score(other)
    assert reward.asked == [1, 1, 1, 1]


def test_invalid_stays_invalid_when_remembered():
    scorer = Scorer(Brightness(), RewardEntry("x"))
    for _ in range(2):
        output = scorer.score(clips(255, 3))
        assert output.valid.tolist() == [False, True] and output.scores[0].isnan()


def test_calls_fit_the_pixel_budget_and_say_the_same():
    whole, small = Brightness(), Brightness()
    small.spec = replace(small.spec, max_pixels=2 * 4 * 8 * 8)
    batch = clips(1, 2, 3, 4, 5)
    assert (
        Scorer(small, RewardEntry("x"))
        .score(batch)
        .scores.equal(Scorer(whole, RewardEntry("x")).score(batch).scores)
    )
    assert small.asked == [2, 2, 1] and whole.asked == [5]


def test_rewards_that_share_a_measurement_get_the_batch_itself():
    seen = []

    class Keeps(Brightness):
        def measure(self, batch):
            seen.append(batch)
            return super().measure(batch)

    batch = clips(1, 2)
    Scorer(Keeps(), RewardEntry("x")).score(batch)
    assert seen[0] is batch


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        (
            "mine:broken",
            r"reward 'broken' failed on 2 clips of 4 frames \(.*test_scorer.py:\d+\): KeyError: 'weights'",
        ),
        ("mine:too_few", "returned scores"),
    ],
)
def test_a_reward_that_fails_is_one_line(mine, name, reason):
    (scorer,) = load_rewards([RewardEntry(name)], "cpu")
    with pytest.raises(ValueError, match=reason) as caught:
        scorer.score(clips(1, 2))
    assert "\n" not in str(caught.value)


def test_rewards_of_one_name_are_refused(mine):
    with pytest.raises(ValueError, match="rewards share a name"):
        load_rewards(
            [RewardEntry("mine:Brightness"), RewardEntry("mine:Brightness", params={"gain": 2.0})],
            "cpu",
        )


# --- With a network ---


@dataclass
class Net(FrameScorer):
    stride: int = 1
    reduce: str = "mean"
    spec: RewardSpec = RewardSpec("net", "toy", (0.0, 255.0), needs_prompt=False)
    model: Any = field(init=False, default=None, repr=False)

    def __post_init__(self):
        check_frame_options(self.stride, self.reduce)

    def build(self):
        return torch.nn.Linear(1, 1)

    def score_frames(self, frames, prompts):
        assert len(prompts) == len(frames)
        return frames.float().mean(dim=(1, 2, 3))


def test_frames_become_one_number():
    values = torch.tensor([10, 20, 30, 40, 50, 60, 70, 80, 90, 100], dtype=torch.uint8)
    batch = VideoBatch(values[None, :, None, None, None].expand(1, 10, 3, 4, 4), 16.0, ("x",))
    for reduce, stride, expected in (
        ("mean", 1, 55.0),
        ("top", 1, 90.0),
        ("worst", 1, 20.0),
        ("mean", 3, 55.0),
        ("top", 5, 60.0),
    ):
        reward = Net(stride=stride, reduce=reduce)
        reward.load("cpu")
        assert reward.score(batch).scores.item() == expected, (reduce, stride)


def test_frame_options_are_checked():
    for options, reason in (
        ({"stride": 0}, "stride = 0 must be 1 or more"),
        ({"reduce": "median"}, "reduce = 'median' is unknown"),
    ):
        with pytest.raises(ValueError, match=reason):
            Net(**options)


def test_evaluators_leave_the_device_between_uses():
    class Moves(Net):
        moves: ClassVar[list] = []

        def load(self, device):
            self.moves.append(str(device))

        def offload(self):
            self.moves.append("away")

    for entry, expected in (
        (RewardEntry("x"), ["dev"]),
        (RewardEntry("x", role="eval"), ["dev", "away", "dev", "away"]),
        (RewardEntry("x", offload=True), ["dev", "away", "dev", "away"]),
    ):
        Moves.moves.clear()
        scorer = Scorer(Moves(), entry)
        scorer.load("dev")
        scorer.score(clips(1))
        assert Moves.moves == expected


def test_before_load_and_without_its_package():
    @dataclass
    class Needs(Pretrained):
        spec: RewardSpec = RewardSpec("needs", "toy", packages=("no_such_module",), extra="offline")
        model: Any = field(init=False, default=None, repr=False)

    with pytest.raises(
        ValueError, match=r"reward 'needs' needs no_such_module: pip install 'kvpo\[offline\]'"
    ):
        Needs().load("cpu")
    with pytest.raises(RuntimeError, match="needs is not loaded"):
        _ = Needs().device
    require(RewardSpec("fine", "toy", packages=("torch",)))
