"""The calibration suite: degraded copies of good clips, to test training rewards on.

Every training reward's recipe must score them below the good ones.

A degradation is a function (frames [B, T, C, H, W] uint8, generator) -> the same; ``wrong_caption``
changes the prompts instead. Each single reward may be blind to some of them (blind spots are its
nature: text alignment does not mind flicker), the combination may not.

    table = calibrate(rewards, clips, weights)      share of pairs won and mean margin, by degradation
    refuse_frozen(rewards, clips, weights)          what every training begins with

Three ways to look alive without making anything new: for the calibration suite, beside its other
flaws.

Each is (frames [B, T, C, H, W] uint8, generator) -> the same. A still picture under a moving camera
has motion everywhere and none of its own; a loop is good video, shown again.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from kvpo.common.rng import stream
from kvpo.rewards.base import Reward, VideoBatch, check_output

WINDOW = 0.8
"""Share of the picture's sides that a panning camera sees.

It never reaches the edge, so nothing wraps around.
"""
NEAREST = 0.7
"""Share of the picture's sides that a camera sees at the end of a zoom."""


def pan_of_still(frames: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Film the first frame with a camera that moves evenly in a random direction.

    It moves in steps of parts of a pixel.
    """
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


def _filmed(
    stills_BCHW: torch.Tensor, scale_T: torch.Tensor, centre_T2: torch.Tensor
) -> torch.Tensor:
    """Film each still with a moving camera, [B, T, C, H, W].

    Frame t is the window of ``scale`` times its sides about ``centre`` (x, y; the edges are at -1
    and 1).
    """
    view = torch.cat((scale_T[:, None, None] * torch.eye(2), centre_T2[:, :, None]), dim=2)
    points = F.affine_grid(view, [len(scale_T), *stills_BCHW.shape[1:]], align_corners=False)
    films = [
        F.grid_sample(
            still.float().expand(len(scale_T), -1, -1, -1),
            points,
            "bicubic",
            "border",
            align_corners=False,
        )
        for still in stills_BCHW
    ]
    return torch.stack(films).round().clamp(0, 255).to(torch.uint8)


Degrade = Callable[[torch.Tensor, torch.Generator], torch.Tensor]


def _as_uint8(x: torch.Tensor) -> torch.Tensor:
    return x.round().clamp(0, 255).to(torch.uint8)


def frozen(frames: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """The first frame for ever."""
    return frames[:, :1].expand_as(frames).clone()


def stutter(frames: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Every fourth frame, shown four times."""
    return frames[:, torch.arange(frames.shape[1]) // 4 * 4]


def noise(frames: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Independent pixel noise, standard deviation 20 of 255."""
    return _as_uint8(frames + 20.0 * torch.randn(frames.shape, generator=generator))


def shuffle(frames: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """The frames in random order."""
    return frames[:, torch.randperm(frames.shape[1], generator=generator)]


def backwards(frames: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Time reversed: a flaw only if the motion has a direction."""
    return frames.flip(1)


def flicker(frames: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Brightness of every frame times a factor of standard deviation 0.15."""
    factor = 1 + 0.15 * torch.randn(frames.shape[1], generator=generator)
    return _as_uint8(frames * factor[:, None, None, None])


def blur(frames: torch.Tensor, generator: torch.Generator, sigma: float = 2.0) -> torch.Tensor:
    """Gaussian blur of 2 pixels."""
    at = torch.arange(-6, 7.0)
    kernel = (-(at**2) / (2 * sigma**2)).exp()
    kernel = kernel / kernel.sum()
    x = frames.flatten(0, 1).float().flatten(0, 1)[:, None]
    x = F.conv2d(F.pad(x, (6, 6, 6, 6), mode="replicate"), kernel.view(1, 1, 1, -1))
    return _as_uint8(F.conv2d(x, kernel.view(1, 1, -1, 1)).view(frames.shape))


def colour_drift(frames: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Colours turn around the grey axis, up to 70 degrees at the end."""
    angle = torch.linspace(0, math.radians(70), frames.shape[1])
    return _mix(frames, torch.stack([_hue_rotation(float(a)) for a in angle]))


def oversaturation(frames: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Chroma grows to three times at the end: the favourite hack of image rewards."""
    gain = torch.linspace(1, 3, frames.shape[1])[:, None, None]
    grey = torch.full((3, 3), 1 / 3)
    return _mix(frames, grey + gain * (torch.eye(3) - grey))


def darkening(frames: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Fades to a third of its brightness."""
    return _as_uint8(frames * torch.linspace(1, 0.33, frames.shape[1])[:, None, None, None])


def cut(frames: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Displace the picture by 20 to 44 pixels, both ways, from the middle of the clip on.

    The object jumps, the place breaks or stays.
    """
    by = torch.randint(20, 45, (2,), generator=generator).tolist()
    half = frames.shape[1] // 2
    return torch.cat((frames[:, :half], frames[:, half:].roll(by, (-2, -1))), 1)


def vanish(frames: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Fade the object to the grey of its place in the second half."""
    keep = torch.ones(frames.shape[1])
    keep[frames.shape[1] // 2 :] = 0
    grey = torch.full((3, 3), 1 / 3)
    return _mix(frames, grey + keep[:, None, None] * (torch.eye(3) - grey))


def twin(frames: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A second object: the picture laid over itself, displaced by half, where it is colourful."""
    other = frames.roll((24, 32), (-2, -1))
    colourful = (other.amax(2, keepdim=True) - other.amin(2, keepdim=True)) > 60
    return torch.where(colourful, other, frames)


def jitter(frames: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Every frame is displaced by up to 2 pixels."""
    by = torch.randint(-2, 3, (frames.shape[1], 2), generator=generator).tolist()
    return torch.stack([f.roll(d, (-2, -1)) for f, d in zip(frames.unbind(1), by)], 1)


def grey(frames: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """An empty grey picture."""
    return torch.full_like(frames, 128)


def static(frames: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Replace every frame by noise."""
    return torch.randint(0, 256, frames.shape, generator=generator).to(torch.uint8)


DEGRADATIONS: dict[str, Degrade] = {
    f.__name__: f
    for f in (
        frozen,
        pan_of_still,
        zoom_of_still,
        loop,
        stutter,
        noise,
        shuffle,
        backwards,
        flicker,
        blur,
        colour_drift,
        oversaturation,
        darkening,
        cut,
        vanish,
        twin,
        jitter,
        grey,
        static,
    )
}


def wrong_captions(prompts: Sequence[str], generator: torch.Generator) -> tuple[str, ...]:
    """Give every clip the prompt of another one.

    It is a cyclic shift by a random amount, of clips with different prompts. Raises ValueError
    where no shift does it.
    """
    n = len(prompts)
    start = int(torch.randint(1, n, (), generator=generator)) if n > 1 else 0
    for shift in ((start + i - 1) % (n - 1) + 1 for i in range(n - 1)):
        moved = tuple(prompts[(b + shift) % n] for b in range(n))
        if all(a != b for a, b in zip(prompts, moved)):
            return moved
    raise ValueError(
        f"no shift of {n} prompts gives every clip another one; calibrate on clips with more different prompts"
    )


def degrade(batch: VideoBatch, name: str, seed: int) -> VideoBatch:
    """Copy the batch with one flaw: a name of DEGRADATIONS, or ``wrong_caption``.

    The latter also drops the history.
    """
    if name == "wrong_caption":
        (wrong,) = miscaptioned([batch], seed)
        return wrong
    return replace(batch, frames=DEGRADATIONS[name](batch.frames, stream(seed, "degrade", name)))


def miscaptioned(batches: Sequence[VideoBatch], seed: int) -> list[VideoBatch]:
    """Copy the batches so that every clip has the prompt of another clip, and no history.

    The other clip may be in any of the batches.
    """
    moved = iter(
        wrong_captions(
            [prompt for batch in batches for prompt in batch.prompts],
            stream(seed, "degrade", "wrong_caption"),
        )
    )
    return [
        replace(batch, prompts=tuple(itertools.islice(moved, len(batch))), history=())
        for batch in batches
    ]


@dataclass(frozen=True)
class Verdict:
    """Result of the good clips against one degradation under one score."""

    won: float
    """Share of clips scored above their own degraded copy.

    Ties and invalid scores count as lost.
    """
    margin: float
    """Mean of good minus degraded over the pairs that have both scores.

    In reward units for a reward; for ``all`` in standard deviations.
    """


FLAWS = (*DEGRADATIONS, "wrong_caption")
"""Names of all flaws."""


def calibrate(
    rewards: Sequence[Reward],
    batches: Sequence[VideoBatch],
    weights: Mapping[str, float],
    seed: int = 0,
    flaws: Sequence[str] = FLAWS,
) -> dict[str, dict[str, Verdict]]:
    """Compare good clips with degraded ones: flaw -> score name, or ``all`` -> verdict.

    Each batch has clips of one length. ``all`` is what training would see: rewards over their
    spread, here that of the good and the spoilt clips, times their weights, summed. Raises
    ValueError where no clip can be given a wrong caption.
    """
    good = _scores(rewards, batches)
    table = {}
    for flaw in flaws:
        bad = _scores(
            rewards,
            miscaptioned(batches, seed)
            if flaw == "wrong_caption"
            else [degrade(batch, flaw, seed + i) for i, batch in enumerate(batches)],
        )
        gaps = {name: good[name] - bad[name] for name in good}
        spread = {name: torch.cat((good[name], bad[name])) for name in good}
        gaps["all"] = sum(
            weights[name] * gap / max(_std(spread[name]), SPREAD_FLOOR)
            for name, gap in gaps.items()
        ) / sum(weights[name] for name in good)
        table[flaw] = {
            name: Verdict((gap > 0).float().mean().item(), gap.nanmean().item())
            for name, gap in gaps.items()
        }
    return table


def refuse_frozen(
    rewards: Sequence[Reward], batches: Sequence[VideoBatch], weights: Mapping[str, float]
) -> None:
    """Check that no still picture wins.

    Raises ValueError where one does: it is the first thing that training on such rewards would
    find.
    """
    if not batches:
        return
    won = calibrate(rewards, batches, weights, flaws=("frozen",))["frozen"]["all"].won
    if won < MUST_WIN:
        count = sum(map(len, batches))
        raise ValueError(
            f"these rewards can be won by a frozen picture: only {won:.0%} of {count} good clips score above their own first frame held still ({MUST_WIN:.0%} are asked for); "
            f"weights {dict(weights)}. Add a reward for motion, or give it more weight; `kvpo rewards calibrate` shows every flaw"
        )


MUST_WIN = 0.9
"""Share of good clips that the combination must score above their frozen copy.

Some clips hardly move.
"""
MAY_PASS = ("backwards",)
"""Flaws that are none in many good clips: what swings or stands looks the same backwards."""
SPREAD_FLOOR = 1e-6
"""Reward units; below it a reward says nothing."""


def _scores(rewards: Sequence[Reward], batches: Sequence[VideoBatch]) -> dict[str, torch.Tensor]:
    """Name -> scores of all clips."""
    return {
        r.spec.name: torch.cat(
            [check_output(r.spec, batch, r.score(batch)).scores for batch in batches]
        )
        for r in rewards
    }


def _std(scores: torch.Tensor) -> float:
    finite = scores[scores.isfinite()]
    return finite.std().item() if len(finite) > 1 else 0.0


def _mix(frames: torch.Tensor, matrix_TCC: torch.Tensor) -> torch.Tensor:
    """A colour matrix per frame."""
    return _as_uint8(torch.einsum("tdc,btchw->btdhw", matrix_TCC, frames.float()))


def _hue_rotation(angle: float) -> torch.Tensor:
    """Rotation about the grey axis by ``angle`` radians, [3, 3] (Rodrigues)."""
    c, s = math.cos(angle), math.sin(angle) / math.sqrt(3.0)
    cross = torch.tensor([[0.0, -1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 1.0, 0.0]])
    return c * torch.eye(3) + s * cross + (1 - c) / 3
