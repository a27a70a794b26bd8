"""Classical quality of a video without any weights: eight measures, none of which may fail.

    motion       rising(own motion, diagonals a second)      something moves, and not just the camera
    warp         falling(warp error)                         what moves stays itself
    whole        falling(worst share of lost pixels)         no cut
    steady       falling(bend)                               no jitter, no stutter
    flicker      falling(flicker)                            no pumping brightness
    novelty      rising(novelty)                             no loop, no repetition
    sharp        rising and falling(sharpness)               neither blur nor noise
    colour       falling(colour drift)                       no growing saturation, no fading, no change of hue
    score        geometric mean of all

    rising(x, enough) = min(1, x / enough)        falling(x, free, scale) = exp(-max(0, x - free) / scale)

Every part saturates, so that there is nothing to win by more motion or more sharpness than real
clips have. The limits were chosen on real clips and checked on others: docs/classic.md. The
measures themselves are in `kvpo.rewards.classic.measures`.

What it cannot see: what is shown, and whether it was asked for; anatomy and physics; time reversed;
a second object; colours that are too strong from the first frame on. A real pan over a distant
landscape has no motion of its own, and counts as a still.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from kvpo.rewards.base import RewardSpec, VideoBatch
from kvpo.rewards.classic import measures
from kvpo.rewards.classic.measures import in_parallel
from kvpo.rewards.measured import Measured

FAMILY = "classical"


def rising(x: float, enough: float) -> float:
    """0 at 0, 1 from ``enough`` on; NaN stays NaN.

    ``min`` and ``max`` keep their first argument beside a NaN.
    """
    return min(x / enough, 1.0)


def falling(x: float, free: float, scale: float) -> float:
    """1 up to ``free``, then down by a factor e for every ``scale``."""
    return math.exp(-max(x - free, 0.0) / scale)


@dataclass
class Classic(Measured):
    """The geometric mean of the parts, in [0, 1].

    0 as soon as one part is 0, whatever cannot be measured beside it: a frozen clip has no
    motion, an empty one no sharpness. NaN if nothing is 0 but something is not measurable: a
    changing picture without any texture has no flow."""

    enough_motion: float = 0.03
    """Diagonals a second of the fastest 5 % of pixels from which on more motion earns nothing."""
    spec: RewardSpec = RewardSpec(
        "classic",
        FAMILY,
        looks_at="eight classical measures of any video, none of which may fail",
        needs_prompt=False,
        min_frames=8,
        licence="Apache-2.0 (OpenCV)",
        packages=("cv2",),
        extra="rewards",
    )

    def __post_init__(self):
        if not self.enough_motion > 0:
            raise ValueError(
                f"enough_motion = {self.enough_motion} must be above 0: the speed, picture diagonals a second, that earns the full part; 0.03 suits real clips"
            )

    def measure(self, batch: VideoBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        rows = in_parallel(lambda clip: self.parts(clip, batch.fps), batch)
        parts = {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}
        return mean_of(torch.stack(list(parts.values()))), parts

    def parts(self, clip_TCHW: np.ndarray, fps: float) -> dict[str, float]:
        """The parts of one uint8 clip, each in [0, 1], NaN where it cannot be measured."""
        pictures = measures.shrink(clip_TCHW)
        steps = measures.steps(pictures)
        fineness = _mean([measures.sharpness(picture) for picture in pictures])
        return {
            "motion": rising(measures.own_speed(pictures, fps), self.enough_motion),
            "warp": falling(_mean([measures.warp_error(step) for step in steps]), 0.001, 0.002),
            "whole": falling(max(measures.lost(step) for step in steps), 0.4, 0.2),
            "steady": falling(measures.bend(steps), 1.0, 0.5),
            "flicker": falling(measures.flicker(pictures), 0.005, 0.02),
            "novelty": rising(measures.novelty(pictures), 0.8),
            "sharp": rising(fineness, 2.0) * falling(fineness, 3.0, 1.0),
            "colour": falling(measures.colour_drift(steps), 0.2, 0.3),
        }


def mean_of(parts_PB: torch.Tensor) -> torch.Tensor:
    """Geometric means [B]; 0 where a part is 0, else NaN where one is NaN."""
    return torch.where((parts_PB == 0).any(0), 0.0, parts_PB.log().mean(0).exp())


def _mean(values: list[float]) -> float:
    """Mean of the values that could be measured; NaN if none could."""
    return torch.tensor(values).nanmean().item()
