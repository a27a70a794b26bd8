"""Stage 2, second half: rows that leave one prefix, each as its plan says, in one batch.

All rows read one shared cache, and everything but the plans is shared bit for bit: prefix, start
noise, re-noise, prompts, tail noise. The anchor is the row whose plan is empty; it goes through the
same code in the same batch.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from kvpo.generators.geometry import Geometry
from kvpo.generators.history import Routed
from kvpo.generators.pipeline import Pipeline
from kvpo.generators.sampler import NamedNoise, Noise, Ode, OwnSteps, Sampler, Stream
from kvpo.method.explorers import mix_noise
from kvpo.method.objectives.interface import Record
from kvpo.method.prefix import Start
from kvpo.types import BranchPlan, Script, Window


@dataclass(frozen=True)
class BranchRows:
    """Some rows of a group from the fork on, and what was recorded of their window."""

    inputs: torch.Tensor | None
    """z_BPSFCHW, network inputs; None where nobody asked for them."""
    velocities: torch.Tensor | None
    """u_BPSFCHW, the network's velocities there; likewise."""
    latents: torch.Tensor
    """x0_BNCHW, all frames from the fork on."""


def generate_branches(
    pipeline: Pipeline,
    start: Start,
    plans: tuple[BranchPlan, ...],
    first: int,
    stop: int,
    needs: Collection[Record],
) -> BranchRows:
    """Generate some rows of a group from the fork to block ``stop``.

    ``first``: number of the first plan's branch in its group. ``needs``: what is recorded.
    """
    geometry, window = pipeline.geometry, start.window
    noise = PlannedNoise(start.noise, plans, window, first)
    branches = branch_out(pipeline, start.past, plans, noise, window)
    history = Routed(geometry.history, plans, window, geometry.block)
    seen: dict[Record, list[torch.Tensor]] = {"inputs": [], "velocities": []}

    def record(step: int, x: torch.Tensor, v: torch.Tensor) -> None:
        if "inputs" in needs:
            seen["inputs"].append(x)
        if "velocities" in needs:
            seen["velocities"].append(v)

    assert branches.sampler is not None, "branches are generated, not only committed to"
    deployed, own = branches.sampler, own_steps(branches.sampler, plans, geometry)
    plain = branches.scripts, branches.embeddings
    told = told_otherwise(branches, plans, window)
    for block in range(window.fork, stop):
        branches.sampler = own if block in window else deployed
        branches.scripts, branches.embeddings = told if block in window else plain
        branches.advance(*((history, record) if block in window else ()))
    shape = (window.blocks, len(geometry.sigmas))
    inputs, velocities = (
        torch.stack(x, dim=1).unflatten(1, shape) if x else None for x in seen.values()
    )
    return BranchRows(inputs, velocities, torch.cat(branches.blocks[window.fork :], dim=1))


def joined(parts: Sequence[BranchRows]) -> BranchRows:
    """All rows of a group, of parts that were generated one after another."""

    def of_all(records: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
        return None if records[0] is None else torch.cat(records)

    return BranchRows(
        of_all([part.inputs for part in parts]),
        of_all([part.velocities for part in parts]),
        torch.cat([part.latents for part in parts]),
    )


def branch_out(
    pipeline: Pipeline, prefix: Stream, plans: tuple[BranchPlan, ...], noise: Noise, window: Window
) -> Stream:
    """All rows, continuing from the prefix."""
    cache = prefix.cache.fork(len(plans), own_frames(prefix.geometry, prefix.scripts[0], window))
    branches = Stream(
        pipeline.generator,
        prefix.geometry,
        prefix.sampler,
        prefix.scripts,
        prefix.embeddings,
        noise,
        cache,
        prefix.blocks,
    )
    branches.reencoded = len(prefix.blocks)
    return branches


def own_frames(geometry: Geometry, script: Script, window: Window) -> int:
    """Frames that each row keeps of its own: what a block can read, and the block itself.

    A switch inside the window re-encodes frames that branches may have been routed to; those stay
    to the window's end.
    """
    if geometry.window < 0:
        return script.blocks * geometry.block
    switch = next(
        (
            b
            for b in range(window.fork + 1, window.stop)
            if script.segment(b) != script.segment(b - 1)
        ),
        window.stop - 1,
    )
    return geometry.window + geometry.block * (window.stop - switch)


# --- What a plan changes in its row ---


@dataclass(frozen=True)
class PlannedNoise:
    """Noise of each row as its plan says, inside the window; all else as in ``shared``."""

    shared: NamedNoise
    plans: tuple[BranchPlan, ...]
    window: Window
    first: int = 0
    """Number of the first plan's branch in its group, which names its noise."""

    def start(self, block: int) -> torch.Tensor:
        noise = self.shared.start(block)
        if block not in self.window or not any(plan.noise_mix for plan in self.plans):
            return noise
        return torch.stack(
            [
                mix_noise(noise, self._fresh(row, block), plan.noise_mix)
                for row, plan in enumerate(self.plans, self.first)
            ]
        )

    def renoise(self, block: int, step: int) -> torch.Tensor:
        noise = self.shared.renoise(block, step)
        own = [plan.draws(step) for plan in self.plans]
        if block not in self.window or not any(own):
            return noise
        return torch.stack(
            [
                self._of_branch(row).renoise(block, step) if fresh else noise
                for row, fresh in enumerate(own, self.first)
            ]
        )

    def _fresh(self, row: int, block: int) -> torch.Tensor:
        return self._of_branch(row).start(block)

    def _of_branch(self, row: int) -> NamedNoise:
        return NamedNoise(self.shared.shape, self.shared.seed, (*self.shared.name, "branch", row))


def told_otherwise(
    branches: Stream, plans: tuple[BranchPlan, ...], window: Window
) -> tuple[Sequence[Script], Mapping[str, torch.Tensor]]:
    """Scripts and embeddings of a window's rows, of which some plans move the fork's prompt.

    One script for all rows where none does.
    """
    if not any(plan.prompt_shift for plan in plans):
        return branches.scripts, branches.embeddings
    script, embeddings = branches.scripts[0], dict(branches.embeddings)
    here = script.segment(window.fork)
    new, old = (embeddings[script.texts[i]] for i in (here, here - 1))
    scripts = []
    for plan in plans:
        text = script.texts[here]
        if w := plan.prompt_shift:
            text = f"{text} + {w} of its distance from the prompt before"
            embeddings[text] = new + w * (new - old)
        texts = (*script.texts[:here], text, *script.texts[here + 1 :])
        scripts.append(replace(script, texts=texts))
    return scripts, embeddings


def own_steps(deployed: Sampler, plans: tuple[BranchPlan, ...], geometry: Geometry) -> Sampler:
    """The sampler of a window's blocks: the deployed one, stochastic in rows whose plans say so.

    ValueError where the deployed one draws noise itself.
    """
    if not any(plan.step_noise for plan in plans):
        return deployed
    if not isinstance(deployed, Ode):
        raise ValueError(
            f"these branches take the ode sampler's steps with noise, but the sampler is {type(deployed).__name__.lower()}; use sampler ode, or another explorer"
        )
    return OwnSteps(tuple(geometry.sigmas), tuple(plan.step_noise for plan in plans))
