"""Plain facts about clips of the world, for evaluation.

They say whether the object is there and alone, and everything as asked.

    facts = measure(batch)          per frame and per clip
    facts.means()                   {"alone": 0.97, "colour": 0.91, "motion": 0.68, ...}
    decay(batch)                    visual quality of the last fifth / first fifth of long clips

Same measurement as the rewards (``kvpo.mini.rewards.track``) but hard decisions instead of grades.
So these numbers are readable, not independent: the independent ones are in
``kvpo.mini.rewards.heldout``. Frames in which the pillar rightly hides the object are not counted
at all.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from kvpo.mini.rewards.asked import EVIDENCE, NONE, PALETTE, asked, excused, share, tip
from kvpo.mini.rewards.motion import KINDS, REST, Motion, agreement, motion, typical_speed
from kvpo.mini.rewards.track import observe
from kvpo.mini.rewards.world import FAMILY, VisualQuality, hides
from kvpo.mini.world import COLOURS, FPS, HEADING, PLACES, SHAPES, SPEEDS, Scene
from kvpo.rewards.base import RewardSpec, VideoBatch
from kvpo.rewards.measured import Measured

STRAY = 0.2
"""Share of coloured pixels away from the object from which on it is not alone."""
SMALLEST, LARGEST = 60.0, 400.0
"""Area of a whole object, pixels; true ones have 98 to 283."""
OFF_COLOUR = 0.3
"""RGB distance from which on a colour is none of the palette.

It is half the least distance between two of them.
"""
HANDICAP = 0.05
"""Lead in agreement that a circle or a bounce needs over a straight line.

With free phases they fit a short straight track too.
"""
CLEAR = 0.75
"""Agreement from which on a track is of that kind.

A straight track agrees with half a circle at 0.55.
"""


@dataclass(frozen=True)
class Facts:
    """Per-frame facts bool [B, T], per-clip shares and truths float [B].

    NaN = the clip cannot tell, or the prompt does not ask.
    """

    present: torch.Tensor
    """bool_BT: one object of plausible size, and no other."""
    counted: torch.Tensor
    """bool_BT: not rightly hidden."""
    alone: torch.Tensor
    """Share of counted frames with ``present``."""
    colour: torch.Tensor
    """Share of counted frames whose object is nearest to the asked colour (absent = wrong)."""
    shape: torch.Tensor
    """Share of counted frames whose outline is nearest to the asked shape (absent = wrong).

    Frames cut by the pillar are left out.
    """
    place: torch.Tensor
    """1 or 0: place and pillar as asked."""
    motion: torch.Tensor
    """1 or 0: the track is of the asked kind and pace.

    Its speed must be nearer to the asked one than to the other.
    """
    kind: tuple[str, ...]
    """Kind of track: a kind of motion, ``still``, ``hide``, ``unclear`` or ``unseen``."""

    def means(self) -> dict[str, float]:
        """Mean over the clips that can tell, by name."""
        shares = {name: getattr(self, name) for name in PARTS}
        return {name: value.nanmean().item() for name, value in shares.items()}


PARTS = ("alone", "colour", "shape", "place", "motion")


@dataclass
class WorldFacts(Measured):
    """The facts as a guard of evaluations.

    Its score is the mean of the parts a clip can tell; it also reports the parts themselves.
    """

    spec: RewardSpec = RewardSpec(
        "facts",
        FAMILY,
        looks_at="plain facts of the world: one object, its colour, its motion",
        min_frames=8,
        report=PARTS,
    )

    def measure(self, batch: VideoBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        facts = _measure(batch)
        parts = {name: getattr(facts, name).float() for name in PARTS}
        return torch.stack(list(parts.values())).nanmean(0), parts


def measure(batch: VideoBatch) -> Facts:
    """Facts of clips that each lie within one prompt segment."""
    with torch.inference_mode():
        return _measure(batch)


def _measure(batch: VideoBatch) -> Facts:
    s, scenes = observe(batch), asked(batch)
    hidden = excused(batch, s, scenes)
    size_ok = (s.area > SMALLEST) & (s.area < LARGEST)
    present = s.seen & (s.stray < STRAY) & (size_ok | ~s.whole)
    distance = torch.cdist(s.colour, PALETTE)
    colour = torch.tensor([_place_of(COLOURS, scene.colour) for scene in scenes])
    shape = torch.tensor([_place_of(SHAPES, scene.shape) for scene in scenes])
    coloured = (distance.argmin(-1) == colour[:, None]) & (distance.amin(-1) < OFF_COLOUR)
    shaped = s.fit.argmax(-1) == shape[:, None]
    judged = ~hidden & (s.whole | ~s.seen)
    moved = motion(s)
    speed_B = share(moved.smooth.norm(dim=-1), moved.valid, moved.valid)
    kind, paced = _kinds(batch, moved, speed_B), _paced(scenes, speed_B, FPS / batch.fps)
    right = [
        NONE if scene.motion is None or k == "unseen" else float(k == scene.motion and p)
        for scene, k, p in zip(scenes, kind, paced)
    ]
    return Facts(
        present=present,
        counted=~hidden,
        alone=share(present.float(), s.seen, ~hidden),
        colour=torch.where(colour < 0, NONE, share(coloured.float(), s.seen, ~hidden & ~tip(s))),
        shape=torch.where(shape < 0, NONE, share(shaped.float(), s.whole, judged)),
        place=torch.tensor([_placed(s, b, scene) for b, scene in enumerate(scenes)]),
        motion=torch.tensor(right),
        kind=tuple(kind),
    )


def _place_of(names, value: str | None) -> int:
    return list(names).index(value) if value else -1


def _placed(s, b: int, scene) -> float:
    nearest = int(s.place_error[b].argmin())
    right = scene.place is None or list(PLACES)[nearest] == scene.place
    return float(right and s.place_error[b, nearest] < 0.15 and bool(s.pillar[b]) == scene.pillar)


def _kinds(batch: VideoBatch, moved: Motion, speed_B: torch.Tensor) -> list[str]:
    """The best agreeing kind of motion of every clip.

    Hiding counts only where it is asked (else it is the way there).
    """
    s, scenes = observe(batch), asked(batch)
    m_BK = torch.stack(
        [
            agreement(moved, torch.full((len(batch),), pace * FPS / batch.fps))
            for pace in SPEEDS.values()
        ]
    ).amax(0)
    m_BK = m_BK - HANDICAP * torch.tensor([k not in HEADING for k in KINDS])
    arrived = hides(s, torch.full((len(batch),), min(SPEEDS.values()))) > 0.5
    out = []
    for b, scene in enumerate(scenes):
        if scene.motion == "hide" and arrived[b]:
            out.append("hide")
        elif moved.valid[b].sum() < EVIDENCE:
            out.append("unseen" if excused(batch, s, scenes)[b].any() else "unclear")
        elif speed_B[b] < REST:
            out.append("still")
        else:
            best = int(m_BK[b].argmax())
            out.append(KINDS[best] if m_BK[b, best] > CLEAR else "unclear")
    return out


def _paced(scenes: list[Scene], speed_B: torch.Tensor, rate: float) -> list[bool]:
    """Whether each clip's speed is nearer, as a ratio, to the asked one than to any other.

    It is true where none is asked, and for hiding, which ends at rest.

    ``rate``: world frames per frame of the clips.
    """
    out = []
    for scene, speed in zip(scenes, speed_B.tolist()):
        if scene.speed is None or scene.motion in (None, "hide") or not speed > 0:
            out.append(True)
            continue
        off = {
            name: abs(math.log(speed / typical_speed(scene.motion, pace * rate)))
            for name, pace in SPEEDS.items()
        }
        out.append(min(off, key=off.__getitem__) == scene.speed)
    return out


def decay(batch: VideoBatch) -> torch.Tensor:
    """Visual quality of the last fifth of every clip over that of its first, [B]; 1 = none lost.

    NaN where the first fifth's is below 0.05.  Meant for whole videos: VQ asks no prompt."""
    fifth, reward = max(2, batch.length // 5), VisualQuality()
    first, last = (
        reward.score(batch.cut(*at)).scores
        for at in ((0, fifth), (batch.length - fifth, batch.length))
    )
    return torch.where(first < 0.05, NONE, last / first)
