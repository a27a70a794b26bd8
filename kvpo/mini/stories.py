"""Stories of the world and their captions.

A grammar with paraphrases writes them, and a parser reads them back.

Rewards ask the parser what a prompt wants, so they need no hidden truth: a prompt file written by
hand is understood just as well. A later prompt that only says "it" inherits everything it does not
name.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from kvpo.common.rng import stream
from kvpo.mini.habits import Habits, changes, draw_habits, stuttered
from kvpo.mini.world import (
    COLOURS,
    HEADING,
    PLACES,
    SHAPES,
    SIZES,
    SPEEDS,
    Scene,
    Truth,
    pixel_frames,
    play,
    render,
)
from kvpo.types import Script

PLACE_PHRASES = {
    "night": ("over a dark night", "in the night", "against a night sky"),
    "paper": ("over white paper", "on paper", "against pale paper"),
    "stripes": ("over grey stripes", "on stripes", "before striped walls"),
}
MOTION_PHRASES = {
    "left": ("moves {speed} to the left", "drifts left {speed}", "slides {speed} left"),
    "right": ("moves {speed} to the right", "drifts right {speed}", "slides {speed} right"),
    "up": ("rises {speed}", "moves {speed} up", "floats up {speed}"),
    "down": ("sinks {speed}", "moves {speed} down", "falls down {speed}"),
    "circle": ("circles {speed}", "goes round in circles {speed}", "circles round {speed}"),
    "bounce": ("bounces {speed}", "hops {speed}", "bounces {speed} in place"),
    "hide": (
        "hides {speed} behind the pillar",
        "goes {speed} behind the pillar and hides",
        "hides behind the pillar {speed}",
    ),
}
_SPEED_WORDS = {"slowly": "slowly", "gently": "slowly", "quickly": "quickly", "fast": "quickly"}
_MOTION_WORDS = {
    "left": "left",
    "right": "right",
    "up": "up",
    "rises": "up",
    "down": "down",
    "sinks": "down",
    "falls": "down",
    "circles": "circle",
    "round": "circle",
    "bounces": "bounce",
    "hops": "bounce",
    "hides": "hide",
}
_SIZE_WORDS = {"small": "small", "little": "small", "large": "large", "big": "large"}
_PLACE_WORDS = {
    "night": "night",
    "dark": "night",
    "paper": "paper",
    "stripes": "stripes",
    "striped": "stripes",
}
_COLOUR_WORDS = {c: c for c in COLOURS}
_SHAPE_WORDS = {s: s for s in SHAPES}
_FILLER = [
    "a",
    "the",
    "one",
    "there",
    "is",
    "it",
    "now",
    "then",
    "to",
    "in",
    "on",
    "over",
    "against",
    "and",
    "goes",
    "moves",
    "drifts",
    "slides",
    "floats",
    "turns",
    "becomes",
    "keeps",
    "as",
    "before",
    "place",
    "white",
    "pale",
    "grey",
    "sky",
    "with",
    "behind",
    "pillar",
    "walls",
]


def vocabulary() -> list[str]:
    """Every word of the grammar, in a fixed order: the tokenizer's."""
    tables = (_SPEED_WORDS, _MOTION_WORDS, _SIZE_WORDS, _PLACE_WORDS, _COLOUR_WORDS, _SHAPE_WORDS)
    return sorted({*_FILLER, *(word for table in tables for word in table)})


def words(text: str) -> list[str]:
    return re.findall(r"[a-z]+", text.lower())


def _named(found: list[str], table: dict[str, str]) -> str | None:
    hits = [table[w] for w in found if w in table]
    return hits[-1] if hits else None


def understand(texts: Sequence[str]) -> list[Scene]:
    """Parse the scene that each prompt of a script asks for.

    Whatever a later prompt does not name is inherited from the one before.
    """
    scenes: list[Scene] = []
    before = Scene(None, None, None, None, False, None, None)
    for text in texts:
        found = words(text)
        motion = "hide" if "hides" in found else _named(found, _MOTION_WORDS)
        named = dict(
            shape=_named(found, _SHAPE_WORDS),
            colour=_named(found, _COLOUR_WORDS),
            size=_named(found, _SIZE_WORDS),
            place=_named(found, _PLACE_WORDS),
            motion=motion,
            speed=_named(found, _SPEED_WORDS),
        )
        before = replace(
            before,
            pillar=before.pillar or "pillar" in found,
            **{k: v for k, v in named.items() if v},
        )
        scenes.append(before)
    return scenes


def pick(options, generator: torch.Generator):
    options = list(options)
    return options[int(torch.randint(len(options), (), generator=generator))]


def chance(p: float, generator: torch.Generator) -> bool:
    return float(torch.rand((), generator=generator)) < p


def describe(scene: Scene, generator: torch.Generator) -> str:
    """A full caption of a scene, one of its paraphrases."""
    assert scene.motion and scene.place, "a story's scene is known in full"
    size = pick([w for w, s in _SIZE_WORDS.items() if s == scene.size], generator)
    motion = pick(MOTION_PHRASES[scene.motion], generator).format(
        speed=pick([w for w, s in _SPEED_WORDS.items() if s == scene.speed], generator)
    )
    place = pick(PLACE_PHRASES[scene.place], generator)
    pillar = " with a pillar" if scene.pillar else ""
    return f"a {size} {scene.colour} {scene.shape} {motion} {place}{pillar}"


def describe_change(scene: Scene, change: str, generator: torch.Generator) -> str:
    """A caption that names only what changes and calls the object "it"."""
    if change == "colour":
        return pick(("now it turns {}", "it becomes {}", "then it turns {}"), generator).format(
            scene.colour
        )
    if change == "shape":
        return pick(
            ("now it turns to a {}", "it becomes a {}", "then it becomes a {}"), generator
        ).format(scene.shape)
    assert scene.motion, "a story's scene is known in full"
    motion = pick(MOTION_PHRASES[scene.motion], generator).format(
        speed=pick([w for w, s in _SPEED_WORDS.items() if s == scene.speed], generator)
    )
    return pick(("now it {}", "it {}", "then it {}"), generator).format(motion)


@dataclass(frozen=True)
class Story:
    """A script with its truth."""

    script: Script
    scenes: tuple[Scene, ...]
    x: float
    y: float
    needs_memory: bool
    """True: something in it can be known only from frames that the window no longer holds."""
    habits: Habits | None = None
    """Habits of its video; None: it does what its prompts ask."""

    def shown(self) -> list[tuple[int, int]]:
        """(segment, first block) of every scene that the video really shows, in order."""
        return changes(self.habits.shown) if self.habits else list(enumerate(self.script.starts))

    def truth(self, block: int = 3) -> Truth:
        """Pixel-exact truth; a scene's first pixel frame is the first of its first latent frame.

        ``scene`` counts the scenes that are `shown`.
        """
        shown = self.shown()
        starts = [0 if b == 0 else pixel_frames(b * block) for _, b in shown]
        truth = play(
            [self.scenes[s] for s, _ in shown],
            starts,
            pixel_frames(self.script.blocks * block),
            self.x,
            self.y,
        )
        return stuttered(truth, self.habits.sloppy, block) if self.habits else truth

    def render(self, block: int = 3) -> torch.Tensor:
        """RGB [T, 3, 64, 64] in [0, 1]."""
        return self.show(self.truth(block))

    def show(self, truth: Truth, first: int = 0, stop: int | None = None) -> torch.Tensor:
        """Pixel frames [first, stop) of its ``truth``, RGB [T, 3, 64, 64] in [0, 1]."""
        return render([self.scenes[s] for s, _ in self.shown()], truth, first, stop)


def first_scene(generator: torch.Generator, pillar: bool) -> Scene:
    motions = (
        ("left", "right", "up", "down")
        if pillar
        else ("left", "right", "up", "down", "circle", "bounce")
    )
    return Scene(
        pick(SHAPES, generator),
        pick(COLOURS, generator),
        pick(SIZES, generator),
        pick(PLACES, generator),
        pillar,
        pick(motions, generator),
        pick(SPEEDS, generator),
    )


def next_scene(scene: Scene, change: str, generator: torch.Generator) -> Scene:
    if change == "colour":
        return replace(scene, colour=pick([c for c in COLOURS if c != scene.colour], generator))
    if change == "shape":
        return replace(scene, shape=pick([s for s in SHAPES if s != scene.shape], generator))
    choices = (*HEADING, "circle", "bounce") + (("hide", "hide", "hide") if scene.pillar else ())
    return replace(
        scene,
        motion=pick([m for m in choices if m != scene.motion], generator),
        speed=pick(SPEEDS, generator),
    )


def memory_scenes(generator: torch.Generator, segments: int) -> tuple[list[Scene], list[str]]:
    """Hide and seek: a repaint or reshape that the sink has not seen, a hiding, a coming out."""
    scenes, changes = [first_scene(generator, True)], []
    if segments >= 4:
        changes.append(pick(("colour", "shape"), generator))
        scenes.append(next_scene(scenes[-1], changes[-1], generator))
    scenes.append(replace(scenes[-1], motion="hide", speed="quickly"))
    scenes.append(
        replace(
            scenes[-1], motion=pick(("left", "right"), generator), speed=pick(SPEEDS, generator)
        )
    )
    return scenes, [*changes, "motion", "motion"]


def write_story(
    seed: int,
    *name: int | str,
    blocks: int = 10,
    segments: int | None = None,
    memory: bool | None = None,
    habits: bool = False,
) -> Story:
    """Write a story from the stream (seed, *name).

    ``segments`` 1 to 4 (default: drawn), ``memory``: hide and seek or not (default: 1 in 4),
    ``habits``: its video has them. The script does not depend on them, and hide and seek has none:
    what is to be remembered must be there.
    """
    g = stream(seed, "story", *name)
    segments = int(torch.randint(1, 5, (), generator=g)) if segments is None else segments
    memory = chance(0.25, g) if memory is None else memory
    if not 1 <= segments <= 4 or segments > blocks:
        raise ValueError(
            f"a story has 1 to 4 segments and at least a block each, not {segments} segments in {blocks} blocks; ask for fewer segments or more blocks"
        )
    if memory:
        scenes, changes = memory_scenes(g, max(3, segments))
    else:
        scenes, changes = [first_scene(g, chance(0.25, g))], []
        for _ in range(segments - 1):
            changes.append(pick(("motion", "motion", "colour", "shape"), g))
            scenes.append(next_scene(scenes[-1], changes[-1], g))
    n = len(scenes)
    starts = [0, *(_switches(n, blocks, g))]
    short = [memory or chance(0.5, g) for _ in range(n)]
    texts = [describe(scenes[0], g)]
    for scene, change, brief in zip(scenes[1:], changes, short[1:]):
        texts.append(describe_change(scene, change, g) if brief else "now " + describe(scene, g))
    x, y = start_place(scenes[0], g)
    script = Script("/".join(str(p) for p in name) or "story", tuple(texts), tuple(starts), blocks)
    drawn = (
        draw_habits(starts, blocks, stream(seed, "habits", *name))
        if habits and not memory
        else None
    )
    return Story(script, tuple(scenes), x, y, memory, drawn)


def start_place(scene: Scene, generator: torch.Generator) -> tuple[float, float]:
    """Centre in frame 0: well inside the picture, and beside the pillar rather than behind it."""
    x, y = (float(v) for v in torch.rand(2, generator=generator))
    if scene.pillar:
        return (4 + 8 * 2 * x if x < 0.5 else 52 + 8 * (2 * x - 1)), 14 + 36 * y
    return 14 + 36 * x, 14 + 36 * y


def _switches(segments: int, blocks: int, generator: torch.Generator) -> list[int]:
    """Start blocks of the segments after the first: as even as a jitter of one block allows."""
    even = [round(blocks * i / segments) for i in range(1, segments)]
    if blocks < 3 * segments:
        return even
    return [s + int(torch.randint(-1, 2, (), generator=generator)) for s in even]
