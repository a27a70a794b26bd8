"""Explorers: where branches fork, what they read, and the promises of the draws."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from dataclasses import dataclass

import pytest
import torch

from kvpo.common.rng import normal, stream
from kvpo.method.explorers import StartNoise, mix_noise
from kvpo.method.routing import DRAWS, KVRouting, balanced, dispersed
from kvpo.types import BranchPlan, Window


@dataclass(frozen=True)
class Geometry:
    block: int = 3
    sink: int = 3
    window: int = 12


GEOMETRY = Geometry()
GEOMETRIES = (
    GEOMETRY,
    Geometry(window=15),
    Geometry(block=1, sink=0, window=6),
    Geometry(block=2, sink=2, window=9),
)


def frames_read(plan: BranchPlan, block: int, routing: KVRouting, geometry: Geometry) -> list[int]:
    """Every frame that a branch reads at a block of its window, as method.md section 2 has it."""
    first = block * geometry.block
    return [
        *range(geometry.sink),
        *plan.frames,
        *range(first - routing.nearest, first),
        *range(first, first + geometry.block),
    ]


def deployment_window(block: int, geometry: Geometry) -> list[int]:
    stop = (block + 1) * geometry.block
    return [*range(geometry.sink), *range(stop - geometry.window + geometry.sink, stop)]


# --- Draws ---


@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize(("size", "n", "G"), [(14, 5, 8), (30, 9, 8), (6, 5, 3), (9, 2, 2)])
def test_every_draw_gives_sorted_sets_from_the_pool(draw, size, n, G):
    pool = range(3, 3 + size)
    drawn = DRAWS[draw](pool, n, G, stream(0, draw))
    assert len(drawn) == G
    for frames in drawn:
        assert (
            len(set(frames)) == n and set(frames) <= set(pool) and frames == tuple(sorted(frames))
        )


@pytest.mark.parametrize("draw", DRAWS)
def test_draws_follow_from_the_generator_alone(draw):
    again = [DRAWS[draw](range(14), 5, 8, stream(7, "draw")) for _ in range(2)]
    assert again[0] == again[1] != DRAWS[draw](range(14), 5, 8, stream(8, "draw"))


@pytest.mark.parametrize(
    ("size", "n", "G"), list(itertools.product((6, 14, 30), (1, 5), (2, 7, 8)))
)
def test_balanced_uses_frames_equally_often(size, n, G):
    for seed in range(10):
        drawn = balanced(range(size), n, G, stream(seed, "balanced"))
        uses = Counter(itertools.chain(*drawn))
        counts = [uses[frame] for frame in range(size)]
        assert max(counts) - min(counts) <= 1 and sum(counts) == n * G


def mean_overlap(drawn) -> float:
    pairs = [len(set(a) & set(b)) for a, b in itertools.combinations(drawn, 2)]
    return sum(pairs) / len(pairs)


def test_balanced_overlaps_less_than_the_released_codes_draw():
    """14 frames, 5 drawn, 8 branches, as in the paper's setting: about 1.4 shared frames a pair
    against 2.1."""
    overlap = {
        draw: sum(
            mean_overlap(DRAWS[draw](range(14), 5, 8, stream(seed, draw))) for seed in range(20)
        )
        / 20
        for draw in DRAWS
    }
    assert overlap["balanced"] < 1.5 < overlap["independent"] < 2.1 < overlap["dispersed"]


def test_independent_draws_are_uniform():
    uses = Counter(itertools.chain(*DRAWS["independent"](range(8), 3, 4000, stream(0, "uniform"))))
    expected = 4000 * 3 / 8
    assert all(abs(uses[frame] - expected) < 5 * math.sqrt(expected) for frame in range(8))


def test_dispersed_branches_are_cyclic_windows_of_one_permutation():
    drawn = dispersed(range(10), 4, 5, stream(0, "dispersed"))
    order = torch.randperm(10, generator=stream(0, "dispersed")).tolist()
    assert drawn == [tuple(sorted((order + order)[2 * k : 2 * k + 4])) for k in range(5)]


# --- KV routing ---


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize("nearest", (1, 2))
def test_every_plan_keeps_the_deployment_budget_and_differs_from_the_anchor(
    geometry, draw, nearest
):
    routing = KVRouting(draw, nearest, window_blocks=2)
    for fork in routing.eligible_forks(24, geometry):
        window = Window(fork, 2)
        plans = routing.plan(window, geometry, 4, stream(0, draw, fork))
        assert len(plans) == 4
        for plan in plans:
            assert plan != BranchPlan()
            for block in range(window.fork, window.stop):
                read = frames_read(plan, block, routing, geometry)
                assert (
                    len(read)
                    == len(set(read))
                    == geometry.window
                    == len(deployment_window(block, geometry))
                )
            assert set(frames_read(plan, fork, routing, geometry)) != set(
                deployment_window(fork, geometry)
            )


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_rolling_is_what_the_anchor_reads(geometry):
    routing = KVRouting()
    fork = routing.eligible_forks(24, geometry)[0]
    anchor = BranchPlan(routing.rolling(Window(fork, 3), geometry))
    assert sorted(frames_read(anchor, fork, routing, geometry)) == deployment_window(fork, geometry)


def test_branches_differ_from_each_other_where_the_pool_allows():
    routing = KVRouting("independent", nearest=3)
    for seed in range(20):
        plans = routing.plan(Window(5, 3), GEOMETRY, 8, stream(seed, "plan"))
        assert len(set(plans)) == 8


def test_a_small_pool_is_used_up_before_a_set_repeats():
    """5 frames, 4 routed: 5 sets, of which the anchor has one; 8 branches use the other four
    twice."""
    routing = KVRouting(nearest=1)
    geometry = Geometry(window=11)
    for draw, seed in itertools.product(DRAWS, range(4)):
        plans = KVRouting(draw).plan(
            Window(4, 3), geometry, 8, stream(seed, draw), resident=[0, 1, 2, 6, 7, 8, 9, 10, 11]
        )
        assert sorted(Counter(plans).values()) == [2, 2, 2, 2]
        assert BranchPlan(routing.rolling(Window(4, 3), geometry)) not in plans


def test_balanced_plans_stay_balanced():
    for seed in range(20):
        plans = KVRouting(nearest=1).plan(Window(8, 3), GEOMETRY, 8, stream(seed, "plan"))
        uses = Counter(itertools.chain(*(plan.frames for plan in plans)))
        counts = [uses[frame] for frame in range(3, 23)]
        assert max(counts) - min(counts) <= 1


def test_plans_follow_from_the_generator_alone():
    def plan(seed):
        return KVRouting().plan(Window(8, 3), GEOMETRY, 8, stream(seed, "plan"))

    assert plan(0) == plan(0) != plan(1)


def test_only_resident_frames_are_routed():
    resident = [0, 1, 2, *range(9, 24)]
    plans = KVRouting().plan(Window(8, 3), GEOMETRY, 8, stream(0, "plan"), resident)
    assert all(set(plan.frames) <= set(range(9, 23)) for plan in plans)


def test_eligible_forks_are_all_blocks_with_a_choice():
    """Brute force: a fork is eligible if and only if some plan other than the anchor's can be
    drawn there."""
    for geometry, nearest in itertools.product(GEOMETRIES, (1, 2)):
        routing = KVRouting(nearest=nearest)
        possible = []
        for fork in range(20 - 3 + 1):
            try:
                routing.plan(Window(fork, 3), geometry, 2, stream(0, "plan"))
                possible.append(fork)
            except ValueError:
                pass
        assert routing.eligible_forks(20, geometry) == possible


def test_the_papers_window_forks_from_block_four_on():
    """window 12, sink 3: at block 3 the pool, frames 3 to 7, is exactly what the anchor reads."""
    assert KVRouting(window_blocks=5).eligible_forks(49, GEOMETRY) == list(range(4, 45))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (
            {"draw": "balancd"},
            "'balancd' is unknown; choose one of balanced, dispersed, independent",
        ),
        ({"nearest": 0}, "nearest = 0, but .*set nearest >= 1"),
        ({"window_blocks": 0}, "window_blocks = 0, but a window has at least 1 block"),
    ],
)
def test_routing_settings_without_meaning_are_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        KVRouting(**bad)


def test_a_window_without_room_is_refused():
    with pytest.raises(
        ValueError,
        match="window 12 - sink 3 - nearest 6 - block 3 = 0 frames; widen the window or lower nearest",
    ):
        KVRouting(nearest=6).eligible_forks(49, GEOMETRY)


def test_a_video_that_is_too_short_is_refused():
    with pytest.raises(
        ValueError, match="window_blocks = 5, the video has 4 blocks; lengthen the video"
    ):
        KVRouting(window_blocks=5).eligible_forks(4, GEOMETRY)
    with pytest.raises(
        ValueError,
        match="first fork at block 4, and a window of 3 blocks from there ends at block 7, but the video has 6 blocks",
    ):
        KVRouting().eligible_forks(6, GEOMETRY)


def test_a_pool_that_is_too_small_is_refused():
    with pytest.raises(
        ValueError,
        match=r"fork at block 4 \(frame 12\): 8 resident frames .*at least 9; fork later",
    ):
        KVRouting(nearest=1).plan(Window(4, 3), Geometry(window=15), 2, stream(0, "plan"))


@pytest.mark.parametrize(("resident", "lost"), [(range(1, 24), 0), (range(0, 23), 23)])
def test_locked_frames_that_are_not_resident_are_refused(resident, lost):
    """The released code dropped such frames silently, and the branch was quietly another one."""
    with pytest.raises(
        ValueError,
        match=rf"frames \[{lost}\] are locked .* not resident; fork later or enlarge the cache",
    ):
        KVRouting().plan(Window(8, 3), GEOMETRY, 2, stream(0, "plan"), resident)


@pytest.mark.parametrize("explorer", (KVRouting(), StartNoise()))
@pytest.mark.parametrize("G", (0, 1))
def test_a_group_of_less_than_two_is_refused(explorer, G):
    with pytest.raises(
        ValueError, match=f"num_branches = {G}, but a group compares at least 2 branches"
    ):
        explorer.plan(Window(8, 3), GEOMETRY, G, stream(0, "plan"))


def test_a_frame_set_in_the_pool_twice_is_drawn_once():
    plans = KVRouting().plan(
        Window(8, 3), GEOMETRY, 4, stream(0, "plan"), resident=[*range(24), *range(24)]
    )
    assert all(len(set(plan.frames)) == 5 for plan in plans)


# --- Start noise ---


def test_start_noise_plans_mix_and_route_nothing():
    plans = StartNoise(mix=0.3).plan(Window(2, 3), GEOMETRY, 4, stream(0, "plan"))
    assert plans == (BranchPlan(noise_mix=0.3),) * 4
    assert StartNoise().eligible_forks(6, GEOMETRY) == [1, 2, 3]
    assert StartNoise.deterministic_replay and not KVRouting.deterministic_replay


def test_mixed_noise_is_standard_normal_and_correlated_as_stated():
    shared, fresh = normal((200_000,), 0, "shared"), normal((200_000,), 0, "fresh")
    mixed = mix_noise(shared, fresh, 0.6)
    assert abs(mixed.std() - 1.0) < 0.01 and abs((mixed * shared).mean() - 0.8) < 0.01


def test_mixing_all_or_nothing_is_exact():
    shared, fresh = normal((8,), 0, "shared"), normal((8,), 0, "fresh")
    assert torch.equal(mix_noise(shared, fresh, 0.0), shared) and torch.equal(
        mix_noise(shared, fresh, 1.0), fresh
    )


@pytest.mark.parametrize("mix", (0.0, 1.1, -0.1))
def test_a_mix_that_is_no_share_is_refused(mix):
    with pytest.raises(ValueError, match=rf"mix = {mix} must lie in \(0, 1\]"):
        StartNoise(mix)


def test_noise_of_two_shapes_or_a_wrong_share_is_refused():
    with pytest.raises(ValueError, match="must have one shape"):
        mix_noise(torch.zeros(2), torch.zeros(3), 0.5)
    with pytest.raises(ValueError, match=r"mix = 1.5 must lie in \[0, 1\]"):
        mix_noise(torch.zeros(2), torch.zeros(2), 1.5)
