"""The miniature's three rewards, measured on pixels, each in [0, 1].

They are visual quality, motion quality and text alignment.

All three read one shared measurement (``kvpo.mini.rewards.track``), and are built alike: parts in
[0, 1], each graded,

    soft(error; free, scale) = exp(-max(0, error - free) / scale)

then their weighted geometric mean, every part floored at 0.01: one bad part cannot be paid for by
the others, and what remains still ranks. A part for which a clip offers no evidence (the colour of
an object that stays behind the pillar) is left out. ``share``: mean over frames, hidden frames not
counted, absent ones counted 0.

VQ, what a look at the frames says, without the prompt:
    one      share( soft(stray; .02, .1) soft(|ln area / nearest of [85, 300]|; 0, .3) )   exactly one object of a plausible area
    clean    share( soft(1 - best fit; .05, .12) )            it has the outline of some shape
    sharp    share( soft(blur; 1.2, .8) )                     its edge is crisp
    palette  share( soft(distance to nearest colour; .05, .15) soft(grain; .04, .06) )     its colour is one of six, and even
    calm     mean_t soft(unrest; .004, .03)                   the background stands still
    place    soft(error to nearest place; .02, .1)            the background is one of three, with or without its pillar

MQ, how it moves, with the prompt's pace (slowly .8, quickly 1.6 px/frame; no speed asked: anything
between):
    MQ = speed * there * geometric mean(smooth, whole_way, flicker),   so what does not move, or is not there, earns nothing
    speed      min(r, 1/r)^1.5, r = (mean |u| / that of the asked motion) within 8 % counts as 1
    smooth     soft(mean min(|dv|, 4) - the motion's own; .15, .5), only vertically while the pillar cuts the object
    whole_way  soft(sum of jumps; 0, 1.5), a jump = (|v| - 3.2) / 4 in [0, 1]: true steps are at most 2.5 px
    flicker    soft(mean min(|d light|, .1); .002, .01) soft(mean min(|d colour|, .3); .01, .03) soft(mean min(|d ln area|, 1); .03, .1)
    there      share of frames in which it is there

TA, what the prompt asks, given its history (weights 1, 1, .5, 1, 2):
    colour   share( soft(distance to the asked colour; .05, .15) )
    shape    share( softmax(fit / .03) at the asked shape * soft(1 - fit; .05, .3) )   whole frames only
    size     share( soft(|ln(radius / asked)|; .06, .12) )                              whole frames only
    place    soft(error to the asked place; .02, .1) * soft(error of the pillar's columns; .02, .1) * soft(area drawn over the pillar; 2, 40)
    motion   there * ((1 + m) / 2)^6, m = agreement of the track with the asked motion (``kvpo.mini.rewards.motion``)
             hide: there * soft(|x - middle| at the end, less what time did not suffice for; 2, 8) *
             soft(|dy|; 3, 8)

A moving object may stay hidden no longer than the pillar is wide; longer counts as absent.

What these measures cannot see: anything but one saturated object on three known places (a pretty
cloud scores as a defect), rotation of the object, the phase of a circle, whether what comes out
from behind the pillar is what went in if the prompts name neither, and anything before the clip.
They are exact on this world and meaningless elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvpo.mini.rewards.asked import (
    EVIDENCE,
    NONE,
    PALETTE,
    asked,
    blend,
    excused,
    paces,
    share,
    soft,
    there,
    tip,
)
from kvpo.mini.rewards.motion import (
    FASTEST,
    KINDS,
    LAG,
    Motion,
    agreement,
    motion,
    typical_bend,
    typical_speed,
    wrap,
)
from kvpo.mini.rewards.track import AREA, Observed, observe
from kvpo.mini.world import COLOURS, FPS, PILLAR, PLACES, SHAPES, Scene
from kvpo.rewards.base import RewardSpec, VideoBatch
from kvpo.rewards.measured import Measured

FAMILY = "world-pixels"
MIDDLE = (PILLAR[0] + PILLAR[1]) / 2


@dataclass(frozen=True)
class VisualQuality(Measured):
    spec: RewardSpec = RewardSpec(
        "VQ",
        FAMILY,
        looks_at="one sharp, clean object on one of the world's places",
        needs_prompt=False,
        min_frames=2,
    )

    def measure(self, batch: VideoBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        s = observe(batch)
        visible = ~s.hidden
        # cut objects have no outline to judge
        whole = s.whole
        judged = visible & (s.whole | ~s.seen)
        nearest = torch.cdist(s.colour, PALETTE).amin(-1)
        odd = (s.area.clamp(min=1).log() - s.area.clamp(85, 300).log()).abs()
        parts = {
            "one": share(
                soft(s.stray, 0.02, 0.1) * torch.where(whole, soft(odd, 0, 0.3), 1.0),
                s.seen,
                visible,
            ),
            "clean": share(soft(1 - s.fit.amax(-1), 0.05, 0.12), whole, judged),
            "sharp": share(soft(s.blur, 1.2, 0.8), whole, judged),
            "palette": share(
                soft(nearest, 0.05, 0.15) * soft(s.grain, 0.04, 0.06), s.seen, visible & ~tip(s)
            ),
            "calm": soft(s.unrest, 0.004, 0.03).mean(1),
            "place": soft(s.place_error.amin(1), 0.02, 0.1)
            * soft(torch.minimum(s.pillar_error, s.open_error.amin(1)), 0.02, 0.1),
        }
        return blend(parts, dict.fromkeys(parts, 1.0)), parts


@dataclass(frozen=True)
class MotionQuality(Measured):
    spec: RewardSpec = RewardSpec(
        "MQ", FAMILY, looks_at="smooth motion at the asked pace, not frozen", min_frames=2 * LAG
    )

    def measure(self, batch: VideoBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        s, scenes = observe(batch), asked(batch)
        moved, range_B = motion(s), paces(batch, scenes)
        bend = torch.tensor(
            [
                typical_bend(scene.motion or "left", fast)
                for scene, (_, fast) in zip(scenes, range_B)
            ]
        )
        clear = s.seen & ~tip(s)
        still = clear[:, 1:] & clear[:, :-1]
        whole = s.whole[:, 1:] & s.whole[:, :-1]
        jump = (
            ((moved.step.norm(dim=-1) * (batch.fps / FPS) - FASTEST - 0.7) / 4).clamp(0, 1).sum(1)
        )
        kinks = moved.known[:, 1:] & moved.known[:, :-1]
        # a cut object's column is an estimate: its height alone tells
        level = torch.stack((whole[:, 1:] & whole[:, :-1], torch.ones_like(kinks)), -1)
        dv = (moved.step.diff(dim=1) * level).norm(dim=-1).clamp(max=4)
        parts = {
            "speed": _speed(moved, scenes, range_B),
            "smooth": soft(share(dv, kinks, kinks) - bend, 0.15, 0.5),
            "whole_way": soft(jump, 0, 1.5),
            "flicker": soft(s.light.diff(dim=1).abs().clamp(max=0.1).mean(1), 0.002, 0.01)
            * soft(
                share(s.colour.diff(dim=1).norm(dim=-1).clamp(max=0.3), still, still).nan_to_num(0),
                0.01,
                0.03,
            )
            * soft(
                share(
                    s.area.clamp(min=1).log().diff(dim=1).abs().clamp(max=1), whole, whole
                ).nan_to_num(0),
                0.03,
                0.1,
            ),
            "there": there(s, excused(batch, s, scenes)),
        }
        rest = blend(parts, {"smooth": 1.0, "whole_way": 1.0, "flicker": 1.0})
        return parts["speed"].nan_to_num(1.0) * parts["there"] * rest, parts


def _speed(moved: Motion, scenes: list[Scene], range_B: list[tuple[float, float]]) -> torch.Tensor:
    """Speed part of MQ; NaN where the object is not seen long enough to move."""
    speed = share(moved.smooth.norm(dim=-1), moved.valid, moved.valid)
    low = torch.tensor(
        [0.92 * typical_speed(s.motion or "left", r[0]) for s, r in zip(scenes, range_B)]
    )
    high = torch.tensor(
        [1.08 * typical_speed(s.motion or "left", r[1]) for s, r in zip(scenes, range_B)]
    )
    return torch.minimum(speed / low, high / speed.clamp(min=1e-6)).clamp(max=1).pow(1.5)


@dataclass(frozen=True)
class TextAlignment(Measured):
    spec: RewardSpec = RewardSpec(
        "TA",
        FAMILY,
        looks_at="the asked shape, colour, place and motion",
        min_frames=2 * LAG,
    )

    def measure(self, batch: VideoBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        s, scenes = observe(batch), asked(batch)
        hidden = excused(batch, s, scenes)
        judged = ~hidden & (s.whole | ~s.seen)
        parts = {
            "colour": share(
                soft(_distance(s.colour, scenes), 0.05, 0.15), s.seen, ~hidden & ~tip(s)
            ),
            "shape": share(_shape(s.fit, scenes), s.whole, judged),
            "size": share(_size(s, scenes), s.whole, judged),
            "place": _place(s, scenes),
            "motion": there(s, hidden) * _motion(batch, s, scenes),
        }
        for name, attribute in (
            ("colour", "colour"),
            ("shape", "shape"),
            ("size", "size"),
            ("motion", "motion"),
        ):
            silent = torch.tensor([getattr(scene, attribute) is None for scene in scenes])
            parts[name] = torch.where(silent, NONE, parts[name])
        return blend(
            parts, {"colour": 1.0, "shape": 1.0, "size": 0.5, "place": 1.0, "motion": 2.0}
        ), parts


def _index(names, value: str | None) -> int:
    """Place of a value among its names; 0 where nothing is asked (the part is then left out)."""
    return list(names).index(value) if value else 0


def _distance(colour_BTC: torch.Tensor, scenes: list[Scene]) -> torch.Tensor:
    """Euclidean RGB distance of the object to the asked colour, BT."""
    return (colour_BTC - PALETTE[[_index(COLOURS, s.colour) for s in scenes]][:, None]).norm(dim=-1)


def _shape(fit_BTK: torch.Tensor, scenes: list[Scene]) -> torch.Tensor:
    """Grade of the outline, BT: it is clearly, and well, the asked shape's."""
    k = torch.tensor([_index(SHAPES, s.shape) for s in scenes])[:, None, None].expand(
        *fit_BTK.shape[:2], 1
    )
    return (fit_BTK / 0.03).softmax(-1).gather(2, k)[..., 0] * soft(
        1 - fit_BTK.gather(2, k)[..., 0], 0.05, 0.3
    )


def _size(s: Observed, scenes: list[Scene]) -> torch.Tensor:
    """Agreement with the asked radius, BT.

    The radius follows from the area and the likeliest shape.
    """
    unit = ((s.fit / 0.03).softmax(-1) * torch.tensor([AREA[k] for k in SHAPES])).sum(-1)
    radius = torch.tensor([scene.radius for scene in scenes])[:, None]
    return soft(((s.area / unit).clamp(min=1).sqrt() / radius).log().abs(), 0.06, 0.12)


def _place(s: Observed, scenes: list[Scene]) -> torch.Tensor:
    """Place and pillar, B.  No place asked: the nearest will do."""
    out = []
    for b, scene in enumerate(scenes):
        p = _index(PLACES, scene.place) if scene.place else int(s.place_error[b].argmin())
        columns = s.pillar_error[b] if scene.pillar else s.open_error[b, p]
        over = s.intrusion[b].mean() if scene.pillar else torch.zeros(())
        out.append(
            soft(s.place_error[b, p], 0.02, 0.1) * soft(columns, 0.02, 0.1) * soft(over, 2, 40)
        )
    return torch.stack(out)


def _motion(batch: VideoBatch, s: Observed, scenes: list[Scene]) -> torch.Tensor:
    """Motion part of TA before ``there``, B; NaN where too little of the track is seen."""
    moved, range_B = motion(s), paces(batch, scenes)
    m_BK = torch.maximum(*(agreement(moved, torch.tensor([r[i] for r in range_B])) for i in (0, 1)))
    enough = moved.valid.sum(1) >= EVIDENCE
    kind = torch.tensor(
        [KINDS.index(scene.motion) if scene.motion in KINDS else 0 for scene in scenes]
    )
    plain = torch.where(enough, ((1 + m_BK.gather(1, kind[:, None])[:, 0]) / 2).pow(6), NONE)
    hiding = torch.tensor([scene.motion == "hide" for scene in scenes])
    return torch.where(hiding, hides(s, torch.tensor([r[0] for r in range_B])), plain)


def hides(s: Observed, pace: torch.Tensor) -> torch.Tensor:
    """Grade of hiding, B: the object ends near the pillar's middle, and goes there on the level.

    Hidden frames at the end count as arrived. What is still missing only because the clip is too
    short is forgiven.
    """
    first, last = s.seen.int().argmax(1), s.seen.shape[1] - 1 - s.seen.flip(1).int().argmax(1)
    begin, end = (
        s.centre.gather(1, i[:, None, None].expand(-1, 1, 2))[:, 0] for i in (first, last)
    )
    time = s.seen.shape[1] - 1 - first
    owed = ((begin[:, 0] - MIDDLE).abs() - pace * time).clamp(min=0)
    gap = torch.where(s.hidden[:, -1], 0.0, (end[:, 0] - MIDDLE).abs() - owed)
    drift = wrap(end[:, 1] - begin[:, 1]).abs()
    never = ~s.seen.any(1)
    return torch.where(never, s.hidden[:, -1].float(), soft(gap, 2, 8) * soft(drift, 3, 8))
