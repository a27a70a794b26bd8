"""Forks: the blocks at which a group may leave its story, and which of them it gets.

Blocks at which an explorer's window fits are `kvpo.method.explorers.forks_of`; here they are
checked against what a user asks for, and drawn.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kvpo.common.rng import Name, stream
from kvpo.generators.geometry import Geometry
from kvpo.method.explorers import Explorer, forks_of
from kvpo.method.settings import RolloutConfig
from kvpo.types import Script


def check_room(explorer: Explorer, config: RolloutConfig, blocks: int, geometry: Geometry) -> None:
    """Check, before anything is generated, that settings and generator fit.

    Raises ValueError if no block can be a fork, or the cache is too small.
    """
    eligible = explorer.eligible_forks(blocks, geometry)
    if config.forks > len(eligible):
        raise ValueError(
            f"rollout.forks = {config.forks}, but a video of {blocks} blocks can be forked at {len(eligible)}: {eligible}; lower it, or lengthen the videos"
        )
    if config.cache_frames < (least := geometry.resident(blocks)):
        raise ValueError(
            f"rollout.cache_frames = {config.cache_frames}, but this generator (sink {geometry.sink}, window {geometry.window}) streams {blocks} blocks "
            f"from a cache of at least {least} latent frames; set {least} or more, routing draws from what is beyond the window"
        )


def check_fork(explorer: Explorer, script: Script, geometry: Geometry, fork: int | None) -> None:
    """Check that a story can be forked at all, and at ``fork`` where one is asked for.

    Raises ValueError where not; the generator need not be loaded for it.
    """
    eligible = forks_of(explorer, script, geometry)
    if fork is not None and fork not in eligible:
        raise ValueError(
            f"block {fork} can not be a fork of script {script.id!r}; eligible are {eligible}"
        )


def draw_fork(eligible: Sequence[int], seed: int, name: Name) -> int:
    """The fork block of the group ``name``: each eligible one is as likely as any other."""
    generator = stream(seed, *name, "fork")
    return eligible[int(torch.randint(len(eligible), (), generator=generator))]


def spread_forks(eligible: Sequence[int], count: int, generator: torch.Generator) -> list[int]:
    """Fork blocks of ``count`` groups on one prefix, evenly spread: early, middle, late.

    One random number places all of them, ascending; each eligible block is as likely as any other.
    """
    step = len(eligible) / count
    first = step * float(torch.rand((), generator=generator, dtype=torch.float64))
    return [eligible[min(int(first + i * step), len(eligible) - 1)] for i in range(count)]
