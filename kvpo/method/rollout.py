"""Stage 2: one prefix, and from its fork on all branches and their anchor in one batch.

The reasons are in method.md, section 2.

    forks     which block the group leaves its story at
    prefix    the past up to there, of several groups side by side
    branches  every row from there on

Here they are put together, and random streams are named after the group.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import torch

from kvpo.common.rng import Name, stream
from kvpo.common.timing import Phases
from kvpo.generators.pipeline import Pipeline
from kvpo.generators.sampler import NamedNoise, Sampler
from kvpo.method.branches import generate_branches, joined
from kvpo.method.explorers import Explorer, forks_of
from kvpo.method.forks import check_fork, check_room, draw_fork
from kvpo.method.objectives.interface import EVERYTHING, Record
from kvpo.method.prefix import PrefixPlan, Start, generate_starts, latents
from kvpo.method.settings import RolloutConfig
from kvpo.types import BranchPlan, Rollout, Script, Trajectory, Window

Held = Callable[[int], Sequence[int]]
"""Fork -> blocks of the prefix whose network inputs are kept."""


def roll_out(
    pipeline: Pipeline,
    sampler: Sampler,
    explorer: Explorer,
    config: RolloutConfig,
    script: Script,
    embeddings: Mapping[str, torch.Tensor],
    seed: int,
    name: Name,
    phases: Phases,
    fork: int | None = None,
    horizon: Callable[[Window], int] | None = None,
    held: Held = lambda fork: (),
    own: range | None = None,
    needs: Collection[Record] = EVERYTHING,
) -> Rollout:
    """Roll out a group under ``script`` with the weights now in the pipeline.

    ``name`` names its random streams.

    ``fork``: fork block (default: drawn among the eligible ones). ``horizon``: the block to stop
    before, but never within the window (default: the whole script). ``held``: fork -> blocks of the
    prefix whose network inputs are kept. ``own``: those of the G branches that are generated here
    (default: all), beside the anchor. ``needs``: what is recorded of the window.
    """
    with phases("prefix"):
        (start,) = start_groups(
            pipeline, sampler, explorer, config, [script], embeddings, seed, [name], [held], [fork]
        )
    return roll_out_branches(
        pipeline, explorer, config, start, seed, name, phases, horizon, own, needs
    )


def start_groups(
    pipeline: Pipeline,
    sampler: Sampler,
    explorer: Explorer,
    config: RolloutConfig,
    scripts: Sequence[Script],
    embeddings: Mapping[str, torch.Tensor],
    seed: int,
    names: Sequence[Name],
    held: Sequence[Held],
    forks: Sequence[int | None] | None = None,
    stories: Sequence[Name] | None = None,
) -> list[Start]:
    """The pasts of some groups, one a script and name, generated side by side.

    ``forks``: fork blocks (default, and None in it: drawn). ``stories``: names of the prefixes'
    noise (default: the groups' own); groups of one script and story share their prefix.
    """
    geometry = pipeline.geometry
    shape = pipeline.latent_shape(geometry.block)
    asked, told = forks or [None] * len(names), stories or names
    for script in scripts:
        check_room(explorer, config, script.blocks, geometry)
    plans = []
    for script, name, fork, story, holds in zip(scripts, names, asked, told, held):
        check_fork(explorer, script, geometry, fork)
        if fork is None:
            fork = draw_fork(forks_of(explorer, script, geometry), seed, name)
        window = Window(fork, explorer.window_blocks)
        noise = NamedNoise(shape, seed, (*story, "noise"))
        plans.append(PrefixPlan(script, window, noise, holds(fork)))
    return generate_starts(pipeline, sampler, plans, embeddings, config.cache_frames)


def roll_out_branches(
    pipeline: Pipeline,
    explorer: Explorer,
    config: RolloutConfig,
    start: Start,
    seed: int,
    name: Name,
    phases: Phases,
    horizon: Callable[[Window], int] | None = None,
    own: range | None = None,
    needs: Collection[Record] = EVERYTHING,
) -> Rollout:
    """A group from its past on; arguments as in `roll_out`."""
    geometry, window = pipeline.geometry, start.window
    draws, resident = stream(seed, *name, "plan"), start.past.cache.resident
    plans = explorer.plan(window, geometry, config.branches, draws, resident)
    own = range(config.branches) if own is None else own
    plans = (*plans[own.start : own.stop], BranchPlan())
    stop = start.script.blocks if horizon is None else max(horizon(window), window.stop)
    size = config.together or len(plans)
    with phases("branches"):
        parts = [
            generate_branches(pipeline, start, plans[i : i + size], own.start + i, stop, needs)
            for i in range(0, len(plans), size)
        ]
    rows = joined(parts)
    in_window = rows.latents[:, : window.blocks * geometry.block]
    clean = in_window.unflatten(1, (window.blocks, geometry.block))
    return Rollout(
        start.script,
        window,
        plans,
        Trajectory(rows.inputs, rows.velocities, clean),
        latents(start.past),
        rows.latents,
        start.past.cache,
        start.held,
        start.decoder,
    )
