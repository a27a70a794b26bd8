"""The schedule of the paper's public code: batch 1, every branch and every velocity alone.

It gives the same numbers as the batched one, and is measured beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from kvpo.common.rng import stream
from kvpo.common.timing import Phases
from kvpo.generators.history import Routed
from kvpo.generators.sampler import NamedNoise
from kvpo.method.branches import PlannedNoise, branch_out
from kvpo.method.prefix import PrefixPlan, generate_prefixes
from kvpo.types import BranchPlan, Rollout, Script, Trajectory, Window


def one_by_one(
    run: Any,
    script: Script,
    embeddings: Mapping[str, torch.Tensor],
    fork: int,
    name: tuple[int | str, ...],
    phases: Phases,
) -> Rollout:
    """Roll the group out branch after branch, to the script's end.

    The prefix is generated once, as in the other schedule. ``run`` has the parts of a run that the
    rollout needs: config, pipeline and sampler.
    """
    g, seed, explorer = run.pipeline.geometry, run.config.seed, run.config.exploring
    window = Window(fork, explorer.window_blocks)
    noise = NamedNoise(run.pipeline.latent_shape(g.block), seed, (*name, "noise"))
    with phases("prefix"):
        (prefix,), _ = generate_prefixes(
            run.pipeline,
            run.sampler,
            [PrefixPlan(script, window, noise)],
            embeddings,
            run.config.rollout.cache_frames,
        )
    plans = explorer.plan(
        window, g, run.config.rollout.branches, stream(seed, *name, "plan"), prefix.cache.resident
    )
    plans = (*plans, BranchPlan())
    with phases("branches"):
        parts = [_alone(run, prefix, plan, noise, window) for plan in plans]
    inputs, velocities, cleans, latents = (torch.cat(x) for x in zip(*parts))
    return Rollout(
        script,
        window,
        plans,
        Trajectory(inputs, velocities, cleans),
        torch.cat(prefix.blocks, dim=1)[0],
        latents,
        prefix.cache,
    )


def _alone(run: Any, prefix, plan: BranchPlan, noise: NamedNoise, window: Window):
    """One branch: inputs and velocities [1, P, S, F, C, H, W], cleans and all latents."""
    g = run.pipeline.geometry
    branch = branch_out(run.pipeline, prefix, (plan,), PlannedNoise(noise, (plan,), window), window)
    steps, history = [], Routed(g.history, (plan,), window, g.block)
    for block in range(window.fork, prefix.scripts[0].blocks):
        branch.advance(
            *((history, lambda i, x, v: steps.append((x, v))) if block in window else ())
        )
    after = branch.blocks[window.fork :]
    z, u = (torch.stack(x, dim=1).unflatten(1, (window.blocks, len(g.sigmas))) for x in zip(*steps))
    return z, u, torch.stack(after[: window.blocks], dim=1), torch.cat(after, dim=1)
