"""How much a group weighs in a step: one standard deviation for all its groups, a clip of the
sum, groups without rewards."""

from __future__ import annotations

import math

import pytest
import torch
from test_advantages import table
from test_align import settings
from test_config import refused
from test_update import Run, advantages
from tiny import Warmth

from kvpo.common.progress import Progress
from kvpo.config import from_dict
from kvpo.method.advantages import Advantages, Unmeasurable, measurable
from kvpo.method.batch_spread import spread_of, variances
from kvpo.method.update import OptimizerConfig
from kvpo.rewards.base import RewardOutput
from kvpo.train import Alignment

WIDE = table([[3.0, 1.0, 2.0]], [[6.0, 2.0, 4.0]])
NARROW = table([[2.2, 1.8, 2.0]], [[4.0, 4.0, 4.0]])
"""Spreads 1 and 0.2 locally, 2 and 0 globally."""


# --- One standard deviation ---


def test_pooled_by_hand():
    """sqrt((1 + 0.04) / 2) and sqrt((4 + 0) / 2); levels of groups do not enter."""
    spread = spread_of([{0: variances(WIDE)}, {1: variances(NARROW)}])
    assert spread.local.tolist() == pytest.approx(
        [math.sqrt(0.52)]
    ) and spread.global_.tolist() == pytest.approx([math.sqrt(2.0)])
    assert spread.metrics(("a",)) == pytest.approx(
        {
            "advantage/step_std/local/a": math.sqrt(0.52),
            "advantage/step_std/global/a": math.sqrt(2.0),
        }
    )
    above = table([[103.0, 101.0, 102.0]])
    assert variances(above)[0] == variances(WIDE)[0]


def test_a_group_counts_by_its_spread():
    """Divided by its own, both groups have advantages +1 and -1; divided by the step's, five
    times as large where branches differ five times as much."""
    rule = Advantages(global_=0.0, std="step")
    spread = spread_of([{0: variances(WIDE), 1: variances(NARROW)}])
    wide, narrow = (rule(t, spread).values for t in (WIDE, NARROW))
    assert wide.tolist() == pytest.approx([1 / math.sqrt(0.52), -1 / math.sqrt(0.52)])
    torch.testing.assert_close(wide, 5 * narrow)
    alone = [Advantages(global_=0.0)(t).values.tolist() for t in (WIDE, NARROW)]
    assert alone[0] == pytest.approx(alone[1]) == [1.0, -1.0]


def test_groups_of_one_spread_are_as_by_themselves():
    tables = [table([[1.0, 4.0, 2.0]]), table([[5.0, 2.0, 4.0]])]
    spread = spread_of([{i: variances(t) for i, t in enumerate(tables)}])
    for t in tables:
        torch.testing.assert_close(Advantages(std="step")(t, spread).values, Advantages()(t).values)


def test_the_order_of_the_ranks_changes_no_bit():
    groups = {i: torch.rand(6, dtype=torch.float64) for i in range(7)}
    one = spread_of([groups])
    for world in (2, 3):
        parts = [{i: groups[i] for i in range(rank, 7, world)} for rank in reversed(range(world))]
        other = spread_of(parts)
        assert torch.equal(one.local, other.local) and torch.equal(one.global_, other.global_)


def test_rows_without_rewards_do_not_count():
    holes = table([[3.0, float("nan"), 1.0, 2.0]], valid=[True, False, True, True])
    assert variances(holes)[0] == variances(WIDE)[0]
    spread = spread_of([{0: variances(holes)}])
    assert Advantages(std="step")(holes, spread).values.tolist() == [1.0, 0.0, -1.0]
    assert spread_of([{}, {}]) is None


def test_a_component_without_spread_in_the_step_says_nothing():
    flat = table([[2.0, 2.0 + 1e-9, 2.0]])
    assert not Advantages(std="step")(flat, spread_of([{0: variances(flat)}])).values.any()


# --- The clip ---


def test_a_step_s_clip_leaves_the_groups_their_sizes():
    """A group with ten times the gradient weighs ten times as much; the sum is bounded all the
    same."""
    whole = Run()
    whole.accumulate()
    one = whole.gradient()
    run = Run(groups=2, optimizer=OptimizerConfig(clip=1e-4, clip_of="step"))
    first, second = run.accumulate().metrics, run.accumulate(advantages(10.0, -4.0, -6.0)).metrics
    assert (
        second["optim/grad_norm"] == pytest.approx(10 * first["optim/grad_norm"], rel=1e-4)
        and "optim/grad_clipped" not in first
    )
    torch.testing.assert_close(
        torch.cat([p.grad.flatten() for p in run.policy.parameters]),
        5.5 * one,
        rtol=1e-3,
        atol=1e-7,
    )
    seen = {}
    run.updater.optimizer.step = lambda: seen.update(
        norm=float(torch.cat([p.grad.flatten() for p in run.policy.parameters]).norm())
    )
    metrics = run.updater.step()
    assert seen["norm"] == pytest.approx(1e-4, rel=1e-2) and metrics["optim/grad_clipped"] == 1.0
    assert metrics["optim/step_norm"] == pytest.approx(5.5 * float(one.norm()), rel=1e-4)


def test_a_step_below_its_clip_is_left_alone():
    moved = []
    for clip in (
        OptimizerConfig(lr=1e-3, clip=1e9),
        OptimizerConfig(lr=1e-3, clip=1e9, clip_of="step"),
    ):
        run = Run(optimizer=clip)
        run.accumulate()
        run.updater.step()
        moved.append(run.policy.snapshot())
    assert all(torch.equal(a, b) for a, b in zip(*moved))


# --- In a run ---


def test_a_step_explores_all_its_groups_before_it_learns(folder, tmp_path, monkeypatch):
    """And what it learns is what the two groups together say: checked against the advantages of
    the groups' own tables."""
    order, tables = [], []
    group, learn = Alignment.group, Alignment.learn
    monkeypatch.setattr(
        Alignment, "group", lambda self, *a: order.append("explore") or group(self, *a)
    )
    monkeypatch.setattr(
        Alignment,
        "learn",
        lambda self, step, kept, spread: (
            order.append("learn")
            or tables.append((kept.rewards, spread))
            or learn(self, step, kept, spread)
        ),
    )
    run = Alignment(
        from_dict(
            settings(folder, groups=2, advantages={"std": "step"}, optimizer={"clip_of": "step"})
        ),
        tmp_path,
        Progress(),
    )
    metrics = run.step(0)
    assert order == ["explore", "explore", "learn", "learn"]
    expected = (
        torch.stack([torch.cat([t.local, t.global_]).var(dim=1) for t, _ in tables])
        .mean(dim=0)
        .sqrt()
    )
    torch.testing.assert_close(torch.cat([tables[0][1].local, tables[0][1].global_]), expected)
    assert (
        metrics["advantage/step_std/local/Warmth"] == pytest.approx(float(expected[0]))
        and metrics["optim/grad_norm"] > 0
    )
    assert run.parts.policy.updates == 1


class Sometimes(Warmth):
    """Measures nothing of what it is asked first."""

    asked = 0

    def score(self, batch):
        output = super().score(batch)
        Sometimes.asked += 1
        nothing = torch.full((len(batch),), float("nan"))
        return (
            RewardOutput(nothing, torch.zeros(len(batch), dtype=torch.bool))
            if Sometimes.asked == 1
            else output
        )


@pytest.mark.parametrize("std", ["group", "step"])
def test_a_group_that_can_not_be_measured_is_skipped(folder, tmp_path, std):
    """Three branches of eight without a reward, or an anchor, ended the run once; now the other
    groups of the step go on."""
    Sometimes.asked = 0
    # no stories of the miniature: their clips would be asked first
    (tmp_path / "prompts.txt").write_text("a red circle rises slowly\n")
    data = {"prompts": str(tmp_path / "prompts.txt"), "blocks": 6}
    config = from_dict(
        settings(
            folder,
            groups=2,
            data=data,
            rewards=[{"name": "test_batch_spread:Sometimes"}],
            advantages={"std": std},
            score={"clip_frames": 8, "min_frames": 4, "segments": 0},
        )
    )
    metrics = Alignment(config, tmp_path, Progress()).step(0)
    assert metrics["group/unmeasurable"] == metrics["group/skipped"] == 0.5
    assert (
        metrics["optim/grad_norm"] > 0
        and metrics["reward/local/Warmth/mean"] == metrics["reward/local/Warmth/mean"]
    )


def test_what_can_be_measured():
    assert measurable(WIDE)
    assert not measurable(table([[3.0, 1.0, 2.0]], valid=[True, True, False])), "no anchor"
    assert not measurable(table([[3.0] * 9], valid=[False] * 3 + [True] * 6)), (
        "three of nine are over a quarter"
    )
    with pytest.raises(Unmeasurable, match="6 of 9 rows have rewards"):
        Advantages()(table([[3.0] * 9], valid=[False] * 3 + [True] * 6))
    with pytest.raises(ValueError, match="not finite"):
        measurable(table([[float("nan"), 1.0, 2.0]]))


@pytest.mark.parametrize(
    "content, message",
    [
        ({"advantages": {"std": "batch"}}, "advantages.std"),
        ({"optimizer": {"clip_of": "sum"}}, "optimizer.clip_of"),
    ],
)
def test_settings_that_are_unknown(content, message):
    assert message in refused(content)
