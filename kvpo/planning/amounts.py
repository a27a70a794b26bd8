"""Counts of each part of a recipe's step, from its scripts, forks and settings.

They are means over all forks that can be.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from kvpo.config import RunConfig
from kvpo.generators.geometry import Geometry
from kvpo.method.branches import own_frames
from kvpo.method.explorers import forks_of
from kvpo.method.objectives.interface import ReplayShape
from kvpo.method.prompts import even_starts, starts_at
from kvpo.method.score import group_clips, horizon
from kvpo.rewards.scorer import make_scorers
from kvpo.types import Script, Window


def branches_of(config: RunConfig) -> int:
    """Branches of a group on the card that has most of them."""
    return -(-config.rollout.branches // config.branch_parallel)


def rows_of(config: RunConfig) -> int:
    """Branches and anchor of a group on the card that has most of them."""
    return branches_of(config) + 1


def shape_of(config: RunConfig, geometry: Geometry) -> ReplayShape:
    """Velocities that the recipe's objective replays of a group."""
    return config.objective.shape(config.exploring, config.energy, geometry.sigmas)


def members_of(config: RunConfig, geometry: Geometry) -> int:
    """Rows of a group that a replay has on the card that has most of them."""
    if shape_of(config, geometry).anchor_alone:
        return 1
    return branches_of(config) + config.advantages.anchor


def side_by_side(config: RunConfig) -> int:
    return min(config.rollout.together or rows_of(config), rows_of(config))


def decoded_together(config: RunConfig) -> int:
    return min(config.score.together or rows_of(config), rows_of(config))


def replay_rows(config: RunConfig, geometry: Geometry) -> int:
    """Velocities of the largest replay pass.

    All branches may start alike; the first step of the first block is then one for all.
    """
    members = members_of(config, geometry)
    members = min(config.rollout.together or members, members)
    pairs, whole = replayed_pairs(config, geometry)
    found = members * pairs
    if pairs == whole:
        found -= (members - 1) * shape_of(config, geometry).alike
    return min(found, config.rows_per_pass or found)


def replayed_pairs(config: RunConfig, geometry: Geometry) -> tuple[int, int]:
    """(block, step) pairs of a window that are replayed, and those that have a weight."""
    whole = config.exploring.window_blocks * shape_of(config, geometry).steps
    return config.pairs.replayed(whole), whole


def contexts_of(config: RunConfig, geometry: Geometry) -> float:
    """Blocks of a window that a replay encodes as the past of later ones; a mean over the draw.

    They are those before the last block that is replayed.
    """
    (drawn, whole), P = replayed_pairs(config, geometry), config.exploring.window_blocks
    steps = whole // P
    within = [math.comb((p + 1) * steps, drawn) / math.comb(whole, drawn) for p in range(P - 1)]
    return sum(1.0 - share for share in within)


def velocities_of(config: RunConfig, geometry: Geometry) -> float:
    """Velocities of a group that a replay computes, a mean over the draw."""
    members = members_of(config, geometry)
    drawn, whole = replayed_pairs(config, geometry)
    once = (members - 1) * shape_of(config, geometry).alike * drawn / whole
    return members * drawn - once


def reward_memory(config: RunConfig) -> tuple[int, int]:
    """Bytes on this run's cards that trained rewards take by their own account.

    Returns the sum of those that stay, and the largest that comes and goes.
    """
    here = [
        s for s in make_scorers(config.rewards_of("train")) if not (s.entry.devices or s.entry.url)
    ]
    stay, come = (
        {
            getattr(s.reward, "network", s.spec.name): int(s.spec.memory_gb * 2**30)
            for s in here
            if s.resident == resident
        }
        for resident in (True, False)
    )
    return sum(stay.values()), max(come.values(), default=0)


def last_forks(forks: Sequence[int], count: int) -> list[int]:
    """Equally likely fork blocks of the last of ``count`` groups on one prefix.

    See `kvpo.method.forks.spread_forks`; a group alone has any of ``forks``. ValueError where
    there are too few.
    """
    n = len(forks)
    if count > n:
        raise ValueError(
            f"rollout.forks = {count}, but a video can be forked at {n} blocks only; lower it"
        )
    # the first group's place lies in [0, n / count); n points in it meet every block alike
    return [forks[int((count - 1 + (i + 0.5) / n) * n / count)] for i in range(n)]


def groups_of(config: RunConfig, world: int) -> int:
    """Groups of a step on the card that has most of them."""
    return -(-config.groups * config.branch_parallel // world)


def prefixes_of(config: RunConfig, world: int = 1) -> int:
    """Prefixes that are generated side by side on a card."""
    return min(config.rollout.prefixes, -(-groups_of(config, world) // config.rollout.forks))


def begun_of(config: RunConfig, world: int = 1) -> int:
    """Groups of a card whose pasts are in memory at once: all that fork the prefixes above."""
    return min(config.rollout.prefixes * config.rollout.forks, groups_of(config, world))


def longest(forks: Sequence[float], draws: int) -> float:
    """Expected largest of so many independent draws from ``forks``."""
    ordered, m = sorted(forks), len(forks)
    return sum(fork * (((i + 1) / m) ** draws - (i / m) ** draws) for i, fork in enumerate(ordered))


def scripts_of(config: RunConfig) -> list[Script]:
    """Scripts of the recipe's shape: of so many prompts, or of one to four where that is drawn."""
    blocks = config.data.blocks
    counts = [config.data.segments] if config.data.segments else [1, 2, 3, 4]
    if config.exploring.at_switches:
        counts = [n for n in counts if n > 1]
    starts = [
        starts_at(config.data.switches, n) if config.data.switches else even_starts(n, blocks)
        for n in counts
    ]
    return [Script("plan", tuple(f"prompt {i}" for i in range(len(s))), s, blocks) for s in starts]


@dataclass(frozen=True)
class Amounts:
    """Amounts of one group, mean over scripts and eligible forks.

    With branch_parallel they are those of a card's share of the group.
    """

    fork: float
    prefix_blocks: float
    """Blocks of the prefix that a group pays for: its share of those that serve several groups."""
    prefix_calls: float
    """Calls for the prefix; a group counts its share of those that serve several."""
    branch_calls: float
    replay_calls: float
    """Calls of each replay.

    The current weights are replayed with gradient, then the reference, and the behaviour policy
    where it lags.
    """
    replays: int
    energies_first: bool
    """Whether energies are computed before the gradient: they are not where one pass has both."""
    anew: int
    """Replays of other weights that every further update on a group makes once more."""
    branch_rows: float
    """Rows that go through the network for the branches, in blocks: rows times blocks."""
    decoded_prefix: float
    decoded_rows: float
    """Latent frames that are decoded, all rows."""
    scored: float
    """Pixel frames that rewards look at, all rows."""


def amounts(
    config: RunConfig, geometry: Geometry, world: int = 1, field: int | None = None
) -> Amounts:
    """Amounts of a group. ``field``: the decoder's receptive field (default: all of the prefix)."""
    lead = config.score.lead or field
    g, S = geometry, len(geometry.sigmas)
    chunks, P = -(-rows_of(config) // side_by_side(config)), config.exploring.window_blocks
    members, shape = members_of(config, g), shape_of(config, g)
    parts = -(-members // min(config.rollout.together or members, members))
    velocities = members * replayed_pairs(config, g)[0]
    passes = max(parts, -(-velocities // config.rows_per_pass) if config.rows_per_pass else parts)
    found, lasts = [], []
    for script in scripts_of(config):
        eligible = forks_of(config.exploring, script, g)
        lasts += last_forks(eligible, config.rollout.forks)
        for fork in eligible:
            window = Window(fork, P)
            stop = horizon(script, window, g, config.score)
            clips = group_clips(script, window, g, config.score)
            scored = sum(c.stop - c.first for c in {*clips["local"], *clips["global"]})
            found.append(
                (
                    fork,
                    chunks * (S + 1) * (stop - fork),
                    min(fork * g.block, lead or fork * g.block),
                    rows_of(config) * (stop - fork) * g.block,
                    rows_of(config) * scored,
                    rows_of(config) * (stop - fork),
                )
            )
    together = prefixes_of(config, world)
    shared = config.rollout.forks
    prefix = (S + 1) * longest(lasts, together) / (together * shared)
    fork, branch, decoded_prefix, decoded_rows, scored, branch_rows = (
        sum(x) / len(found) for x in zip(*found)
    )
    behind = config.policy.sync_interval > 1 or config.policy.behaviour_decay > 0.0
    reference = bool(config.objective.asks_reference)
    replays = 1 + reference + (behind and shape.behaviour)
    return Amounts(
        fork,
        sum(lasts) / len(lasts) / shared,
        prefix,
        branch,
        parts * contexts_of(config, g) + passes,
        replays,
        shape.energies_first and passes > 1,
        shape.anew * (reference + shape.behaviour),
        branch_rows,
        decoded_prefix,
        decoded_rows,
        scored,
    )


def own_past(config: RunConfig, geometry: Geometry) -> tuple[int, int]:
    """Cache frames that a branch needs of its own, in the rollout and in a replay.

    The rollout's is the most over scripts and forks.
    """
    g, P = geometry, config.exploring.window_blocks
    rollout = max(
        own_frames(g, s, Window(f, P))
        for s in scripts_of(config)
        for f in forks_of(config.exploring, s, g)
    )
    switched = any(
        s.segment(b) != s.segment(b - 1)
        for s in scripts_of(config)
        for f in forks_of(config.exploring, s, g)
        for b in range(f + 1, f + P)
    )
    return rollout, (P - 1) * g.block + (g.window if switched and g.window > 0 else 0)


def has_setting(config: RunConfig, name: str) -> bool:
    """Whether a config has the dotted setting ``name``; which an objective has, its kind says."""
    section, _, key = name.rpartition(".")
    return any(f.name == key for f in fields(getattr(config, section) if section else config))


def with_changes(config: RunConfig, changes: Mapping[str, Any]) -> RunConfig:
    """Dotted settings -> a config."""
    for key, value in changes.items():
        section, _, name = key.rpartition(".")
        config = (
            replace(config, **{section: replace(getattr(config, section), **{name: value})})
            if section
            else replace(config, **{name: value})
        )
    return config
