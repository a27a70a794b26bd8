"""The model card of the miniature: what its weights do on held-out stories, measured, and how they were made."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import asdict
from pathlib import Path
from typing import Mapping, Sequence

import torch

from kvpo.generators.sampler import SAMPLERS
from kvpo.generators.generate import generate
from kvpo.common.files import write_atomic
from kvpo.generators.pipeline import Pipeline
from kvpo.mini.stories import Story, write_story
from kvpo.rewards.base import VideoBatch
from kvpo.mini.rewards.facts import decay, measure
from kvpo.mini.rewards.world import MotionQuality, TextAlignment, VisualQuality
from kvpo.generators.pipeline import pixel_span

HELD_OUT = 7
"""Seed of the stories and noise of a card; training uses other names and never these."""
BATCH = 16
LONG = 49
"""Blocks of the long videos: 147 latent frames."""
FACTS = {
    "alone": "one object, and only one",
    "colour": "its colour as asked",
    "shape": "its shape as asked",
    "place": "the place as asked",
    "motion": "it moves as asked, kind and speed (share of segments)",
    "VQ": "visual quality (mean reward)",
    "MQ": "motion quality (mean reward)",
    "TA": "text alignment (mean reward)",
    "decay": f"visual quality of the last fifth of {3 * LONG} latent frames over that of the first",
}


def held_out(number: int, blocks: int) -> list[Story]:
    return [write_story(HELD_OUT, "card", blocks, i, blocks=blocks) for i in range(number)]


def videos(pipeline: Pipeline, stories: Sequence[Story], sampler: str = "renoise") -> torch.Tensor:
    """uint8 [B, T, 3, H, W], one video a story."""
    parts = [stories[i : i + BATCH] for i in range(0, len(stories), BATCH)]
    return torch.cat([generate(pipeline, SAMPLERS[sampler], [s.script for s in part], HELD_OUT, [("card", s.script.id) for s in part]) for part in parts])


def measured(pipeline: Pipeline, number: int, sampler: str = "renoise") -> dict[str, float]:
    """Means over the prompt segments of ``number`` held-out stories of 10 blocks, and the decay of a quarter as many long ones."""
    short, found = held_out(number, 10), defaultdict(list)
    for story, pixels in zip(short, videos(pipeline, short, sampler)):
        for clip in segments(story, pixels, pipeline):
            for name, value in facts_of(clip).items():
                found[name].append(value)
    long = held_out(max(1, number // 4), LONG)
    clips = VideoBatch(videos(pipeline, long, sampler), float(pipeline.geometry.fps), tuple(s.script.texts[0] for s in long))
    found["decay"] = decay(clips).tolist()
    return {name: torch.tensor(values).nanmean().item() for name, values in found.items()}


def segments(story: Story, pixels: torch.Tensor, pipeline: Pipeline) -> list[VideoBatch]:
    """One clip per prompt segment of a video [T, 3, H, W]."""
    out = []
    for i, text in enumerate(story.script.texts):
        first, stop = pixel_span(story.script.span(i), pipeline.geometry)
        out.append(VideoBatch(pixels[None, first:stop], float(pipeline.geometry.fps), (text,), (story.script.texts[:i],)))
    return out


def facts_of(clip: VideoBatch) -> dict[str, float]:
    rewards = {reward.spec.name: float(reward.score(clip).scores) for reward in (VisualQuality(), MotionQuality(), TextAlignment())}
    return measure(clip).means() | rewards


def write_card(folder: Path, numbers: Mapping[str, float], number: int, settings, seed: int, seconds: Mapping[str, float]) -> None:
    rows = "\n".join(f"| {FACTS[name]} | {numbers[name]:.3f} |" for name in FACTS)
    spent = ", ".join(f"{name} {value / 60:.0f} min" for name, value in seconds.items())
    knobs = "\n".join(f"    {name} = {value}" for name, value in asdict(settings).items())
    write_atomic(folder / "README.md", CARD.format(seed=seed, rows=rows, number=number, spent=spent, knobs=knobs))


CARD = """\
# The miniature's start weights

A streaming text-to-video generator of the smallest size that still has everything: Wan's transformer (1.6 M parameters, causal over a
KV cache), Wan's causal autoencoder, a UMT5 text encoder, a four-step sampler.  It draws one coloured object that moves over a plain place,
64x64 pixels, as a script of short prompts asks.  It is where KVPO starts, and the numbers below say how far from perfect that is.

Made from nothing, without any data but the program's own synthetic world, by

    kvpo pretrain --seed {seed}

in four stages on a CPU ({spent}; seconds are those of the training steps alone) with the settings

{knobs}

Measured on {number} held-out stories (mean over prompt segments), four steps of the `renoise` sampler over the KV cache:

| | |
|---|---|
{rows}

Licence: Apache-2.0, like the program.
"""
