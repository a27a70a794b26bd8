"""Measures of any clip that need no weights: optical flow (OpenCV's DIS), differences, colours.

Every measure alone is won by something worthless; only all of them together
(`kvpo.rewards.classic.classic`) mean anything.

    measure       of a good clip                          won by
    own_motion    not 0: something moves by itself        shuffled frames, cuts
    warp_error    small: pixels keep their brightness     frozen, blurred, dark or empty clips
    lost          small: pixels are found again           frozen, blurred
    bend          small: speeds change slowly             frozen, a pan over a still
    flicker       small: brightness changes slowly        frozen, anything local
    novelty       1: no frame comes back                  noise, drift
    sharpness     in a band                               frozen; noise looks sharp, hence the band
    colour_drift  small: tracked pixels keep their colour frozen; what is too colourful from the start

Pictures are RGB uint8 [H, W, 3], at most WIDTH wide (`shrink`). Which frames a step joins is the
caller's choice: for all but own motion, successive ones.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TypeVar

import numpy as np
import torch

from kvpo.rewards.base import VideoBatch

WIDTH = 320
"""Largest width of a picture, pixels; wider ones are scaled down.

Flow then takes some 30 ms a frame, and every size is judged alike.
"""
SMALLEST = 16
"""Pixels a side: OpenCV's flow takes no less than 12, and a margin is left out."""
GAP = 0.25
"""Seconds between the frames whose own motion is measured.

From one frame to the next slow things hardly move, and the less the more frames a second.
"""
TEXTURE = 4.0
"""Levels of 255 a pixel: weaker slopes say nothing of where a pixel went."""
EXPLAINED = 2.0
"""Levels of 255 by which a pixel's own motion must explain it better than the camera's does."""
CAMERA_ERROR = 0.5
"""Pixels within which a point follows the camera."""
CELLS = 4
"""Rows and columns of the picture for the question whether motion is everywhere."""
TOP = 0.05
"""Share of the fastest pixels that stand for a frame's motion: what moves may be small."""


@dataclass(frozen=True, eq=False)
class Step:
    """Two successive frames, and where optical flow finds the first one's pixels in the second."""

    before: np.ndarray
    after: np.ndarray
    flow: np.ndarray
    """float32 [H, W, 2]: (x, y) pixels from a place in ``before`` to its place in ``after``."""
    inside: np.ndarray
    """bool [H, W]: that place is in the picture."""
    found: np.ndarray
    """bool [H, W]: and the flow from there leads back."""

    @cached_property
    def errors(self) -> np.ndarray:
        """float32 [H, W]: how far brightness differs along the flow, levels of 255."""
        return _misfit(self, self.flow)


def shrink(clip_TCHW: np.ndarray) -> list[np.ndarray]:
    """The clip's frames as pictures, at most WIDTH wide."""
    import cv2

    pictures = [np.ascontiguousarray(frame.transpose(1, 2, 0)) for frame in clip_TCHW]
    height, width = pictures[0].shape[:2]
    if width <= WIDTH:
        return pictures
    size = (WIDTH, max(1, round(height * WIDTH / width)))
    return [cv2.resize(picture, size, interpolation=cv2.INTER_AREA) for picture in pictures]


def steps(pictures: Sequence[np.ndarray]) -> list[Step]:
    """Flow forward and backward between successive pictures.

    Raises ValueError for pictures below SMALLEST.
    """
    import cv2

    height, width = pictures[0].shape[:2]
    if min(height, width) < SMALLEST:
        raise ValueError(
            f"pictures of {width} x {height} pixels (at most {WIDTH} wide) are too small for optical flow, which needs {SMALLEST} a side; score larger clips"
        )
    method = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    if width < WIDTH // 2:
        method.setFinestScale(0)  # small pictures have no pixel to spare
    greys = [grey(picture) for picture in pictures]
    flows = [
        (method.calc(a, b, None), method.calc(b, a, None)) for a, b in itertools.pairwise(greys)
    ]
    return [_step(a, b, forth, back) for a, b, (forth, back) in zip(pictures, pictures[1:], flows)]


def _step(before: np.ndarray, after: np.ndarray, forth: np.ndarray, back: np.ndarray) -> Step:
    """Make a step of two pictures and their flows; a pixel is found if it comes back to itself.

    There and back it may miss itself by no more than Sundaram et al. (ECCV 2010) allow.
    """
    at, (height, width) = _places(forth.shape[:2]) + forth, forth.shape[:2]
    inside = ((at >= 0) & (at <= (width - 1, height - 1))).all(-1)
    back = pulled(back, forth)
    missed, length = ((forth + back) ** 2).sum(-1), (forth**2).sum(-1) + (back**2).sum(-1)
    return Step(before, after, forth, inside, inside & (missed <= 0.01 * length + 0.5))


def own_speed(pictures: Sequence[np.ndarray], fps: float) -> float:
    """Own motion over GAP, diagonals a second; NaN where it can be told of no pair of frames."""
    stride = min(len(pictures) - 1, max(1, round(GAP * fps)))
    moved = np.array([own_motion(step) for step in steps(pictures[::stride])])
    return (
        float(moved[np.isfinite(moved)].mean()) * fps / stride
        if np.isfinite(moved).any()
        else math.nan
    )


def own_motion(step: Step) -> float:
    """Mean speed of the fastest TOP of pixels relative to the camera, diagonals a step.

    NaN where a changing picture has no texture. The camera's motion is the homography that most
    textured points follow, as long as these are spread over the picture (one object before an empty
    wall is an object). A pixel moves by itself only where its own flow explains it better than the
    camera does: at edges and on plain areas flow errs, and would make a pan over a still lively.
    """
    if np.array_equal(step.before, step.after):
        return 0.0
    textured = _textured(step.before)
    if not textured.any():
        return math.nan
    camera = _camera_flow(step, step.found & textured)
    explained = _misfit(step, camera) - step.errors > EXPLAINED
    speed = np.where(
        explained & step.found & textured, np.linalg.norm(step.flow - camera, axis=-1), 0.0
    )
    margin = max(2, speed.shape[1] // 40)  # new things come in there
    inner = speed[margin:-margin, margin:-margin].ravel()
    fastest = max(1, round(TOP * inner.size))
    return float(np.partition(inner, -fastest)[-fastest:].mean() / math.hypot(*speed.shape))


def warp_error(step: Step) -> float:
    """Mean squared difference of brightness, in [0, 1], of the pixels that are found again.

    NaN where none is.
    """
    return float(np.square(step.errors[step.found] / 255).mean()) if step.found.any() else math.nan


def lost(step: Step) -> float:
    """Share of the pixels that should still be in the picture but are not found again.

    It is near 1 at a hard cut.
    """
    return 1.0 - float(step.found.sum() / max(1, step.inside.sum()))


def bend(all_steps: Sequence[Step]) -> float:
    """Change of flow from step to step, relative to its length.

    0 = even motion, about 1.5 = every step is a new one.
    """
    change = np.mean(
        [np.linalg.norm(b.flow - a.flow, axis=-1).mean() for a, b in itertools.pairwise(all_steps)]
    )
    length = np.mean([np.linalg.norm(step.flow, axis=-1).mean() for step in all_steps])
    return float(change / (length + 0.05))  # 0.05 pixels: below, flow is noise


def flicker(pictures: Sequence[np.ndarray]) -> float:
    """Mean absolute second difference of the frames' brightness, in [0, 1]: a fade has none."""
    return float(np.abs(np.diff([picture.mean() for picture in pictures], 2)).mean() / 255)


def novelty(pictures: Sequence[np.ndarray]) -> float:
    """Distance to the nearest earlier frame, over that of successive frames, at most 1.

    Both are means over frames; the last frame before each one does not count. Near 0 where frames
    come back: frozen, stuttering, shuffled, looped.
    """
    import cv2

    thumbs = np.stack(
        [
            cv2.resize(picture, (32, 32), interpolation=cv2.INTER_AREA).ravel()
            for picture in pictures
        ]
    ).astype(np.float32)
    distance = np.stack([np.abs(thumbs - thumb).mean(1) for thumb in thumbs])
    adjacent = np.diag(distance, 1).mean()
    return (
        float(
            np.mean(
                [min(1.0, distance[t, : t - 1].min() / adjacent) for t in range(2, len(thumbs))]
            )
        )
        if adjacent
        else 0.0
    )


def sharpness(picture: np.ndarray) -> float:
    """Fineness of what is seen, 1/pixels, whatever its contrast; 0 for a plain picture.

    It is the root mean square of curvature over that of slope.
    """
    import cv2

    curve = cv2.Laplacian(grey(picture).astype(np.float32), cv2.CV_32F)
    return float(
        np.sqrt(np.square(curve).mean() / (np.square(_slopes(picture)).sum(-1).mean() + 1))
    )


def colour_drift(all_steps: Sequence[Step]) -> float:
    """Furthest that the colour of tracked pixels gets from the start.

    It is the root sum of squares of brightness, saturation (natural logarithms of their gain) and
    hue (radians). Steps add up along the flow, so that a camera which finds other colours has no
    drift.
    """
    return float(
        np.linalg.norm(np.cumsum([_gain(step) for step in all_steps], axis=0), axis=-1).max()
    )


def _gain(step: Step) -> tuple[float, float, float]:
    """(log brightness, log saturation, hue) of one step.

    A step that finds hardly anything again is a cut, and says nothing.
    """
    import cv2

    if step.found.mean() < 0.2:
        return 0.0, 0.0, 0.0
    a, b = (cv2.blur(picture.astype(np.float32), (5, 5)) for picture in (step.before, step.after))
    # nearest: interpolation would bleach, step by step
    a = a[step.found]
    b = pulled(b, step.flow, nearest=True)[step.found]
    chroma_a, chroma_b = _chroma(a), _chroma(b)
    floor = 64.0  # squared levels: a grey picture has no hue
    saturation = 0.5 * math.log(
        (np.mean(np.abs(chroma_b) ** 2) + floor) / (np.mean(np.abs(chroma_a) ** 2) + floor)
    )
    turn = float(np.angle(np.mean(chroma_b * chroma_a.conj()) + floor))
    return math.log((b.mean() + 8) / (a.mean() + 8)), saturation, turn


def _chroma(rgb: np.ndarray) -> np.ndarray:
    """The colour circle as complex numbers, [..., 3] -> [...]: length = saturation, angle = hue."""
    return rgb @ np.exp(2j * math.pi / 3 * np.arange(3)).astype(np.complex64)


def _camera_flow(step: Step, reliable: np.ndarray) -> np.ndarray:
    """float32 [H, W, 2]: the motion that most of the picture shares.

    0 unless points in at least half of its cells do.
    """
    import cv2

    places = _places(reliable.shape)
    points = places[reliable][:: max(1, reliable.sum() // 2000)]
    goals = points + step.flow[reliable][:: max(1, reliable.sum() // 2000)]
    if len(points) < CELLS**2:
        return np.zeros_like(step.flow)
    homography, follows = cv2.findHomography(points, goals, cv2.RANSAC, CAMERA_ERROR)
    if homography is None or _cells(points[follows.ravel() > 0], reliable.shape) < CELLS**2 / 2:
        return np.zeros_like(step.flow)
    return cv2.perspectiveTransform(places, homography) - places


def _cells(points: np.ndarray, shape: tuple[int, int]) -> int:
    """Number of the CELLS x CELLS parts of the picture that have points in them."""
    return len(np.unique(points * CELLS // shape[::-1], axis=0))


def _misfit(step: Step, flow: np.ndarray) -> np.ndarray:
    """float32 [H, W]: difference of brightness if ``before`` went along ``flow``.

    Levels of 255.
    """
    return np.abs(pulled(grey(step.after).astype(np.float32), flow) - grey(step.before))


def pulled(picture: np.ndarray, flow: np.ndarray, nearest: bool = False) -> np.ndarray:
    """The picture [H, W, ...] as seen from where the flow starts."""
    import cv2

    return cv2.remap(
        picture,
        _places(flow.shape[:2]) + flow,
        None,
        cv2.INTER_NEAREST if nearest else cv2.INTER_LINEAR,
        borderMode=cv2.BORDER_REPLICATE,
    )


def grey(picture: np.ndarray) -> np.ndarray:
    """uint8 [H, W]."""
    import cv2

    return cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)


def _slopes(picture: np.ndarray) -> np.ndarray:
    """float32 [H, W, 2], levels a pixel."""
    import cv2

    return np.stack(
        [cv2.Sobel(grey(picture), cv2.CV_32F, dx, 1 - dx, scale=1 / 8) for dx in (1, 0)], -1
    )


def _textured(picture: np.ndarray) -> np.ndarray:
    """bool [H, W]: at least a fifth of the pixels around have a slope."""
    import cv2

    return (
        cv2.blur((np.linalg.norm(_slopes(picture), axis=-1) > TEXTURE).astype(np.float32), (5, 5))
        > 0.2
    )


@lru_cache(maxsize=4)
def _places(shape: tuple[int, int]) -> np.ndarray:
    """float32 [H, W, 2]: column and row of every pixel; shared, not to be written to."""
    return np.stack(np.meshgrid(np.arange(shape[1]), np.arange(shape[0])), -1).astype(np.float32)


T = TypeVar("T")


@contextmanager
def one_thread():
    """Pictures of 96x96 are not worth OpenCV's thread pool; leaves its setting as it was."""
    import cv2

    before = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        yield
    finally:
        cv2.setNumThreads(before)


def in_parallel(measure: Callable[[np.ndarray], T], batch: VideoBatch) -> list[T]:
    """Measure every clip's frames, uint8 [T, C, H, W], several clips at a time.

    As many as torch has threads: OpenCV and numpy let each other run.
    """
    with one_thread(), ThreadPoolExecutor(torch.get_num_threads()) as pool:
        return list(pool.map(lambda clip: measure(clip.cpu().numpy()), batch.frames))
