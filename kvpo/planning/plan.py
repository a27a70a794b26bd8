"""`kvpo plan`: memory, work and time of a recipe before anything is loaded.

It also says what would make the recipe fit.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvpo.common.wording import count_of, in_time
from kvpo.config import RunConfig
from kvpo.distributed.ranks import Ranks
from kvpo.planning.amounts import Amounts, amounts, groups_of, reward_memory
from kvpo.planning.cards import CARDS, sold_as
from kvpo.planning.costs import GIB, Costs, Sizes, costs, sizes_of
from kvpo.planning.memory import fitted, stages
from kvpo.planning.work import as_options, replays_beside, savings, work

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
        *_work(config, world, card, by_phase, counted, price),
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


def _savings(saved: Mapping[str, float]) -> list[str]:
    if not saved:
        return []
    return [
        "",
        "what each of these would save of a group's operations, by itself; what is learnt by what is left, no count says:",
        *(f"  {options:<52}{share:>6.0%}" for options, share in saved.items()),
    ]


def _work(
    config: RunConfig, world: int, card: str, found: Mapping[str, float], n: Amounts, price: float
) -> list[str]:
    """Say what a group costs; ``found``: its operations by phase."""
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
