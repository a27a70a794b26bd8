"""Advantages: hand-worked numbers, what the clamp must not lose, failed rewards, unsafe groups."""

from __future__ import annotations

import math

import pytest
import torch

from kvpo.common.rng import normal
from kvpo.method.advantages import Advantages, UnsafePolicy, anchor_advantage
from kvpo.types import RewardTable


def table(local, global_=None, components=None, valid=None) -> RewardTable:
    """Rewards r_KB from nested lists, the anchor last; the global signal defaults to no
    differences."""
    local = torch.as_tensor(local, dtype=torch.float64)
    global_ = (
        torch.zeros_like(local)
        if global_ is None
        else torch.as_tensor(global_, dtype=torch.float64)
    )
    valid = torch.ones(local.shape[1], dtype=torch.bool) if valid is None else torch.tensor(valid)
    return RewardTable(components or tuple("abcdef"[: len(local)]), local, global_, valid)


def test_anchor_advantage_by_hand():
    """r = 3, 1, anchor 2: std 1, so +1 and -1."""
    assert anchor_advantage(torch.tensor([3.0, 1.0, 2.0])).tolist() == [1.0, -1.0]


def test_components_are_scaled_apart_then_weighted():
    """A component in units a thousand times larger counts no more."""
    found = Advantages(weights={"a": 1.0, "b": 0.5}, clamp=0.0)(
        table([[3.0, 1.0, 2.0], [1000.0, 3000.0, 2000.0]])
    )
    assert found.local.tolist() == [[1.0, -1.0], [-1.0, 1.0]]
    assert found.fused.tolist() == [0.5, -0.5]


def test_signals_are_fused():
    found = Advantages(local=1.0, global_=0.5, clamp=0.0)(
        table([[3.0, 1.0, 2.0]], [[0.0, 6.0, 3.0]])
    )
    assert found.fused.tolist() == [0.5, -0.5] and found.values.tolist() == [0.5, -0.5]


def test_values_are_centred_and_fused_are_not():
    found = Advantages(clamp=0.0)(table([[5.0, 4.0, 6.0, 1.0]]))
    assert found.values.sum().item() == pytest.approx(0.0, abs=1e-12)
    assert (
        (found.fused > 0.0).all() and found.safe and found.metrics["advantage/above_anchor"] == 1.0
    )


def test_a_group_far_above_its_anchor_keeps_its_ranking():
    """Clamped before centring, as in the released code, all of these would equal the clamp and
    teach nothing."""
    r_B = [10.0, 10.5, 11.0, 11.5, 0.0]
    raw = anchor_advantage(torch.tensor(r_B, dtype=torch.float64))
    bound = raw.min().item() - 0.1
    assert len(set(raw.clamp(-bound, bound).tolist())) == 1
    found = Advantages(clamp=bound)(table([r_B]))
    assert found.values.argsort().tolist() == [0, 1, 2, 3] and len(set(found.values.tolist())) == 4
    assert found.metrics["advantage/clamped"] == 0.0


def test_clamp_acts_after_centring():
    found = Advantages(clamp=1.0)(table([[9.0, 0.0, 0.0, 0.0, 0.0]]))
    assert (
        found.values[0].item() == 1.0
        and found.values[1].item() == pytest.approx(-math.sqrt(5.0) / 4)
        and found.metrics["advantage/clamped"] == pytest.approx(0.25)
    )


def test_one_component_in_a_group_of_eight_stays_below_the_default_clamp():
    """The bound that the default clamp promises: the worst case is a single outlier."""
    worst = max(
        Advantages(clamp=0.0)(table([[1.0, *[0.0] * 7, anchor]], [[1.0, *[0.0] * 7, anchor]]))
        .values.abs()
        .max()
        .item()
        for anchor in torch.linspace(-2.0, 3.0, 101).tolist()
    )
    assert 3.9 < worst < 1.5 * 2.7 < Advantages().clamp


def test_shifting_or_scaling_a_component_changes_nothing():
    r_KB = normal((2, 7), 0, "rewards").double()
    found, moved = (Advantages()(table(r)) for r in (r_KB, 3.0 * r_KB + 11.0))
    torch.testing.assert_close(moved.values, found.values)


def test_a_component_without_spread_says_nothing():
    """Its std is rounding; divided by it, rounding would become advantages of order one."""
    flat = [0.7, 0.7, 0.7 + 1e-9, 0.7]
    found = Advantages()(table([flat, [1.0, 2.0, 3.0, 2.0]]))
    assert found.local[0].tolist() == [0.0, 0.0, 0.0]
    assert found.fused.tolist() == found.local[1].tolist()


def test_equal_branches_are_unsafe_and_learn_nothing():
    found = Advantages()(table([[1.0, 1.0, 1.0, 1.0]]))
    assert not found.safe and not found.values.any()


def test_failed_branches_neither_count_nor_move_the_others():
    rewards = [[3.0, math.nan, 1.0, 4.0, 2.0]]
    found = Advantages()(
        table(rewards, [[0.0, math.nan, 0.0, 0.0, 0.0]], valid=[True, False, True, True, True])
    )
    without = Advantages()(table([[3.0, 1.0, 4.0, 2.0]]))
    assert (
        found.values[1] == 0.0
        and found.fused[1] == 0.0
        and found.valid.tolist() == [True, False, True, True]
    )
    torch.testing.assert_close(found.values[found.valid], without.values)
    assert found.metrics["advantage/valid"] == pytest.approx(0.8)


def test_a_group_needs_its_anchor_and_three_quarters_of_its_rows():
    def of_valid(valid):
        return Advantages()(table([normal((8,), 0, "r").tolist()], valid=valid))

    assert of_valid([False] * 2 + [True] * 6).valid.sum() == 5
    with pytest.raises(
        ValueError,
        match=r"5 of 8 rows have rewards \(missing: \[0, 1, 2\]; row 7 is the anchor\).*look at the reward's own error",
    ):
        of_valid([False] * 3 + [True] * 5)
    with pytest.raises(
        ValueError, match=r"7 of 8 rows have rewards \(missing: \[7\]; row 7 is the anchor\)"
    ):
        of_valid([True] * 7 + [False])


def test_a_nan_in_a_valid_row_is_named():
    with pytest.raises(
        ValueError, match="global rewards of rows marked valid are not finite: b of row 1 = nan"
    ):
        Advantages()(table([[1.0, 2.0, 3.0]] * 2, [[1.0, 2.0, 3.0], [1.0, math.nan, 3.0]]))


def test_weights_must_name_every_component():
    with pytest.raises(
        ValueError, match=r"weights name \['a', 'z'\] but the rewards are \['a', 'b'\]"
    ):
        Advantages(weights={"a": 1.0, "z": 1.0})(table([[1.0, 2.0, 3.0]] * 2))


def test_a_table_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"shape \(1, 3\), expected 2 components x 3 rows"):
        Advantages()(table([[1.0, 2.0, 3.0]], components=("a", "b")))


def test_the_anchor_as_a_member_by_hand():
    """A = 2, 1 and the anchor's 0, so 1, 0, -1; a group without it knows only the ranking."""
    r_B = [3.0, 2.0, 1.0]
    found = Advantages(anchor=True)(table([r_B]))
    assert (
        found.fused.tolist() == [2.0, 1.0]
        and found.values.tolist() == [1.0, 0.0, -1.0]
        and found.valid.tolist() == [True] * 3
    )
    assert Advantages()(table([r_B])).values.tolist() == [0.5, -0.5]


@pytest.mark.parametrize("bad", [{"clamp": -1.0}, {"std_floor": 0.0}])
def test_settings_without_meaning_are_refused(bad):
    with pytest.raises(ValueError, match=str(next(iter(bad.values())))):
        Advantages(**bad)


def test_metrics_are_plain_numbers_for_every_component_and_signal():
    metrics = Advantages()(
        table(normal((2, 5), 0, "r"), normal((2, 5), 0, "s"), ("vq", "ta"))
    ).metrics
    assert all(type(value) is float and math.isfinite(value) for value in metrics.values())
    assert {
        f"advantage/{signal}/{name}" for signal in ("local", "global") for name in ("vq", "ta")
    } <= set(metrics)


@pytest.mark.parametrize(("kind", "expected"), [("skip", 0.0), ("scale", 0.25), ("none", 1.0)])
def test_unsafe_groups(kind, expected):
    policy = UnsafePolicy(kind, factor=0.25)
    assert policy.weight(safe=False) == expected and policy.weight(safe=True) == 1.0


def test_unknown_unsafe_policies_are_refused():
    with pytest.raises(ValueError, match="'mechanism_2' is unknown; choose skip, scale or none"):
        UnsafePolicy("mechanism_2")
    with pytest.raises(ValueError, match="write skip for 0 and none for 1"):
        UnsafePolicy("scale", factor=1.0)
