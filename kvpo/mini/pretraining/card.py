"""The model card of the miniature: measurements on held-out stories, and its making."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from kvpo.common.files import write_atomic
from kvpo.generators.generate import generate
from kvpo.generators.geometry import pixel_span
from kvpo.generators.pipeline import Pipeline
from kvpo.generators.sampler import SAMPLERS
from kvpo.generators.streaming import latent_scale
from kvpo.mini.habits import OPACITY
from kvpo.mini.rewards.facts import decay, measure
from kvpo.mini.rewards.world import MotionQuality, TextAlignment, VisualQuality
from kvpo.mini.stories import Story, write_story
from kvpo.rewards.base import VideoBatch

HELD_OUT = 7
"""Seed of the stories and noise of a card; training uses other names and never these."""
BATCH = 16
LONG = 49
"""Blocks of the long videos: 147 latent frames."""
STORY = {"blocks": 10, "segments": 3, "memory": False}
"""The short stories: of three prompts, shorter than those of the recipe `mini`."""
REWARDS = {"VQ": VisualQuality(), "MQ": MotionQuality(), "TA": TextAlignment()}
NAMES = {"VQ": "visual quality", "MQ": "motion quality", "TA": "text alignment"}
FACTS = {
    "alone": "one object, and only one",
    "colour": "its colour as asked",
    "shape": "its shape as asked",
    "place": "the place as asked",
    "motion": "it moves as asked, kind and speed (share of segments)",
}


def held_out(number: int, **story) -> list[Story]:
    return [write_story(HELD_OUT, "card", i, **story) for i in range(number)]


def videos(pipeline: Pipeline, stories: Sequence[Story], sampler: str = "renoise") -> torch.Tensor:
    """uint8 [B, T, 3, H, W], one video a story."""
    parts = [stories[i : i + BATCH] for i in range(0, len(stories), BATCH)]
    return torch.cat(
        [
            generate(
                pipeline,
                SAMPLERS[sampler],
                [s.script for s in part],
                HELD_OUT,
                [("card", s.script.id) for s in part],
            )
            for part in parts
        ]
    )


@torch.no_grad()
def decoded_truth(pipeline: Pipeline, story: Story) -> torch.Tensor:
    """A true clip through the encoder and the decoder, uint8 [T, 3, H, W].

    It is the best that any generator can do here.
    """
    vae, pixels = pipeline.vae, story.render()[None]
    z = vae.encode(pixels.transpose(1, 2) * 2 - 1).latent_dist.mode().transpose(1, 2)
    mean, scale = latent_scale(vae, z)
    return pipeline.decoder()((z - mean) / scale)[0].cpu()


def measured(pipeline: Pipeline, number: int, sampler: str = "renoise") -> dict[str, float]:
    """Means over ``number`` held-out stories, each the mean over its prompt segments.

    The last of them also for the first and the later segments, and for true clips after the decoder
    (a quarter as many). "decay": of a quarter as many long videos.
    """
    found: dict[str, list[float]] = defaultdict(list)
    short = held_out(number, **STORY)
    for story, pixels in zip(short, videos(pipeline, short, sampler)):
        per_segment = [facts_of(clip) for clip in segments(story, pixels, pipeline)]
        _add(found, per_segment)
        _add(found, per_segment[:1], "first ")
        _add(found, per_segment[1:], "later ")
    for story in short[: max(1, number // 4)]:
        ceiling = [
            facts_of(clip) for clip in segments(story, decoded_truth(pipeline, story), pipeline)
        ]
        _add(found, ceiling, "ceiling ")
    long = held_out(max(1, number // 8), blocks=LONG, memory=False)
    clips = VideoBatch(
        videos(pipeline, long, sampler),
        float(pipeline.geometry.fps),
        tuple(s.script.texts[0] for s in long),
    )
    found["decay"] = decay(clips).tolist()
    return {name: torch.tensor(values).nanmean().item() for name, values in found.items()}


def _add(
    found: dict[str, list[float]], rows: Sequence[Mapping[str, float]], prefix: str = ""
) -> None:
    """Append the mean over the rows of every number that they have.

    Under a ``prefix`` it appends those of the rewards alone.
    """
    for name in (REWARDS if prefix else rows[0]) if rows else ():
        found[prefix + name].append(torch.tensor([row[name] for row in rows]).nanmean().item())


def segments(story: Story, pixels: torch.Tensor, pipeline: Pipeline) -> list[VideoBatch]:
    """Cut a video [T, 3, H, W] into one clip per prompt segment."""
    out = []
    for i, text in enumerate(story.script.texts):
        first, stop = pixel_span(story.script.span(i), pipeline.geometry)
        out.append(
            VideoBatch(
                pixels[None, first:stop],
                float(pipeline.geometry.fps),
                (text,),
                (story.script.texts[:i],),
            )
        )
    return out


def facts_of(clip: VideoBatch) -> dict[str, float]:
    return measure(clip).means() | {
        name: float(reward.score(clip).scores) for name, reward in REWARDS.items()
    }


def write_card(
    folder: Path,
    numbers: Mapping[str, float],
    number: int,
    settings,
    seed: int,
    seconds: Mapping[str, float],
) -> None:
    rows = "\n".join(f"| {FACTS[name]} | {numbers[name]:.3f} |" for name in FACTS)
    columns = ("", "first ", "later ", "ceiling ")
    rewards = "\n".join(
        f"| {NAMES[r]} ({r}) | " + " | ".join(f"{numbers[c + r]:.3f}" for c in columns) + " |"
        for r in REWARDS
    )
    spent = ", ".join(f"{name} {value / 60:.0f} min" for name, value in seconds.items())
    knobs = "\n".join(f"    {name} = {value}" for name, value in asdict(settings).items())
    text = CARD.format(
        seed=seed,
        rows=rows,
        rewards=rewards,
        decay=numbers["decay"],
        number=number,
        spent=spent,
        knobs=knobs,
        long=3 * LONG,
        opacity=OPACITY,
    )
    write_atomic(folder / "README.md", text)


CARD = """\
# The miniature's start weights

A streaming text-to-video generator of the smallest size that still has everything: Wan's transformer (1.6 M parameters, causal over a
KV cache), Wan's causal autoencoder, a UMT5 text encoder, a four-step sampler.  It draws one coloured object that moves over a plain place,
64x64 pixels, as a script of short prompts asks.

**It was made to leave room for alignment**, as a real distilled generator does.  The videos that it learnt from have habits which no caption
names: in some blocks the object is faded (opacity {opacity}) and stutters, and a new prompt is obeyed at once, a block late or not at all
(`kvpo/mini/habits.py` has the shares).  And nothing taught it the true continuation of its own stream, so it drifts on its own past.
Its openings are good; behind prompt switches the faults of the kind show.  Aligning it means: prefer the good of what it already does.

Made from nothing, without any data but the program's own synthetic world, by

    kvpo pretrain --seed {seed}

in two stages on a CPU ({spent}; the training steps alone) with the settings

{knobs}

Measured on {number} held-out stories of three prompts (mean over prompt segments), four steps of the `renoise` sampler over the KV cache.
"Decoder's ceiling" is what true clips score after the autoencoder: no generator can do better with this decoder.

| mean reward | all | first segments | later segments | decoder's ceiling |
|---|---|---|---|---|
{rewards}

| | |
|---|---|
{rows}
| visual quality of the last fifth of {long} latent frames over that of the first | {decay:.3f} |

Licence: Apache-2.0, like the program.
"""
