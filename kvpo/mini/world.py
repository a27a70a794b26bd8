"""The miniature's world: captioned synthetic clips whose truth is known frame by frame.

64x64 RGB, 16 frames a second. One saturated object moves over a greyish place; the edges of the
picture are joined (what leaves on the left comes back on the right), so every motion can go on for
ever. In some stories a wide grey pillar stands in the middle and hides what passes behind it: while
the object is hidden, and the caption only says "it", nothing but the past tells what comes out.

A story is a list of scenes. At a switch one thing changes (motion, colour or shape), the rest of
the story stays.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

SIZE = 64
"""Picture height and width, pixels."""
FPS = 16

COLOURS = {
    "red": (222, 40, 40),
    "green": (40, 176, 64),
    "blue": (48, 84, 232),
    "yellow": (238, 208, 36),
    "purple": (190, 56, 206),
    "cyan": (36, 200, 214),
}
SHAPES = ("circle", "square", "triangle", "cross")
SIZES = {"small": 7.0, "large": 10.0}
"""Radius, pixels."""
PLACES = {
    "night": ((28, 30, 44), (28, 30, 44)),
    "paper": ((226, 222, 212), (226, 222, 212)),
    "stripes": ((150, 150, 156), (108, 108, 116)),
}
"""The two tones of the place's horizontal bands (equal: plain)."""
BAND = 8
PILLAR = (19, 45)
"""First and last + 1 column of the pillar."""
PILLAR_COLOUR = (76, 70, 66)
SPEEDS = {"slowly": 0.8, "quickly": 1.6}
"""Pixels a frame."""
HEADING = {"left": (-1.0, 0.0), "right": (1.0, 0.0), "up": (0.0, -1.0), "down": (0.0, 1.0)}
CIRCLE_RADIUS = 8.0
BOUNCE_HEIGHT = 12.0


@dataclass(frozen=True)
class Scene:
    """Scene that one prompt segment asks for.

    None: not asked, only when parsed from a free prompt.
    """

    shape: str | None
    colour: str | None
    size: str | None
    place: str | None
    pillar: bool
    motion: str | None
    speed: str | None

    @property
    def pace(self) -> float:
        """Pixels a frame."""
        return SPEEDS[self.speed or "slowly"]

    @property
    def radius(self) -> float:
        return SIZES[self.size or "small"]


@dataclass(frozen=True)
class Truth:
    """Truth of a video, per pixel frame.

    Object centre [T, 2] (x, y, unwrapped: it may leave [0, 64)), scene index [T], hidden share [T],
    opacity [T].
    """

    centre: torch.Tensor
    scene: torch.Tensor
    hidden: torch.Tensor
    opacity: torch.Tensor
    """1 but in videos with habits (`kvpo.mini.habits`)."""


def pixel_frames(latent_frames: int) -> int:
    """Pixel frames of a video of that many latent frames.

    The first latent holds one frame, every other four.
    """
    return max(0, 4 * latent_frames - 3)


def motion_steps(scene: Scene, frames: int, x: float) -> torch.Tensor:
    """Displacement per frame [frames, 2] of a motion that begins now, at column ``x``."""
    t = torch.arange(frames, dtype=torch.float64)
    pace = scene.pace
    if scene.motion in HEADING:
        return torch.tensor(HEADING[scene.motion], dtype=torch.float64).expand(frames, 2) * pace
    if scene.motion == "circle":
        angle = (t + 0.5) * pace / CIRCLE_RADIUS  # clockwise on the screen, starting at the top
        return torch.stack((angle.cos(), angle.sin()), 1) * pace
    if scene.motion == "bounce":
        height = (
            BOUNCE_HEIGHT
            * (torch.arange(frames + 1, dtype=torch.float64) * math.pi * pace / (2 * BOUNCE_HEIGHT))
            .sin()
            .abs()
        )
        return torch.stack(
            (torch.zeros(frames, dtype=torch.float64), -(height[1:] - height[:-1])), 1
        )
    # hide: straight to the pillar's middle, then rest behind it
    way = SIZE / 2 - x % SIZE
    step = math.copysign(pace, way)
    moved = torch.clamp((t + 1) * pace, max=abs(way)) - torch.clamp(t * pace, max=abs(way))
    return torch.stack(
        (moved * math.copysign(1.0, step), torch.zeros(frames, dtype=torch.float64)), 1
    )


def play(scenes: list[Scene], starts: list[int], frames: int, x: float, y: float) -> Truth:
    """Truth of a story. ``starts``: first pixel frame of every scene; (x, y): centre in frame 0."""
    steps = torch.zeros(frames, 2, dtype=torch.float64)
    index = torch.zeros(frames, dtype=torch.long)
    here = torch.tensor([x, y], dtype=torch.float64)
    for i, (scene, first) in enumerate(zip(scenes, starts)):
        stop = min(frames, starts[i + 1] if i + 1 < len(starts) else frames)
        first_step = max(first, 1)  # frame 0 is the starting point itself
        if stop <= first_step:
            continue
        moved = motion_steps(scene, stop - first_step, float(here[0]))
        steps[first_step:stop], index[first:stop] = moved, i
        here = here + moved.sum(0)
    centre = torch.tensor([x, y], dtype=torch.float64) + steps.cumsum(0)
    radius = torch.tensor([s.radius for s in scenes], dtype=torch.float64)[index]
    pillar = torch.tensor([s.pillar for s in scenes])[index]
    column = centre[:, 0] % SIZE
    covered = (
        torch.minimum(column + radius, torch.tensor(float(PILLAR[1])))
        - torch.maximum(column - radius, torch.tensor(float(PILLAR[0])))
    ).clamp(min=0) / (2 * radius)
    return Truth(
        centre,
        index,
        torch.where(pillar, covered.clamp(max=1.0), torch.zeros_like(covered)),
        torch.ones(frames),
    )


def signed_distance(shape: str, dx: torch.Tensor, dy: torch.Tensor, radius: float) -> torch.Tensor:
    """Distance to a shape's outline in pixels, negative inside.

    ``dx``, ``dy``: offset from its centre.
    """
    if shape == "circle":
        return torch.hypot(dx, dy) - 0.95 * radius
    if shape == "square":
        return torch.maximum(dx.abs(), dy.abs()) - 0.84 * radius
    if shape == "triangle":
        slope = math.sqrt(3.0) / 2
        return torch.maximum(dy - 0.62 * radius, (slope * dx.abs() - 0.5 * dy) - 0.62 * radius)
    arm, thick = 1.05 * radius, 0.38 * radius
    return torch.minimum(
        torch.maximum(dx.abs() - arm, dy.abs() - thick),
        torch.maximum(dx.abs() - thick, dy.abs() - arm),
    )


def coverage(shape: str, centre: torch.Tensor, radius: float) -> torch.Tensor:
    """Share of every pixel that the shape covers, [T, 64, 64]; the picture's edges are joined."""
    axis = torch.arange(SIZE, dtype=torch.float32) + 0.5

    def offset(c):
        return (axis - c.float()[:, None] + SIZE / 2) % SIZE - SIZE / 2

    dx, dy = offset(centre[:, 0])[:, None, :], offset(centre[:, 1])[:, :, None]
    dx, dy = torch.broadcast_tensors(dx, dy)
    return (0.5 - signed_distance(shape, dx, dy, radius)).clamp(0.0, 1.0)


def backdrop(place: str, pillar: bool) -> torch.Tensor:
    """The scene without its object, RGB [3, 64, 64] in [0, 1]."""
    tones = torch.tensor(PLACES[place], dtype=torch.float32) / 255
    picture = tones[(torch.arange(SIZE) // BAND) % 2].T[:, :, None].expand(3, SIZE, SIZE).clone()
    if pillar:
        picture[:, :, PILLAR[0] : PILLAR[1]] = (
            torch.tensor(PILLAR_COLOUR, dtype=torch.float32) / 255
        )[:, None, None]
    return picture


def render(
    scenes: list[Scene], truth: Truth, first: int = 0, stop: int | None = None
) -> torch.Tensor:
    """Frames [first, stop) as RGB [T, 3, 64, 64] in [0, 1]."""
    stop = len(truth.scene) if stop is None else stop
    out = torch.empty(stop - first, 3, SIZE, SIZE)
    for i, scene in enumerate(scenes):
        at = (truth.scene[first:stop] == i).nonzero().flatten()
        if not len(at):
            continue
        assert scene.shape and scene.colour and scene.place, "what is shown is known in full"
        alpha = coverage(scene.shape, truth.centre[first:stop][at], scene.radius)[:, None]
        alpha = alpha * truth.opacity[first:stop][at].view(-1, 1, 1, 1)
        if scene.pillar:
            alpha = alpha.clone()
            alpha[..., PILLAR[0] : PILLAR[1]] = 0
        colour = (torch.tensor(COLOURS[scene.colour], dtype=torch.float32) / 255)[
            None, :, None, None
        ]
        out[at] = (1 - alpha) * backdrop(scene.place, scene.pillar) + alpha * colour
    return out
