"""Effect of each denoise step on the branches, and its share of their energy.

says    its share of the energy, with the recipe's step weights
does    how far the window's latents move from the anchor's when only this step reads the routed
        past and all else, the clean pass included, the deployed one; as a share of what they move
        when all of it is routed (squared, mean over branches)

A step that says much and does little takes gradient from where the video is decided
(`velocity_energy.weights`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch

from kvpo.generators.history import Routed
from kvpo.generators.pipeline import Pipeline
from kvpo.generators.sampler import Stream, denoise_block
from kvpo.method.branches import PlannedNoise, branch_out
from kvpo.method.energies import Surrogate, VelocityEnergy
from kvpo.method.prefix import Start
from kvpo.method.replay import Context, Replay
from kvpo.types import BranchPlan, Rollout


@dataclass(frozen=True)
class StepEffect:
    sigma: float
    weight: float
    """Weight of the step in the energy."""
    says: float
    does: float


def step_effects(
    pipeline: Pipeline,
    start: Start,
    rollout: Rollout,
    embeddings: Mapping[str, torch.Tensor],
    context: Context,
    energy: Surrogate,
    together: int = 0,
) -> list[StepEffect]:
    """Effects of every denoise step, on one group; ``together``: most rows at a time, 0 = all."""
    sigmas = pipeline.geometry.sigmas
    weights = energy.step_weights(sigmas)
    alone = [
        VelocityEnergy(tuple(float(s == t) for t in range(len(sigmas)))) for s in range(len(sigmas))
    ]
    by_step = torch.stack(
        [
            Replay(pipeline, rollout, embeddings, context, e, together=together).energies().mean()
            for e in alone
        ]
    )
    says = weights * by_step / (weights * by_step).sum()
    does = _moved(pipeline, start, rollout.plans[:-1], together)
    return [StepEffect(*map(float, found)) for found in zip(sigmas, weights, says, does)]


def _moved(
    pipeline: Pipeline, start: Start, plans: Sequence[BranchPlan], together: int
) -> list[float]:
    steps, found = range(len(pipeline.geometry.sigmas)), []
    size = max(1, together - 1) if together else len(plans)
    for part in (tuple(plans[i : i + size]) for i in range(0, len(plans), size)):
        ways = [([s], False) for s in steps] + [(steps, True)]
        found.append([_apart(window_latents(pipeline, start, part, *way)) for way in ways])
    *alone, whole = (sum(column) for column in zip(*found))
    return [moved / whole for moved in alone]


def _apart(x0_BNCHW: torch.Tensor) -> float:
    """Sum over branches of their squared distance from the anchor, the last row."""
    return float((x0_BNCHW[:-1] - x0_BNCHW[-1:]).double().square().sum())


@torch.no_grad()
def window_latents(
    pipeline: Pipeline,
    start: Start,
    plans: Sequence[BranchPlan],
    routed: Collection[int],
    clean: bool,
) -> torch.Tensor:
    """x0_BNCHW of the window, branches and then the anchor.

    Only the denoise steps ``routed`` read by plan, and the clean pass if ``clean``.
    """
    window, rows = start.window, (*plans, BranchPlan())
    noise = PlannedNoise(start.noise, rows, window)
    stream = branch_out(pipeline, start.past, rows, noise, window)
    by_plan = Routed(stream.geometry.history, rows, window, stream.geometry.block)
    for _ in range(window.blocks):
        _advance(stream, by_plan, routed, clean)
    return torch.cat(stream.blocks[window.fork :], dim=1)


def _advance(stream: Stream, by_plan: Routed, routed: Collection[int], clean: bool) -> None:
    """Generate and commit the next block as `window_latents` says.

    `Stream.advance` reads one past throughout a block.
    """
    stream.switch()
    g, block, noise = stream.geometry, len(stream.blocks), stream.noise
    assert stream.sampler is not None and noise is not None, "what goes on has both"
    frames, text = list(range(block * g.block, (block + 1) * g.block)), stream.text(block)
    past = {True: by_plan.past(frames[0], g.block), False: g.history.past(frames[0], g.block)}

    def velocity(x: torch.Tensor, sigma: float) -> torch.Tensor:
        read = past[g.sigmas.index(sigma) in routed]
        return stream.model.velocity(x, sigma, text, frames, stream.cache, read)

    x0 = denoise_block(
        velocity,
        stream.sampler,
        g.sigmas,
        stream.of_all_rows(noise.start(block)),
        lambda i: stream.of_all_rows(noise.renoise(block, i)),
    )
    stream.model.commit(x0, text, frames, stream.cache, past[clean])
    stream.blocks.append(x0)
