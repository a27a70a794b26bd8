"""Common parts of the world's rewards and its evaluation.

They are graded parts, their mean, and what a prompt asks for.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from kvpo.mini.rewards.track import Observed
from kvpo.mini.stories import understand
from kvpo.mini.world import COLOURS, FPS, PILLAR, SIZES, SPEEDS, Scene
from kvpo.rewards.base import VideoBatch

FLOOR = 0.01
TIPS = 8.0
"""Pixels of a shape's two tips that are too thin to be seen beside the pillar."""
SLACK = 4
"""Frames an object may be late to leave the pillar."""
EVIDENCE = 4
"""Frames (or smooth velocities) below which a part says nothing."""
PALETTE = torch.tensor(list(COLOURS.values()), dtype=torch.float32) / 255
NONE = float("nan")


def soft(error: torch.Tensor, free: float, scale: float) -> torch.Tensor:
    """exp(-max(0, error - free) / scale), in (0, 1]."""
    return (-(error - free).clamp(min=0) / scale).exp()


def blend(parts: Mapping[str, torch.Tensor], weights: Mapping[str, float]) -> torch.Tensor:
    """Weighted geometric mean over the parts a clip has, each floored at FLOOR.

    NaN = it has not; the mean is NaN without any.
    """
    p = torch.stack([parts[name] for name in weights])
    w = torch.tensor(list(weights.values()))[:, None] * p.isfinite()
    return ((p.nan_to_num(1.0).clamp(FLOOR, 1).log() * w).sum(0) / w.sum(0)).exp()


def share(value_BT: torch.Tensor, at_BT: torch.Tensor, of_BT: torch.Tensor) -> torch.Tensor:
    """sum of value where ``at`` / number of frames ``of``.

    NaN where those are fewer than EVIDENCE (or than a third of a short clip).
    """
    count = of_BT.sum(1)
    enough = count >= min(EVIDENCE, max(1, of_BT.shape[1] // 3))
    return torch.where(enough, (value_BT * (at_BT & of_BT)).sum(1) / count.clamp(min=1), NONE)


def asked(batch: VideoBatch) -> list[Scene]:
    """Scene that every clip's prompt asks for, given its history."""
    return [understand(batch.script(b))[-1] for b in range(len(batch))]


def paces(batch: VideoBatch, scenes: list[Scene]) -> list[tuple[float, float]]:
    """Slowest and fastest pace that satisfies each prompt, pixels per frame of this batch."""
    rate = FPS / batch.fps
    return [
        (rate * SPEEDS[s.speed], rate * SPEEDS[s.speed])
        if s.speed
        else (rate * min(SPEEDS.values()), rate * max(SPEEDS.values()))
        for s in scenes
    ]


def excused(batch: VideoBatch, seen: Observed, scenes: list[Scene]) -> torch.Tensor:
    """bool_BT: frames without an object that the pillar and the prompt explain.

    Moving on, it must come out in time; in a story's first segment it starts in the open, so it
    cannot be unseen throughout."""
    out = seen.hidden.clone()
    for b, (scene, (pace, _)) in enumerate(zip(scenes, paces(batch, scenes))):
        if scene.motion in ("left", "right"):
            out[b] &= (
                _run_length(out[b])
                <= (PILLAR[1] - PILLAR[0] - 2 * min(SIZES.values()) + TIPS) / pace + SLACK
            )
        if scene.motion != "hide" and not batch.history[b] and not seen.seen[b].any():
            out[b] = False
    return out


def _run_length(flag_T: torch.Tensor) -> torch.Tensor:
    """Number of frames that the stretch of ``flag`` has lasted so far, for every frame."""
    index = torch.arange(1, len(flag_T) + 1)
    return index - torch.where(flag_T, 0, index).cummax(0).values


def tip(seen: Observed) -> torch.Tensor:
    """bool_BT: so little shows beside the pillar that its edge pixels blur the colour."""
    return seen.seen & ~seen.whole & (seen.area < 40)


def there(seen: Observed, hidden: torch.Tensor) -> torch.Tensor:
    """Share of frames, hidden ones not counted, in which an object is seen.

    1 where all are hidden.
    """
    return share(torch.ones_like(seen.area), seen.seen, ~hidden).nan_to_num(1.0)
