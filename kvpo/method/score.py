"""Stage 3: decode what differs, cut clips, ask the rewards (method.md section 3).

    local    the window's clip, cut where the prompt changes
    global   one clip in every prompt segment, from the fork on

A segment wholly before the fork is equal in all rows: it is neither decoded for each of them nor
scored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kvpo.common.timing import Phases
from kvpo.distributed.ranks import Ranks
from kvpo.generators.geometry import Geometry, pixel_span
from kvpo.generators.pipeline import Pipeline
from kvpo.method.prefix import PrefixDecoders
from kvpo.method.settings import ScoreConfig
from kvpo.rewards.base import Reward, VideoBatch
from kvpo.types import RewardTable, Rollout, Script, Window


@dataclass(frozen=True)
class Clip:
    """A stretch of pixel frames [first, stop) of the video, under one segment's prompt."""

    segment: int
    first: int
    stop: int


def local_clips(
    script: Script, window: Window, geometry: Geometry, config: ScoreConfig
) -> list[Clip]:
    """Cut the window's pixel frames into one clip per prompt in it.

    Where all of them are short, the window is one clip of its last prompt.
    """
    segments = sorted({script.segment(b) for b in range(window.fork, window.stop)})
    clips = []
    for segment in segments:
        first, stop = script.span(segment)
        clips.append(
            Clip(segment, *pixel_span((max(first, window.fork), min(stop, window.stop)), geometry))
        )
    long = [c for c in clips if c.stop - c.first >= config.min_frames]
    return long or [Clip(segments[-1], clips[0].first, clips[-1].stop)]


def global_clips(
    script: Script, window: Window, geometry: Geometry, config: ScoreConfig
) -> list[Clip]:
    """Choose one clip in every segment from the fork on; too short stretches are left out."""
    clips = []
    for segment in range(script.segment(window.fork), len(script.texts)):
        first, stop = script.span(segment)
        first, stop = pixel_span((max(first, window.fork), stop), geometry)
        length = min(config.clip_frames, stop - first)
        if length >= config.min_frames:
            start = first + (stop - first - length) // 2
            clips.append(Clip(segment, start, start + length))
    return clips


def group_clips(
    script: Script, window: Window, geometry: Geometry, config: ScoreConfig
) -> dict[str, list[Clip]]:
    """A group's clips by signal, `local` and `global`.

    The local ones serve for both where no global clip is asked for, or none is long enough.
    """
    local = local_clips(script, window, geometry, config)
    after = global_clips(script, window, geometry, config)
    if config.segments is not None:
        after = [c for c in after if c.segment < script.segment(window.fork) + config.segments]
    return {"local": local, "global": after or local}


def horizon(script: Script, window: Window, geometry: Geometry, config: ScoreConfig) -> int:
    """First block after everything that `score` looks at; it need not be generated."""
    last = _last_frame(group_clips(script, window, geometry, config))
    return next(
        b
        for b in range(window.stop, script.blocks + 1)
        if geometry.pixel_frames(b * geometry.block) >= last
    )


def _last_frame(clips: dict[str, list[Clip]]) -> int:
    return max(c.stop for signal in clips.values() for c in signal)


def decode(
    pipeline: Pipeline,
    rollout: Rollout,
    frames: int,
    together: int = 0,
    lead: int | None = None,
) -> torch.Tensor:
    """Decode all rows from the fork on to uint8 [B, T, 3, H, W] in main memory.

    T is at least ``frames`` pixel frames.

    The prefix's last ``lead`` latent frames (default: the decoder's receptive field) go through the
    decoder once and leave it in the state from which every row continues.
    """
    decoder = (
        rollout.decoder(lead)
        if rollout.decoder
        else PrefixDecoders(pipeline, [rollout.prefix]).take(0, lead)
    )
    # every latent frame gives four pixel frames, a video's first one gives one
    latents = -(-(frames + (3 if rollout.window.fork == 0 else 0)) // 4)
    chunks = rollout.latents[:, :latents].split(together or len(rollout.plans))
    return torch.cat([decoder.fork(len(rows))(rows).cpu() for rows in chunks])


def score(
    pipeline: Pipeline,
    rollout: Rollout,
    rewards: Sequence[Reward],
    config: ScoreConfig,
    phases: Phases,
) -> tuple[RewardTable, torch.Tensor]:
    """Rewards of a group, and its decoded pixels from the fork on, uint8 [B, T, 3, H, W].

    ValueError where no clip is long enough, or a reward returns what it may not.
    """
    geometry, script, window = pipeline.geometry, rollout.script, rollout.window
    clips = group_clips(script, window, geometry, config)
    start = geometry.pixel_frames(window.fork * geometry.block)
    with phases("decode"):
        pixels = decode(
            pipeline,
            rollout,
            max(_last_frame(clips), geometry.pixel_frames(window.stop * geometry.block)) - start,
            config.together,
            config.lead,
        )
    with phases("reward"):
        scores = {
            c: _score_clip(
                pixels[:, c.first - start : c.stop - start],
                script,
                c.segment,
                geometry.fps,
                rewards,
            )
            for c in {*clips["local"], *clips["global"]}
        }
    names = tuple(r.spec.name for r in rewards)
    local, global_ = (
        torch.stack([scores[c] for c in signal]).mean(dim=0) for signal in clips.values()
    )
    valid = (local.isfinite() & global_.isfinite()).all(dim=0)
    return RewardTable(names, local.double(), global_.double(), valid), pixels


def _score_clip(
    frames: torch.Tensor, script: Script, segment: int, fps: float, rewards: Sequence[Reward]
) -> torch.Tensor:
    """r_KB of one clip in all rows; NaN where a reward could not measure."""
    rows = len(frames)
    batch = VideoBatch(
        frames, fps, (script.texts[segment],) * rows, (script.texts[:segment],) * rows
    )
    return torch.stack([r.score(batch).scores for r in rewards])


def pixel_diversity(pixels_BTCHW: torch.Tensor, ranks: Ranks = Ranks()) -> float:
    """Mean squared difference of two rows' pixels in [0, 1].

    It runs over all pairs of rows, the other ``ranks``' rows included.
    """
    x = pixels_BTCHW.flatten(1).float() / 255.0
    B = int(ranks.sum(torch.tensor(len(x))))
    # Sum over pairs |a - b|^2 = B sum |a|^2 - |sum a|^2, and the last sum is 0 once the mean is
    # taken off (which also keeps the digits).
    total = B * ranks.sum((x - ranks.sum(x.sum(dim=0)) / B).square().sum(dtype=torch.float64))
    return float(total / (B * (B - 1) / 2) / x.shape[1])
