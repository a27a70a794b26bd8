"""Tracking in clips of the miniature's world: the object frame by frame, and its place.

The one saturated thing in front of greyish places is the object; nothing here reads a prompt.  With
chroma c = max(R, G, B) - min(R, G, B) in [0, 1]:

    weight  w     = clamp((c - LOW) / (HIGH - LOW), 0, 1)             per pixel
    alpha         = clamp((c - GREY) / (c_peak - GREY), 0, 1)         in a 32x32 patch around the densest spot
    area, centre  = sum and centroid of alpha                          (the picture's edges are joined)
    stray         = share of w outside the patch                       second objects, coloured noise
    fit_k         = 1 - sum |alpha - template_k| / sum (alpha + template_k)   for each shape k, radius from the area
    blur          = sum alpha (1 - alpha) / sqrt(area)                 about 0.4 to 0.9 for sharp outlines

The pillar is found in the background. An object that touches it is partly hidden: its column then
follows from the outer edge and the width it had when whole. Frames without an object are *hidden*
if the object was last seen at the pillar and is next seen there (or was never seen before, or
after, within the clip).
"""

from __future__ import annotations

import math
import weakref
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from kvpo.mini.world import BAND, PILLAR, PILLAR_COLOUR, PLACES, SHAPES, SIZE, signed_distance
from kvpo.rewards.base import VideoBatch

LOW, HIGH = 0.14, 0.36
"""Chroma of the palest pixel that may, and of every pixel that must, belong to the object.

Places have at most 0.07, the palette at least 0.53.
"""
GREY = 0.06
PATCH = 32
SEEN = 12.0
"""Pixels of weight from which on there is an object (a small triangle has 98)."""
AREA = {
    "circle": math.pi * 0.95**2,
    "square": (2 * 0.84) ** 2,
    "triangle": 3 * math.sqrt(3.0) * 0.62**2,
    "cross": 2 * 2.1 * 0.76 - 0.76**2,
}
"""Area of a shape of radius 1."""
INSIDE = slice((PILLAR[0] + 1) // 2, (PILLAR[1] + 1) // 2)
"""The pillar's columns at half resolution."""


@dataclass(frozen=True)
class Observed:
    """Facts of B clips of T frames; colours in [0, 1], lengths in pixels.

    P places stand in the order of PLACES, K shapes in that of SHAPES.
    """

    seen: torch.Tensor
    """bool_BT: some object is visible."""
    hidden: torch.Tensor
    """bool_BT: not visible, and the pillar explains it."""
    whole: torch.Tensor
    """bool_BT: seen and not cut by the pillar."""
    area: torch.Tensor
    """a_BT visible area."""
    stray: torch.Tensor
    """share_BT of coloured pixels that lie far from the object."""
    centre: torch.Tensor
    """c_BT2 (x, y) in [0, 64); meaningless where not seen."""
    colour: torch.Tensor
    """rgb_BTC of the object's core."""
    grain: torch.Tensor
    """Mean absolute colour deviation inside the core, BT."""
    fit: torch.Tensor
    """fit_BTK in [0, 1]: agreement with every shape."""
    blur: torch.Tensor
    """blur_BT, see above."""
    unrest: torch.Tensor
    """Mean absolute deviation of the background from its average over time, BT."""
    light: torch.Tensor
    """Signed mean of that deviation, BT."""
    place_error: torch.Tensor
    """err_BP: mean absolute difference of the average background to every place.

    It is taken beside the pillar's columns.
    """
    pillar_error: torch.Tensor
    """err_B: the same of the pillar's columns to the pillar."""
    open_error: torch.Tensor
    """err_BP: the same of the pillar's columns to every place, as if there were no pillar."""
    pillar: torch.Tensor
    """bool_B: a pillar is seen."""
    intrusion: torch.Tensor
    """a_BT: coloured pixels in front of the pillar's columns (they should be behind it)."""


_OBSERVED: weakref.WeakKeyDictionary[VideoBatch, Observed] = weakref.WeakKeyDictionary()


def observe(batch: VideoBatch) -> Observed:
    """Measure the facts of a batch, once.

    The three rewards and the evaluation share them while the batch lives. Raises ValueError for
    frames of another size.
    """
    if batch not in _OBSERVED:
        if tuple(batch.frames.shape[-2:]) != (SIZE, SIZE):
            raise ValueError(
                f"frames are {list(batch.frames.shape[-2:])} pixels; the miniature's rewards measure {SIZE}x{SIZE} pictures, use other rewards for other videos"
            )
        with torch.inference_mode():
            _OBSERVED[batch] = _observe(batch.frames)
    return _OBSERVED[batch]


def _observe(frames: torch.Tensor) -> Observed:
    B, T = frames.shape[:2]
    flat = frames.flatten(0, 1)  # [N, C, H, W] with N = B T
    chroma = (flat.amax(1) - flat.amin(1)).float().div_(255)
    weight = ((chroma - LOW) / (HIGH - LOW)).clamp_(0, 1)
    coarse = F.avg_pool2d(weight[:, None], 2)
    mass = coarse.sum((1, 2, 3)) * 4
    place = _background(frames, coarse[:, 0].unflatten(0, (B, T)))
    body = _object(flat, chroma, weight, coarse, mass)
    pillar = (place["pillar_error"] < place["open_error"].amin(1)) & (place["pillar_error"] < 0.15)
    columns = weight.amax(1).unflatten(0, (B, T))
    seen = (mass > SEEN).unflatten(0, (B, T))
    body = {name: value.unflatten(0, (B, T)) for name, value in body.items()}
    edges = _at_pillar(columns, seen, pillar, body["centre"])
    intrusion = weight[:, :, PILLAR[0] + 2 : PILLAR[1] - 2].sum((1, 2)).unflatten(0, (B, T))
    return Observed(**body | place | edges, seen=seen, pillar=pillar, intrusion=intrusion)


def _object(
    flat: torch.Tensor,
    chroma: torch.Tensor,
    weight: torch.Tensor,
    coarse: torch.Tensor,
    mass: torch.Tensor,
) -> dict[str, torch.Tensor]:
    """Measure the densest coloured spot of each of N frames."""
    N = len(flat)
    smooth = coarse
    for _ in range(
        2
        # twice a box = a hat, which peaks in the middle of the object rather than anywhere on a plateau
    ):
        smooth = F.avg_pool2d(
            F.avg_pool2d(F.pad(smooth, (3, 3, 3, 3), mode="circular"), (7, 1), 1), (1, 7), 1
        )
    peak = smooth.flatten(1).argmax(1)
    # (x, y)
    corner = torch.stack((peak % (SIZE // 2), peak // (SIZE // 2)), 1) * 2 + 1 - PATCH // 2
    axis = torch.arange(PATCH)
    n = torch.arange(N)[:, None, None]
    rows = ((corner[:, 1:] + axis) % SIZE)[:, :, None]
    cols = ((corner[:, :1] + axis) % SIZE)[:, None, :]
    c = chroma[n, rows, cols]
    level = c.pow(3).sum((1, 2)) / c.square().sum((1, 2)).clamp(min=1e-6)
    alpha = ((c - GREY) / (level - GREY).clamp(min=0.05)[:, None, None]).clamp_(0, 1)
    area = alpha.sum((1, 2))
    total = area.clamp(min=1e-6)
    middle = (
        torch.stack(((alpha.sum(1) * (axis + 0.5)).sum(1), (alpha.sum(2) * (axis + 0.5)).sum(1)), 1)
        / total[:, None]
    )
    core = alpha.square().square()
    heart = core.sum((1, 2)).clamp(min=1e-6)
    pixels = flat.movedim(1, -1)[n, rows, cols].movedim(-1, 1).float().div_(255)
    colour = (pixels * core[:, None]).sum((2, 3)) / heart[:, None]
    grain = ((pixels - colour[:, :, None, None]).abs().mean(1) * core).sum((1, 2)) / heart
    return {
        "area": area,
        "stray": (1 - weight[n, rows, cols].sum((1, 2)) / mass.clamp(min=1e-6)).clamp(0, 1),
        "centre": (corner + middle) % SIZE,
        "colour": colour,
        "grain": grain,
        "fit": _fits(alpha, area, middle),
        "blur": (alpha * (1 - alpha)).sum((1, 2)) / total.sqrt(),
    }


def _fits(alpha: torch.Tensor, area: torch.Tensor, middle: torch.Tensor) -> torch.Tensor:
    """fit_NK: agreement of the patches with every shape of the same area and centroid.

    All shapes are drawn around their centroid.
    """
    axis = torch.arange(PATCH) + 0.5
    dx, dy = (axis - middle[:, :1])[:, None, :], (axis - middle[:, 1:])[:, :, None]
    fits = []
    for shape in SHAPES:
        radius = (area / AREA[shape]).sqrt().clamp(4, 14)[:, None, None]
        template = (0.5 - signed_distance(shape, dx, dy, radius)).clamp_(0, 1)
        fits.append(
            1 - (alpha - template).abs().sum((1, 2)) / (area + template.sum((1, 2))).clamp(min=1e-6)
        )
    return torch.stack(fits, 1)


def _background(frames: torch.Tensor, coarse: torch.Tensor) -> dict[str, torch.Tensor]:
    """The place: every second pixel, where no object is near."""
    picture = frames[..., ::2, ::2].float().div_(255)  # [B, T, C, h, w]
    free = (F.max_pool2d(coarse, 3, 1, 1) < 0.02).float()[:, :, None]
    count = free.sum(1)  # [B, 1, h, w]
    mean = (picture * free).sum(1) / count.clamp(min=1)
    off = (picture - mean[:, None]) * free
    pixels = free.sum((2, 3, 4)).clamp(min=1)
    # nothing but colour: as restless as can be
    bare = free.sum((2, 3, 4)) < 0.1 * free[0, 0].numel()
    known = (count > 0).float()
    beside = known.clone()
    beside[..., INSIDE] = 0
    within = known - beside
    tones = torch.tensor(list(PLACES.values()), dtype=torch.float32) / 255  # [P, band, C]
    # [1, P, C, h, 1]
    bands = tones[:, (torch.arange(0, SIZE, 2) // BAND) % 2].transpose(1, 2)[None, :, :, :, None]
    stone = (torch.tensor(PILLAR_COLOUR) / 255.0).view(1, 1, 3, 1, 1)

    def error(to: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
        total = where.sum((2, 3))
        wrong = ((mean[:, None] - to).abs().mean(2) * where).sum((2, 3)) / total.clamp(min=1)
        return torch.where(total > 0, wrong, torch.ones_like(wrong))

    return {
        "unrest": torch.where(bare, 1.0, off.abs().mean(2).sum((2, 3)) / pixels),
        "light": off.mean(2).sum((2, 3)) / pixels,
        "place_error": error(bands, beside),
        "pillar_error": error(stone, within)[:, 0],
        "open_error": error(bands, within),
    }


def _at_pillar(
    columns: torch.Tensor, seen: torch.Tensor, pillar: torch.Tensor, centre: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Tell which frames show the object whole, cut or hidden.

    ``columns`` [B, T, W]: strongest weight of every column.
    """
    first, stop = PILLAR
    # drawn over the pillar: nothing is hidden
    front = columns[..., first + 3 : stop - 3].amax(-1) > 0.3
    left, right = columns[..., first - 1] > 0.5, columns[..., stop] > 0.5
    cut = seen & pillar[:, None] & ~front & (left | right)
    whole = seen & ~cut
    width = columns[..., :first].sum(-1) + columns[..., stop:].sum(-1)
    count = whole.sum(1)
    half = torch.where(
        count > 0, (width * whole).sum(1) / (2 * count.clamp(min=1)), torch.tensor(8.0)
    )[:, None]
    x = torch.where(
        cut, torch.where(left, first - width + half, stop + width - half) % SIZE, centre[..., 0]
    )
    near = cut | (
        ((x - (first + stop) / 2).abs() < (stop - first) / 2 + half + 4) & pillar[:, None]
    )
    before, after = nearest_seen(seen)

    def excused(at, exists):
        return torch.where(exists, near.gather(1, at), True)

    hidden = (
        ~seen
        & pillar[:, None]
        & excused(before.clamp(min=0), before >= 0)
        & excused(after.clamp(max=seen.shape[1] - 1), after < seen.shape[1])
    )
    return {"whole": whole, "hidden": hidden, "centre": torch.stack((x, centre[..., 1]), -1)}


def nearest_seen(seen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Find for every frame the seen frames nearest to it, both [B, T].

    They are the last up to it (-1: none) and the first from it on (T: none).
    """
    T = seen.shape[1]
    index = torch.arange(T).expand_as(seen)
    before = torch.where(seen, index, -1).cummax(1).values
    after = torch.where(seen, index, T).flip(1).cummin(1).values.flip(1)
    return before, after
