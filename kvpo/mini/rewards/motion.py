"""Motion of the object: velocities on the torus, and agreement with every kind of motion.

Velocity of frame t, bridging frames where nothing is seen (p, n = nearest seen frames around):

    v_t = wrap(c_n - c_p) / (n - p),   u_t = (v_t + ... + v_{t+3}) / 4      four frames = one latent frame; jitter is not motion

Agreement with a kind is a matched filter, the cosine between u and the kind's own velocities k(t):

    m = max over phases and paces of  sum_t u_t . k_t / (|u| |k|),   |u| at least that of REST px/frame: what rests agrees with nothing

It is 1 for the motion itself, 0 for rest or an orthogonal one, -1 for the opposite; speed as such
does not count.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from kvpo.mini.rewards.track import Observed, nearest_seen
from kvpo.mini.world import BOUNCE_HEIGHT, CIRCLE_RADIUS, HEADING, SIZE, SPEEDS

LAG = 4
KINDS = ("left", "right", "up", "down", "circle", "bounce")
REST = 0.3
PACES = (0.9, 1.0, 1.1)
"""Tolerance of the round and the bouncing motion's rate, as factors of the pace."""
PHASES = 24


@dataclass(frozen=True)
class Motion:
    """Velocities in pixels a frame, (x, y)."""

    step: torch.Tensor
    """v_BT2 between frames t and t + 1, length T - 1; 0 where not known."""
    known: torch.Tensor
    """bool_BT, length T - 1: the object was seen before and after."""
    smooth: torch.Tensor
    """u_BT2, length T - LAG."""
    valid: torch.Tensor
    """bool_BT, length T - LAG: all steps of u are known."""


def wrap(offset: torch.Tensor) -> torch.Tensor:
    """The short way round, in [-32, 32)."""
    return (offset + SIZE / 2) % SIZE - SIZE / 2


def motion(seen: Observed) -> Motion:
    before, after = nearest_seen(seen.seen)
    p, n = before[:, :-1], after[:, 1:]
    T = seen.seen.shape[1]
    known = (p >= 0) & (n < T)
    p, n = p.clamp(min=0), n.clamp(max=T - 1)
    here, there = (seen.centre.gather(1, i[..., None].expand(-1, -1, 2)) for i in (p, n))
    step = torch.where(known[..., None], wrap(there - here) / (n - p).clamp(min=1)[..., None], 0.0)
    return Motion(step, known, step.unfold(1, LAG, 1).mean(-1), known.unfold(1, LAG, 1).all(-1))


def agreement(moved: Motion, pace: torch.Tensor) -> torch.Tensor:
    """m_BK of every clip with every of KINDS.

    ``pace`` [B]: pixels a frame at which circles and bounces run.
    """
    u = torch.view_as_complex((moved.smooth * moved.valid[..., None]).float().contiguous())
    count = moved.valid.sum(1)
    length = torch.maximum(u.abs().square().sum(1), REST**2 * count.clamp(min=1)).sqrt()
    t = torch.arange(u.shape[1], dtype=torch.float32)
    out = []
    for kind in KINDS:
        if kind in HEADING:
            x, y = HEADING[kind]
            out.append((u.real * x + u.imag * y).sum(1) / (length * count.clamp(min=1).sqrt()))
            continue
        fits = [
            _turning(u, t, pace * f) if kind == "circle" else _bouncing(u, moved.valid, t, pace * f)
            for f in PACES
        ]
        out.append(torch.stack(fits).amax(0) / length)
    return torch.stack(out, 1).clamp(-1, 1)


def _turning(u: torch.Tensor, t: torch.Tensor, pace: torch.Tensor) -> torch.Tensor:
    """Amplitude of the clockwise rotation at the pace's rate, whatever its phase.

    It is |sum u e^{-i w t}| / sqrt(n), w = pace / radius.
    """
    turn = torch.polar(torch.ones_like(u.real), -t * (pace / CIRCLE_RADIUS)[:, None])
    count = (u != 0).sum(1).clamp(min=1)
    return (u * turn).sum(1).abs() / count.sqrt()


def _bouncing(
    u: torch.Tensor, valid: torch.Tensor, t: torch.Tensor, pace: torch.Tensor
) -> torch.Tensor:
    """Best of PHASES projections on the bounce's vertical velocities.

    The height is 12 |sin(pi pace t / 24)|.
    """
    period = 2 * BOUNCE_HEIGHT / pace
    shift = torch.arange(PHASES)[None, :, None] / PHASES * period[:, None, None]

    def height(at):
        return BOUNCE_HEIGHT * (math.pi * at / period[:, None, None]).sin().abs()

    kept = -(height(t + shift + LAG) - height(t + shift)) / LAG * valid[:, None]
    return ((kept * u.imag[:, None]).sum(2) / kept.square().sum(2).clamp(min=1e-6).sqrt()).amax(1)


def typical_speed(kind: str, pace: float) -> float:
    """Mean |u| of a motion, pixels a frame.

    It is the pace, less what the lag cuts off a bounce's or a circle's corners.
    """
    if kind == "bounce":
        t = torch.arange(960, dtype=torch.float64)

        def height(at):
            return BOUNCE_HEIGHT * (math.pi * at * pace / (2 * BOUNCE_HEIGHT)).sin().abs()

        return float((height(t + LAG) - height(t)).abs().mean() / LAG)
    if kind == "circle":
        half = LAG * pace / CIRCLE_RADIUS / 2
        return pace * math.sin(half) / half
    return pace


def typical_bend(kind: str, pace: float) -> float:
    """Mean |v_{t+1} - v_t| of a motion, pixels a frame a frame."""
    if kind == "bounce":  # two strokes' speed at each floor, and the sine's own bending between
        t = torch.arange(960, dtype=torch.float64)
        height = BOUNCE_HEIGHT * (math.pi * t * pace / (2 * BOUNCE_HEIGHT)).sin().abs()
        return float(height.diff().diff().abs().mean())
    return pace**2 / CIRCLE_RADIUS if kind == "circle" else 0.0


FASTEST = math.pi / 2 * max(SPEEDS.values())
"""Fastest true step: a quick bounce at the floor."""
