"""Measures of a video for the sentinels: its motion, its colours and its light.

motion           mean over pairs of frames of the fastest 5 % of the flow, share of the diagonal a second
residual_motion  the same of what no camera explains: a pan over a still picture has none
saturation       mean of (max - min) over the colour channels, in [0, 1]
luminance        mean of 0.299 R + 0.587 G + 0.114 B, in [0, 1]
colour_drift     distance of the last fifth's mean colour to the first fifth's, in [0, 1]
still_run        share of the video in its longest run of frames that hardly change (mean absolute difference below 1/255)
"""

from __future__ import annotations

import numpy as np
import torch

from kvpo.rewards.classic.measures import TOP, Step, one_thread, own_speed, shrink, steps

STILL = 1.0
"""Difference of two frames, in levels of 255, below which they count as the same."""


def watched(video_TCHW: torch.Tensor, fps: float) -> dict[str, float]:
    """Measure one uint8 video of two frames or more."""
    x = video_TCHW.float() / 255
    fifth = max(1, len(x) // 5)
    light = torch.tensor([0.299, 0.587, 0.114])
    return motion(video_TCHW, fps) | {
        "saturation": (x.amax(1) - x.amin(1)).mean().item(),
        "luminance": torch.einsum("tchw,c->thw", x, light).mean().item(),
        "colour_drift": (x[-fifth:].mean((0, 2, 3)) - x[:fifth].mean((0, 2, 3))).abs().max().item(),
        "still_run": longest_run((x[1:] - x[:-1]).abs().mean((1, 2, 3)) * 255 < STILL)
        / (len(x) - 1),
    }


def motion(video_TCHW: torch.Tensor, fps: float) -> dict[str, float]:
    """The two that need optical flow; NaN where there is no texture to see it by."""
    pictures = shrink(video_TCHW.numpy())
    with one_thread():
        return {
            "motion": fps * float(np.mean([any_motion(step) for step in steps(pictures)])),
            "residual_motion": own_speed(pictures, fps),
        }


def any_motion(step: Step) -> float:
    """Mean speed of the fastest TOP of pixels, the camera's included, diagonals a step."""
    speed = np.sort(np.linalg.norm(step.flow, axis=-1), axis=None)
    return float(speed[-max(1, round(TOP * speed.size)) :].mean() / np.hypot(*step.flow.shape[:2]))


def longest_run(flags_T: torch.Tensor) -> int:
    """Length of the longest run of successive True."""
    longest = run = 0
    for flag in flags_T.tolist():
        run = run + 1 if flag else 0
        longest = max(longest, run)
    return longest
