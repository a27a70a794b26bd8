"""Held-out motion evaluator: classical dense optical flow (OpenCV's DIS) of what is colourful.

    chroma picture, edges wrapped -> flow of every pair of frames -> mean flow of the coloured
    pixels = f_t

    direction  left, right, up, down:  mean over t of (1 + cos(f_t, heading)) / 2, weighted by |f_t|
               circle:   sum_t f_t x f_{t+8} / (0.7 sum_t |f_t| |f_{t+8}|) in [0, 1]: steadily clockwise
               bounce:   2 min(sum of ups, sum of downs) / sum |f|
               hide:     as left or right, towards the pillar
    smooth     exp(-max(0, mean |f_{t+1} - f_t| - 0.35)) * exp(-max(0, warp - 0.025) / 0.03) * min(1, mean |f| / 0.4)
               warp = mean absolute difference (in [0, 1], coloured pixels) of a frame pulled back
               along the flow to the one before; the last factor because a frozen clip is perfectly
               smooth
    score      mean of direction and smooth

What it cannot see: identity, colour and shape; the absolute speed beyond a factor (the inside of a
plain shape has no texture, flow there is filled in from its edge); where a picture has no colour
there is no motion.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import torch

from kvpo.mini.rewards.asked import EVIDENCE, NONE, asked
from kvpo.mini.world import HEADING, PILLAR, SIZE
from kvpo.rewards.base import RewardSpec, VideoBatch
from kvpo.rewards.classic.measures import in_parallel
from kvpo.rewards.measured import Measured

FAMILY = "optical-flow"
MARGIN = 16
COLOURED = 60
"""Chroma of 255 from which on a pixel belongs to something that moves."""
FEWEST = 12
"""Coloured pixels below which a frame has no flow."""
TURN = 8
"""Frames between the two flows whose turn tells a circle."""


@dataclass(frozen=True)
class FlowMotion(Measured):
    """Direction match and smoothness by optical flow, in [0, 1]."""

    spec: RewardSpec = RewardSpec(
        "flow_motion",
        FAMILY,
        looks_at="direction and smoothness of coloured motion, by optical flow",
        min_frames=2 * TURN,
        licence="Apache-2.0 (OpenCV)",
        packages=("cv2",),
        extra="rewards",
    )

    def measure(self, batch: VideoBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        scenes = asked(batch)
        rows = [(*found, scene.motion) for found, scene in zip(in_parallel(_clip, batch), scenes)]
        direction = torch.tensor(
            [_direction(flow, there, column, kind) for flow, there, column, _, kind in rows]
        )
        smooth = torch.tensor([_smooth(flow, there, warp) for flow, there, _, warp, _ in rows])
        parts = {"direction": direction, "smooth": smooth}
        return torch.stack((direction, smooth)).nanmean(0), parts


def _clip(frames: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """Measure a clip, uint8 [T, C, H, W], by optical flow.

    Returns mean flow [T-1, 2] px/frame, where there is any [T-1], mean column of the colour [T-1],
    and mean warp error.
    """
    import cv2

    method = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_FAST)
    method.setFinestScale(0)  # the pictures are tiny: use all their pixels
    chroma = frames.max(1) - frames.min(1)
    pictures = [np.pad(c, MARGIN, mode="wrap") for c in chroma]
    side = SIZE + 2 * MARGIN
    ys, xs = np.mgrid[0:side, 0:side].astype(np.float32)
    inner = slice(MARGIN, side - MARGIN)
    flows, exists, columns, errors = [], [], [], []
    for a, b in itertools.pairwise(pictures):
        flow = method.calc(a, b, None)
        mask = (a > COLOURED)[inner, inner]
        pulled = cv2.remap(b, xs + flow[..., 0], ys + flow[..., 1], cv2.INTER_LINEAR)
        enough = mask.sum() >= FEWEST and (b > COLOURED)[inner, inner].sum() >= FEWEST
        exists.append(enough)
        flows.append(flow[inner, inner][mask].mean(0) if enough else np.zeros(2))
        columns.append(np.nonzero(mask)[1].mean() + 0.5 if enough else 0.0)
        if enough:
            errors.append(np.abs(pulled.astype(np.float32) - a)[inner, inner][mask].mean() / 255)
    return (
        np.array(flows),
        np.array(exists),
        np.array(columns),
        float(np.mean(errors)) if errors else NONE,
    )


def _direction(flow: np.ndarray, there: np.ndarray, column: np.ndarray, kind: str | None) -> float:
    """Part ``direction`` of a clip; NaN if no motion is asked or too little is seen."""
    if kind is None or there.sum() < EVIDENCE:
        return NONE
    f, size = flow[there], np.linalg.norm(flow[there], axis=1)
    # rest has no direction: what is missing counts as across
    total = max(float(size.sum()), 0.1 * len(size))
    if kind in HEADING or kind == "hide":
        heading = (
            np.array(HEADING[kind])
            if kind in HEADING
            else np.stack(
                (np.sign((PILLAR[0] + PILLAR[1]) / 2 - column[there]), np.zeros(len(f))), 1
            )
        )
        return float(0.5 + 0.5 * (f * heading).sum() / total)
    if kind == "bounce":
        up, down = np.maximum(-f[:, 1], 0).sum(), np.maximum(f[:, 1], 0).sum()
        return float(2 * min(up, down) / total)
    pair = there[TURN:] & there[:-TURN]
    if not pair.any():
        return NONE
    a, b = flow[:-TURN][pair], flow[TURN:][pair]
    cross = a[:, 0] * b[:, 1] - a[:, 1] * b[:, 0]
    room = (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)).sum()
    return float(np.clip(cross.sum() / (0.7 * max(room, 0.01 * len(cross))), 0, 1))


def _smooth(flow: np.ndarray, there: np.ndarray, warp: float) -> float:
    """Part ``smooth`` of a clip; NaN where nothing colourful is seen in successive frames."""
    pair = there[1:] & there[:-1]
    if pair.sum() < EVIDENCE:
        return NONE
    bend = np.linalg.norm(np.diff(flow, axis=0)[pair], axis=1).mean()
    moves = min(1.0, float(np.linalg.norm(flow[there], axis=1).mean()) / 0.4)
    return float(np.exp(-max(0.0, bend - 0.35)) * np.exp(-max(0.0, warp - 0.025) / 0.03) * moves)
