"""Three ways to look alive without making anything new: for the calibration suite, beside its other flaws.

Each is (frames [B, T, C, H, W] uint8, generator) -> the same.  A still picture under a moving camera has motion
everywhere and none of its own; a loop is good video, shown again.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

WINDOW = 0.8
"""Share of the picture's sides that a panning camera sees; it never reaches the edge, so nothing wraps around."""
NEAREST = 0.7
"""The same at the end of a zoom."""


def pan_of_still(frames: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """The first frame under a camera that moves evenly in a random direction, in steps of parts of a pixel."""
    T = frames.shape[1]
    angle = 2 * math.pi * torch.rand((), generator=generator)
    way = (1 - WINDOW) * torch.stack((angle.cos(), angle.sin()))
    return _filmed(frames[:, 0], torch.full((T,), WINDOW), torch.linspace(-1, 1, T)[:, None] * way)


def zoom_of_still(frames: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """The first frame under a camera that comes closer."""
    T = frames.shape[1]
    return _filmed(frames[:, 0], torch.linspace(1, NEAREST, T), torch.zeros(T, 2))


def loop(frames: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """The first quarter, again and again."""
    T = frames.shape[1]
    return frames[:, torch.arange(T) % max(2, T // 4)]


def _filmed(stills_BCHW: torch.Tensor, scale_T: torch.Tensor, centre_T2: torch.Tensor) -> torch.Tensor:
    """What a camera sees of each still, [B, T, C, H, W]: frame t is the window of ``scale`` times its sides about ``centre`` (x, y; the edges are at -1 and 1)."""
    view = torch.cat((scale_T[:, None, None] * torch.eye(2), centre_T2[:, :, None]), dim=2)
    points = F.affine_grid(view, [len(scale_T), *stills_BCHW.shape[1:]], align_corners=False)
    films = [F.grid_sample(still.float().expand(len(scale_T), -1, -1, -1), points, "bicubic", "border", align_corners=False) for still in stills_BCHW]
    return torch.stack(films).round().clamp(0, 255).to(torch.uint8)
