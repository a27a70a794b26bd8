"""Work of a group, and the settings that would save some of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvpo.config import RunConfig
from kvpo.generators.preview import RELEASED
from kvpo.planning.amounts import (
    Amounts,
    amounts,
    contexts_of,
    has_setting,
    members_of,
    replayed_pairs,
    velocities_of,
    with_changes,
)
from kvpo.planning.costs import Costs, Sizes


def work(config: RunConfig, sizes: Sizes, c: Costs, n: Amounts) -> dict[str, float]:
    """Floating-point operations of one group, by phase."""
    g, S = sizes.geometry, len(sizes.geometry.sigmas)
    members = members_of(config, g)
    contexts, velocities = members * contexts_of(config, g), velocities_of(config, g)
    row, grad = c.replay.flops / c.rows["replay"], c.gradient.flops / c.rows["gradient"]
    # what the first has of the other weights' energies serves the further ones
    updates = config.inner_updates
    # the start weights' adapter is 0 and left out
    again = 1 + (updates - 1) * (n.anew > 0)
    left_out = config.objective.asks_reference * (1.0 - c.bare) * again
    unscored = replays_beside(n, updates) - left_out
    rolling = c.bare if config.policy.merge_rollouts else 1.0
    branches, decoding = c.branches.flops / c.rows["branches"], c.decoding(config)
    return {
        "prefix": rolling * (S + 1) * n.prefix_blocks * c.prefix.flops,
        "branches and anchor": rolling * n.branch_rows * (S + 1) * branches,
        "decoding": n.decoded_prefix * decoding.prefix.flops
        + n.decoded_rows * decoding.rows.flops / c.rows["decode_rows"],
        "replays without gradient": unscored * (contexts + velocities) * row,
        "replay with gradient": updates * (contexts * row + velocities * grad),
    }


def replays_beside(n: Amounts, updates: int) -> int:
    """Replays without gradient of a group, over all updates on it."""
    return n.replays - 1 + (updates - 1) * n.anew + n.energies_first * updates


SWITCHES: tuple[Mapping[str, Any], ...] = (
    {"score.segments": 1},
    {"score.segments": 0},
    {"score.lead": 6},
    {"rollout.forks": 2},
    {"rollout.forks": 4},
    {"policy.merge_rollouts": True},
    {"policy.sync_interval": 1},
    {"objective.kl_beta": 0.0, "objective.kl_watch": False},
)
"""Settings that cost something else than work: what is scored, how exact, what holds the policy."""


def savings(config: RunConfig, sizes: Sizes, c: Costs, world: int = 1) -> dict[str, float]:
    """Options -> share of a group's operations that each would save by itself.

    Those that are on already, that can not be set here, or that save nothing are left out.
    """
    g = sizes.geometry
    pairs, whole = replayed_pairs(config, g)
    more: list[dict[str, Any]] = [
        {"pairs.count": n} for n in (whole // 2, whole // 4) if 0 < n < pairs
    ]
    if c.preview and not config.score.preview:
        more += [{"score.preview": RELEASED.get(sizes.vae.get("z_dim", 16), "")}]

    def flops(changed: RunConfig) -> float:
        counted = amounts(changed, g, world, c.decoding(changed).field)
        return sum(work(changed, sizes, c, counted).values())

    now, found = flops(config), {}
    for named in (*SWITCHES, *more):
        # objectives differ in what they have to set
        switch = {key: value for key, value in named.items() if has_setting(config, key)}
        try:
            saved = 1.0 - flops(with_changes(config, switch)) / now
        except ValueError:  # an illegal pair of settings
            continue
        if saved > 0.001:
            found[as_options(switch)] = saved
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def as_options(changes: Mapping[str, Any]) -> str:
    """The same changes as a command's options."""
    return " ".join(
        f"--{k.replace('_', '-')}" + ("" if v is True else f" {v}")
        if v is not False
        else f"--{'.no-'.join(k.replace('_', '-').rsplit('.', 1))}"
        for k, v in changes.items()
    )
