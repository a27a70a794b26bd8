"""One group of the recipe, and what its rows must have in common.

They share the start noise, the prefix, the decoder and the policy; an explorer whose plans are
empty makes every row the anchor.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from kvpo.common.timing import Phases
from kvpo.doctor.finding import Finding, at_most, relative, spread
from kvpo.doctor.prefix_reads import WatchedGenerator
from kvpo.doctor.preview_ranks import preview_agreement
from kvpo.method.explorers import Exploration, Explorer
from kvpo.method.replay import CONTEXTS, Replay
from kvpo.method.rollout import roll_out_branches, start_groups
from kvpo.runs.parts import Parts
from kvpo.types import BranchPlan, Rollout


@dataclass(frozen=True)
class EmptyPlans(Exploration):
    """An explorer whose every plan is the anchor's."""

    explorer: Explorer

    deterministic_replay: ClassVar[bool] = True

    @property
    def window_blocks(self) -> int:
        return self.explorer.window_blocks

    @property
    def nearest(self) -> int:
        return self.explorer.nearest

    def eligible_forks(self, blocks, geometry):
        return self.explorer.eligible_forks(blocks, geometry)

    def plan(self, window, geometry, num_branches, generator, resident=None):
        return (BranchPlan(),) * num_branches


class Group:
    """One group of the recipe: a past that it is rolled out from again and again."""

    def __init__(self, run: Parts):
        self.run = run
        self.name = ("doctor",)
        config, script = run.config, run.source.script(0, 0)
        self.embeddings = run.embed(script)
        with run.policy.using(run.policy.behaviour):
            (self.start,) = start_groups(
                run.pipeline,
                run.sampler,
                config.exploring,
                config.rollout,
                [script],
                self.embeddings,
                config.seed,
                [self.name],
                [lambda fork: ()],
            )
        self.watched = WatchedGenerator(run.pipeline.generator, self.start.past.cache)

    def roll(self, explorer: Explorer) -> Rollout:
        """The group by an explorer, its passes watched."""
        run, config = self.run, self.run.config
        with run.policy.using(run.policy.behaviour):
            return roll_out_branches(
                replace(run.pipeline, generator=self.watched),
                explorer,
                config.rollout,
                self.start,
                config.seed,
                self.name,
                Phases(),
            )

    def replay(self, rollout: Rollout, rows: Sequence[int] | None = None, size: int = 0) -> Replay:
        """The group's replay; ``size``: most velocities in a pass, 0 = all."""
        config = self.run.config
        return Replay(
            self.run.pipeline,
            rollout,
            self.embeddings,
            CONTEXTS[config.context],
            config.energy,
            rows,
            size,
            config.rollout.together,
        )


def check_rows(group: Group, rollout: Rollout, tolerance: float) -> Iterator[Finding]:
    """Check what the rows of a group have in common: start noise, prefix, decoder, policy."""
    routed = any(plan.frames for plan in rollout.plans)
    inputs = rollout.trajectory.inputs
    assert inputs is not None, "all of the window was recorded"
    yield at_most(
        "branches start from the same noise: first inputs differ by",
        spread(inputs[:, 0, 0]) if routed else 0.0,
        0.0,
    )
    if group.watched.left:  # videos of their own have no prefix
        yield group.watched.finding()
    yield at_most(
        "rows decoded on from the prefix: equal latents differ by", _decoded_apart(rollout), 0.0
    )
    if group.run.pipeline.preview is not None:
        yield from _preview(group.run, rollout)
    yield at_most(
        "the anchor, replayed by the weights that made it: energy",
        float(group.replay(rollout, [rollout.num_branches]).energies()),
        tolerance,
    )


def _decoded_apart(rollout: Rollout) -> float:
    """Decode the anchor's first frame in all rows, twice, and compare.

    Every row starts from the same state, and decoding leaves that state as it was.
    """
    assert rollout.decoder is not None, "a group that went on from its past has one"
    decoder = rollout.decoder()
    rows = rollout.latents[-1:, :1].expand(len(rollout.plans), -1, -1, -1, -1)
    return spread(torch.cat([decoder.fork(len(rows))(rows) for _ in range(2)]).float())


def _preview(run: Parts, rollout: Rollout) -> Iterator[Finding]:
    """Give a line a reward and signal, which is no rule: what training on the preview follows."""
    found = preview_agreement(run, rollout)
    for (signal, name), rank in found.ranks.items():
        yield Finding(
            f"preview decoder: ranks of {name}, {signal}, with the VAE's",
            rank,
            f"1 = the same order of {len(rollout.plans)} rows; pixels differ by {found.pixels:.2f} of 255",
            True,
        )


def check_energies(
    explorer: Explorer, replay, rollout: Rollout, tolerance: float
) -> Iterator[Finding]:
    """Check the branches' energies; those that the unrouted policy makes itself have none."""
    energy = replay(rollout).energies()
    if explorer.deterministic_replay:
        name = "branches of other noise, replayed: largest energy"
        yield at_most(name, float(energy.max()), tolerance)
        return
    yield at_most(
        "replay one velocity at a time against all at once, relative",
        relative(replay(rollout, size=1).energies(), energy),
        1e-4,
    )
    yield Finding(
        "energies of the branches: spread / mean",
        float(energy.std() / energy.mean()),
        "> 0: not all equal",
        float(energy.std()) > 0.0,
    )
