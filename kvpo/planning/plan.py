"""`kvpo plan`: memory, work and time of a recipe before anything is loaded.

It also says what would make the recipe fit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from kvpo.common.wording import count_of, in_time
from kvpo.config import RunConfig
from kvpo.distributed.ranks import Ranks
from kvpo.generators.preview import RELEASED
from kvpo.planning.amounts import (
    Amounts,
    amounts,
    begun_of,
    contexts_of,
    decoded_together,
    groups_of,
    has_setting,
    members_of,
    own_past,
    prefixes_of,
    replay_rows,
    replayed_pairs,
    reward_memory,
    rows_of,
    shape_of,
    side_by_side,
    velocities_of,
    with_changes,
)
from kvpo.planning.cards import CARDS, sold_as
from kvpo.planning.costs import GIB, Costs, Sizes, costs, sizes_of

UTILISATION = 0.25
"""Share of the card's rate that is reached.

It is what a group of the paper's shape reached on an H200, 21 to 26 % in every phase
(docs/results.md, claim 5).
"""

SMALL_CALL = 0.01
"""Seconds of a call's operations below which they do not tell its time.

A pass is one to two thousand kernels, and the host takes some millionths of a second for each: the
miniature's step took 3.5 s on an H200 (docs/results.md, claim 5), whose operations are hundredths.
"""


def planned(
    recipe: str,
    config: RunConfig,
    gpus: int,
    nodes: int,
    card: str,
    gpu_memory: float,
    size: str,
    price: float = 0.0,
) -> tuple[list[str], dict[str, Any]]:
    """Plan a recipe; returns the lines to print, and the same as a record.

    Arguments are those of `kvpo.commands.plan.Plan`. Raises ValueError for an impossible geometry.
    """
    if gpus < 1 or nodes < 1 or gpu_memory < 0 or price < 0:
        raise ValueError(
            f"--gpus {gpus} and --nodes {nodes} must be 1 or more, --gpu-memory {gpu_memory} and --price {price} not negative"
        )
    shares = shares_of(config.groups, nodes, gpus, config.branch_parallel)
    room = sold_as(gpu_memory) if gpu_memory else CARDS[card].room
    sizes = sizes_of(config, size)
    world = nodes * gpus
    found = costs(config, sizes)
    counted = amounts(config, sizes.geometry, world, found.decoding(config).field)
    saved = savings(config, sizes, found, world)
    memory = stages(config, sizes, found, world)
    by_phase = work(config, sizes, found, counted)
    step = step_seconds(config, world, card, by_phase)
    lines = [
        *_head(recipe, config, sizes, found),
        *_memory(memory, room),
        *_advice(config, sizes, found, room, world),
        *_work(config, world, card, sizes, found, counted, price),
        *_savings(saved),
        *_geometry(nodes, gpus, shares),
    ]
    content = {
        "recipe": recipe,
        "sizes": sizes.source,
        "stages GiB": {s: {k: v / GIB for k, v in parts.items()} for s, parts in memory.items()},
        "amounts": vars(counted),
        "TFLOP of a group": {phase: flops / 1e12 for phase, flops in by_phase.items()},
        "saved by": saved,
        "peak GiB": max(sum(parts.values()) for parts in memory.values()) / GIB,
        "room GiB": room,
        "s of a step": step,
        "GPU-hours": world * config.steps * step / 3600,
    }
    return lines, content


def step_seconds(config: RunConfig, world: int, card: str, of_group: Mapping[str, float]) -> float:
    """Seconds of a step without rewards, from a group's operations by phase."""
    rate = CARDS[card].tflops * 1e12 * UTILISATION
    return groups_of(config, world) * sum(of_group.values()) / rate


def stages(config: RunConfig, sizes: Sizes, c: Costs, world: int = 1) -> dict[str, dict[str, int]]:
    """Bytes on one of ``world`` devices in every stage of a step, by part.

    Passes cost as many times their row's bytes as they have rows.
    """
    g, B, R = sizes.geometry, side_by_side(config), replay_rows(config, sizes.geometry)
    rollout_own, replay_own = own_past(config, sizes.geometry)
    shape, members = shape_of(config, g), members_of(config, g)
    members = min(config.rollout.together or members, members)
    latent = 4 * g.block * sizes.transformer["in_channels"] * g.latent_height * g.latent_width
    rows, P, S = rows_of(config), config.exploring.window_blocks, len(g.sigmas)
    prefixes, pasts = prefixes_of(config, world), begun_of(config, world)
    trained = 4 * c.trainable
    stay, come = reward_memory(config)
    always = (
        {"generator": c.weights, "VAE": c.vae}
        | ({"preview decoder": c.preview.weights} if config.score.preview and c.preview else {})
        | _kept(config, c, world)
        | ({"rewards": stay} if stay else {})
        | ({"merged weights": c.maps} if config.policy.merge_rollouts else {})
    )
    if config.data.prompts == "mini":
        always |= {"text encoder": c.text_encoder}
    if groups_of(config, world) > 1:
        always |= {"gradient so far": trained}
    # the last of them with its latents up to the end
    kept = groups_of(config, world) if config.keeps_groups else 1
    parts = len(config.recorded & {"inputs", "velocities"})
    made = shape.copies * rows * P * shape.steps * latent
    beside_it = {"made for the replay": made} if made else {}
    stored = {
        "shared past": max(pasts, kept) * config.rollout.cache_frames * c.frame,
        "trajectories": kept * rows * P * latent * (parts * S + 1)
        + rows * (config.data.blocks - P) * latent,
    }
    bank = g.bank * c.frame
    # of prefixes decoded side by side one state is kept for each
    decoders = decoded_together(config) + pasts - 1
    swapped = (
        {}
        if config.dtype == "float32" or _sharded(config, world)
        else {"weights swapped in": 2 * c.trainable}
    )
    return {
        "prefix": always
        | {
            "shared past": stored["shared past"] + pasts * bank,
            "one pass": prefixes * c.prefix.bytes,
        },
        "branches": always
        | stored
        | {
            "branches' own past": B * (rollout_own * c.frame + bank),
            "one pass": _scaled(c.branches.bytes, B, c, "branches"),
        }
        | swapped,
        "decoding": always
        | stored
        | {"decoder at work": _scaled(c.decoding(config).rows.bytes, decoders, c, "decode_rows")},
        "scoring": always | stored | ({"reward at work": come} if come else {}),
        "replay": always
        | stored
        | beside_it
        | {
            "branches' own past": members * (replay_own * c.frame + bank),
            "one pass": _scaled(c.replay.bytes, R, c, "replay"),
        }
        | swapped,
        "gradient": always
        | stored
        | beside_it
        | {
            "branches' own past": members * (replay_own * c.frame + bank),
            "activations": _scaled(c.gradient.bytes, R, c, "gradient"),
            "gradient": trained,
        },
        "update": always
        | {
            "gradient": trained,
            "optimizer at work": 2 * trained // (world if _sharded(config, world) else 1),
        },
    }


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


# --- What is said ---


def _head(recipe: str, config: RunConfig, sizes: Sizes, c: Costs) -> list[str]:
    g = sizes.geometry
    bank = f", bank {g.bank}" if g.bank else ""
    checkpoint = 6 * 4 * c.trainable  # four sets of weights and two moments
    return [
        f"{recipe}: {sizes.source}",
        f"  streams {count_of(config.data.blocks, 'block')} of {g.block} latent frames, {g.latent_height} x {g.latent_width}, window {g.window}, sink {g.sink}{bank}",
        f"  generator {c.weights / GIB:.2f} GiB, text encoder {c.text_encoder / GIB:.2f} GiB (gone before the first step where prompts come from a file), VAE {c.vae / GIB:.2f} GiB",
        f"  {c.trainable / 1e6:.1f} M trained numbers; a checkpoint is {checkpoint / GIB:.2f} GiB on disk, {config.checkpoint.keep} are kept",
        "",
    ]


def _memory(memory: dict[str, dict[str, int]], room: float) -> list[str]:
    names = list(dict.fromkeys(name for parts in memory.values() for name in parts))
    width = max(map(len, names))
    unit, label = (
        (2**20, "MiB") if max(sum(p.values()) for p in memory.values()) < GIB else (GIB, "GiB")
    )
    lines = [
        f"{f'memory of a card, {label}':<{width}}" + "".join(f"{stage:>11}" for stage in memory)
    ]
    lines += [
        f"{name:<{width}}"
        + "".join(
            f"{parts[name] / unit:>11.2f}" if name in parts else f"{'':>11}"
            for parts in memory.values()
        )
        for name in names
    ]
    totals = [sum(parts.values()) for parts in memory.values()]
    return [
        *lines,
        f"{'together':<{width}}" + "".join(f"{t / unit:>11.2f}" for t in totals),
        f"peak {max(totals) / GIB:.1f} of {room:.1f} GiB",
        "",
    ]


def _advice(config: RunConfig, sizes: Sizes, c: Costs, room: float, world: int) -> list[str]:
    made, peak = fitted(config, sizes, c, room, world)
    if not made and peak <= room:
        return ["It fits.", ""]
    settings = as_options(made)
    away = (
        f"Rewards that are trained on stay in {stay / GIB:.1f} GiB; `offload: true` lets them come and go. "
        if (stay := reward_memory(config)[0])
        else ""
    )
    if peak <= room:
        return [
            f"It does NOT fit as it is; with {settings} it would: {peak:.1f} GiB. {away}The numbers stay the same but for rank and cache_frames.",
            "",
        ]
    more = "" if config.gradient_checkpointing else " Turn gradient_checkpointing on."
    more += "" if config.dtype == "bfloat16" else " Set dtype bfloat16."
    more += (
        ""
        if config.policy.train == "lora" or config.policy.shard
        else " Set policy.shard, and take several cards."
    )
    return [
        f"It does NOT fit, and no setting here makes it: with {settings or 'nothing to change'} the peak is {peak:.1f} GiB.{more} {away}Or take a larger card, a smaller window, a smaller grid.",
        "",
    ]


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


def _savings(saved: Mapping[str, float]) -> list[str]:
    if not saved:
        return []
    return [
        "",
        "what each of these would save of a group's operations, by itself; what is learnt by what is left, no count says:",
        *(f"  {options:<52}{share:>6.0%}" for options, share in saved.items()),
    ]


def _work(
    config: RunConfig, world: int, card: str, sizes: Sizes, c: Costs, n: Amounts, price: float
) -> list[str]:
    found = work(config, sizes, c, n)
    rate, step = CARDS[card].tflops * 1e12 * UTILISATION, step_seconds(config, world, card, found)
    updates = config.inner_updates
    title = (
        "one group, mean over forks"
        if config.branch_parallel == 1
        else "a card's share of one group"
    )
    lines = [f"{title:<28}{'calls':>9}{'TFLOP':>12}{'s':>9}"]
    calls = {
        "prefix": n.prefix_calls,
        "branches and anchor": n.branch_calls,
        "replays without gradient": replays_beside(n, updates) * n.replay_calls,
        "replay with gradient": updates * n.replay_calls,
    }
    lines += [
        f"{name:<28}{f'{calls[name]:.0f}' if name in calls else '':>9}{work / 1e12:>12.3g}{work / rate:>9.3g}"
        for name, work in found.items()
    ]
    lines += [
        f"{'together':<28}{sum(calls.values()):>9.0f}{sum(found.values()) / 1e12:>12.3g}{sum(found.values()) / rate:>9.3g}",
        f"decoded: {n.decoded_prefix:.0f} latent frames of the prefix, {n.decoded_rows:.0f} of branches and anchor; scored: {n.scored:.0f} pixel frames",
        f"a step: {count_of(config.groups, 'group')} on {world} x {card}: about {in_time(step)} without rewards ({UTILISATION:.0%} of {CARDS[card].tflops} TFLOP/s); "
        f"{count_of(config.steps, 'step')}: {in_time(config.steps * step)}",
    ]
    each = sum(found.values()) / rate / sum(calls.values())
    if each < SMALL_CALL:
        lines.append(
            f"a call's operations take {1000 * each:.2g} ms at this rate: the host's time between small kernels, which is not counted, will be many times that"
        )
    hours = world * config.steps * step / 3600
    return [*lines, f"{hours:.3g} GPU-hours" + (f", {hours * price:.3g} euros" if price else "")]


def shares_of(groups: int, nodes: int, gpus: int, row: int = 1) -> list[range]:
    """Groups of a step that every rank has, rank = node x gpus + card.

    ``row`` neighbours share theirs. Raises ValueError where one would have none, or a row is not
    full.
    """
    world = nodes * gpus
    if world % row:
        raise ValueError(
            f"{world} cards are no multiple of branch_parallel = {row}: so many share a group; give a multiple of it, or set branch_parallel to 1"
        )
    return [Ranks(rank // row, world // row).share(groups) for rank in range(world)]


def _geometry(nodes: int, gpus: int, shares: list[range]) -> list[str]:
    if len(shares) == 1:
        return []
    most, idle = len(shares[0]), sum(len(s) < len(shares[0]) for s in shares)

    def name(share):
        return " ".join(map(str, share))

    rows = [(n, shares[n * gpus : (n + 1) * gpus]) for n in range(nodes)]
    waits = (
        f"; {idle} of {len(shares)} ranks wait while the others make their last: set groups to a multiple of {len(shares)}"
        if idle
        else ""
    )
    return [
        "",
        f"{count_of(nodes, 'node')} of {count_of(gpus, 'card')}, up to {count_of(most, 'group')} a rank{waits}",
        *(
            f"  node {n}: ranks {n * gpus} to {(n + 1) * gpus - 1}, groups {' | '.join(map(name, own))}"
            for n, own in rows
        ),
    ]
