"""Memory of a card in every stage of a step, and the settings that would make it fit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from kvpo.config import RunConfig
from kvpo.planning.amounts import (
    begun_of,
    decoded_together,
    groups_of,
    members_of,
    own_past,
    prefixes_of,
    replay_rows,
    reward_memory,
    rows_of,
    shape_of,
    side_by_side,
    with_changes,
)
from kvpo.planning.costs import GIB, Costs, Sizes


def stages(config: RunConfig, sizes: Sizes, c: Costs, world: int = 1) -> dict[str, dict[str, int]]:
    """Bytes on one of ``world`` devices in every stage of a step, by part.

    Passes cost as many times their row's bytes as they have rows.
    """
    g, B, R = sizes.geometry, side_by_side(config), replay_rows(config, sizes.geometry)
    rollout_own, replay_own = own_past(config, g)
    pasts, trained, bank = begun_of(config, world), 4 * c.trainable, g.bank * c.frame
    # of prefixes decoded side by side one state is kept for each
    decoders = decoded_together(config) + pasts - 1
    stay, come = reward_memory(config)
    always, swapped = _always(config, c, world, stay), _swapped(config, c, world)
    stored = _stored(config, sizes, c, world)
    explored = always | stored
    replayed = explored | _replayed(config, sizes, c, replay_own)
    return {
        "prefix": always
        | {
            "shared past": stored["shared past"] + pasts * bank,
            "one pass": prefixes_of(config, world) * c.prefix.bytes,
        },
        "branches": explored
        | {
            "branches' own past": B * (rollout_own * c.frame + bank),
            "one pass": _scaled(c.branches.bytes, B, c, "branches"),
        }
        | swapped,
        "decoding": explored
        | {"decoder at work": _scaled(c.decoding(config).rows.bytes, decoders, c, "decode_rows")},
        "scoring": explored | ({"reward at work": come} if come else {}),
        "replay": replayed | {"one pass": _scaled(c.replay.bytes, R, c, "replay")} | swapped,
        "gradient": replayed
        | {"activations": _scaled(c.gradient.bytes, R, c, "gradient"), "gradient": trained},
        "update": always
        | {
            "gradient": trained,
            "optimizer at work": 2 * trained // (world if _sharded(config, world) else 1),
        },
    }


def _always(config: RunConfig, c: Costs, world: int, rewards: int) -> dict[str, int]:
    """Bytes that stay throughout a step: networks, trained copies, rewards that do not leave."""
    return (
        {"generator": c.weights, "VAE": c.vae}
        | ({"preview decoder": c.preview.weights} if config.score.preview and c.preview else {})
        | _kept(config, c, world)
        | ({"rewards": rewards} if rewards else {})
        | ({"merged weights": c.maps} if config.policy.merge_rollouts else {})
        | ({"text encoder": c.text_encoder} if config.data.prompts == "mini" else {})
        | ({"gradient so far": 4 * c.trainable} if groups_of(config, world) > 1 else {})
    )


def _stored(config: RunConfig, sizes: Sizes, c: Costs, world: int) -> dict[str, int]:
    """Bytes of the groups that are held: their past, and what was recorded of their branches.

    The last of them has its latents up to the end.
    """
    rows, P, S = rows_of(config), config.exploring.window_blocks, len(sizes.geometry.sigmas)
    kept = groups_of(config, world) if config.keeps_groups else 1
    parts = len(config.recorded & {"inputs", "velocities"})
    latent = _latent(sizes)
    return {
        "shared past": max(begun_of(config, world), kept) * config.rollout.cache_frames * c.frame,
        "trajectories": kept * rows * P * latent * (parts * S + 1)
        + rows * (config.data.blocks - P) * latent,
    }


def _replayed(config: RunConfig, sizes: Sizes, c: Costs, own: int) -> dict[str, int]:
    """Bytes of a replay beside its passes: what its objective makes, and each branch's past.

    ``own``: cache frames that a branch has of its own.
    """
    g, shape = sizes.geometry, shape_of(config, sizes.geometry)
    made = shape.copies * rows_of(config) * config.exploring.window_blocks * shape.steps
    members = members_of(config, g)
    beside = min(config.rollout.together or members, members)
    past = {"branches' own past": beside * (own + g.bank) * c.frame}
    return ({"made for the replay": made * _latent(sizes)} if made else {}) | past


def _latent(sizes: Sizes) -> int:
    """Bytes of a block's latents in float32."""
    g = sizes.geometry
    return 4 * g.block * sizes.transformer["in_channels"] * g.latent_height * g.latent_width


def _swapped(config: RunConfig, c: Costs, world: int) -> dict[str, int]:
    """Bytes of the trained weights that are put aside while those of another set are in."""
    if config.dtype == "float32" or _sharded(config, world):
        return {}
    return {"weights swapped in": 2 * c.trainable}


def _sharded(config: RunConfig, world: int) -> bool:
    return config.policy.shard and world > 1


def _kept(config: RunConfig, c: Costs, world: int) -> dict[str, int]:
    """Bytes kept per trained number from step to step, by part.

    Sharded, a card has its part of masters, sets and moments; whole are the module's weights, and
    the sets that groups ask for.
    """
    if not _sharded(config, world):
        return {"trained copies": c.sets, "optimizer": 8 * c.trainable}
    width = 4 if config.dtype == "float32" else 2
    # an adapter's weights in the module; a full set is the generator itself
    copies = width * c.trainable if config.policy.train == "lora" else 0
    at_hand = (
        width * c.trainable * (1 + (config.policy.sync_interval > 1 or config.inner_updates > 1))
    )
    return {
        "trained copies": copies + 16 * c.trainable // world,
        "optimizer": 8 * c.trainable // world,
        "sets at hand": at_hand,
    }


def _scaled(measured: int, rows: int, c: Costs, part: str) -> int:
    """Bytes for another number of rows than were run."""
    return measured * rows // c.rows[part]


# --- What would fit ---


def changes(config: RunConfig, sizes: Sizes, stage: str) -> Iterator[tuple[str, Any]]:
    """Settings that lower a stage's memory, the least harmful first, each one step."""

    def half(now):
        return max(1, now // 2)

    rows = rows_of(config)
    R = replay_rows(config, sizes.geometry)
    B = side_by_side(config)
    decoded = decoded_together(config)
    least = max(
        sizes.geometry.resident(config.data.blocks),
        sizes.geometry.window + 2 * sizes.geometry.block,
    )
    if stage in ("replay", "gradient") and R > 1:
        yield "rows_per_pass", half(R)
    if config.rollout.prefixes > 1:
        yield "rollout.prefixes", 1
    if stage == "decoding" and decoded > 1:
        yield "score.together", half(decoded)
    if stage in ("branches", "replay", "gradient") and B > 1:
        yield "rollout.together", half(min(B, rows - 1))
    if config.policy.train == "lora" and config.policy.rank > 8:
        yield "policy.rank", half(config.policy.rank)
    if config.rollout.cache_frames > least:
        yield (
            "rollout.cache_frames",
            max(least, config.rollout.cache_frames - 2 * sizes.geometry.block),
        )


def fitted(
    config: RunConfig, sizes: Sizes, c: Costs, room: float, world: int = 1
) -> tuple[dict[str, Any], float]:
    """Find changes that bring every stage under ``room`` GiB, as far as they go.

    Returns the changes and the peak with them, GiB.
    """
    made: dict[str, Any] = {}
    while True:
        now = with_changes(config, made)
        memory = {
            stage: sum(parts.values())
            for stage, parts in stages(now, sizes, _with_rank(c, config, now), world).items()
        }
        stage = max(memory, key=memory.__getitem__)
        options = [] if memory[stage] <= room * GIB else list(changes(now, sizes, stage))
        if not options:
            return made, memory[stage] / GIB
        made |= dict(options[:1])


def _with_rank(c: Costs, old: RunConfig, new: RunConfig) -> Costs:
    """A LoRA's size is proportional to its rank."""
    share = new.policy.rank / old.policy.rank if old.policy.train == "lora" else 1.0
    return c.with_trainable(share)
