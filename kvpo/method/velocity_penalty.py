"""Penalty on how far velocities of a video's opening move from the start weights'.

It holds what no branch can explore.

    L_hold = weight mean_{b,s,F,C,H,W} (v_theta(z_{b,s}) - v_ref(z_{b,s}))^2        b: blocks before the first eligible fork

Routing needs a choice of frames, so the first blocks of a video are never forked: no reward speaks
for them, yet they move with the weights. The discrete KL compares branches only and does not see
it. Both velocities are taken at the policy's own inputs, in the cache as the rollout left it, so a
block whose past a prompt switch has re-encoded since, or whose past is no longer resident, is not
drawn. For a Gaussian step this is the KL of the two policies up to its scale (Flow-GRPO, arXiv
2505.05470, section 4).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvpo.common.late import Late
from kvpo.types import Rollout, Script

if TYPE_CHECKING:
    import torch

    from kvpo.generators.geometry import Geometry
    from kvpo.generators.pipeline import Pipeline
else:
    torch = Late("torch")


@dataclass(frozen=True)
class VelocityPenalty:
    """The penalty's settings, and which blocks it holds."""

    weight: float = 0.0
    """Strength per velocity squared; 0 = no penalty.
    It acts beside groups' gradients of norm ``optimizer.clip`` each."""
    blocks: int = 1
    """Blocks drawn from every group's opening."""
    steps: tuple[int, ...] = ()
    """Denoise steps at which they are held, counted from 0; empty: all. The others take no time."""

    def __post_init__(self):
        if not 0.0 <= self.weight < float("inf"):
            raise ValueError(
                f"velocity_penalty.weight = {self.weight} must be 0 (none) or positive"
            )
        if self.blocks < 1:
            raise ValueError(
                f"velocity_penalty.blocks = {self.blocks} must be 1 or more; weight 0 turns the penalty off"
            )
        if len(set(self.steps)) != len(self.steps) or any(s < 0 for s in self.steps):
            raise ValueError(
                f"velocity_penalty.steps = {list(self.steps)} must name each denoise step once, counted from 0; leave it empty for all"
            )

    def check(self, geometry: Geometry) -> None:
        """Check that this generator has the steps, before anything is generated.

        Raises ValueError where it has not.
        """
        if self.steps and max(self.steps) >= (S := len(geometry.sigmas)):
            raise ValueError(
                f"velocity_penalty.steps = {list(self.steps)}, but this generator's {S} denoise steps count from 0 to {S - 1}; name some of these, or none for all"
            )

    def draw(
        self,
        script: Script,
        fork: int,
        opening: int,
        geometry: Geometry,
        cache_frames: int,
        generator: torch.Generator,
    ) -> list[int]:
        """Draw the blocks to hold among the first ``opening`` ones of a rollout forked at ``fork``.

        They ascend; all there are where they are fewer than asked.
        """
        if self.weight == 0.0:
            return []
        found = [b for b in replayable(script, fork, geometry, cache_frames) if b < opening]
        return sorted(
            found[i]
            for i in torch.randperm(len(found), generator=generator)[: self.blocks].tolist()
        )


def replayable(script: Script, fork: int, geometry: Geometry, cache_frames: int) -> list[int]:
    """Blocks whose past stands in the cache at the fork as they read it."""
    g, stop = geometry, fork * geometry.block
    lost = set(range(g.sink, stop - (cache_frames - g.sink))) | set(g.history.overwritten(fork))
    found = []
    for block in reversed(range(fork)):
        if script.segment(block + 1) != script.segment(block):  # re-encoded before block + 1
            lost |= set(g.reencoded(block + 1))
        if lost.isdisjoint(g.history.past(block * g.block, g.block)):
            found.append(block)
    return sorted(found)


def held_velocities(
    pipeline: Pipeline,
    rollout: Rollout,
    embeddings: Mapping[str, torch.Tensor],
    block: int,
    steps: Sequence[int] = (),
) -> torch.Tensor:
    """v_SFCHW of a held block under the weights in the module.

    ``steps``: at these denoise steps only, ascending; empty = all.
    """
    g = pipeline.geometry
    frames, sigmas = list(range(block * g.block, (block + 1) * g.block)), g.sigmas_of(block)
    steps = sorted(steps) or list(range(len(sigmas)))
    text, past = embeddings[rollout.script.text(block)][None], g.history.past(frames[0], g.block)
    return pipeline.generator.velocity(
        rollout.held[block][steps],
        torch.tensor(sigmas)[steps],
        text,
        frames,
        rollout.cache,
        past,
        [0] * len(steps),
    )
