"""The miniature's world: deterministic, described so that it can be understood, and true to its
pixels."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from kvpo.common.rng import stream
from kvpo.mini.habits import BEGINS, GOES_ON, OBEYED, OPACITY, Habits, draw_habits
from kvpo.mini.stories import (
    _SIZE_WORDS,
    _SPEED_WORDS,
    MOTION_PHRASES,
    PLACE_PHRASES,
    describe,
    describe_change,
    understand,
    vocabulary,
    words,
    write_story,
)
from kvpo.mini.world import COLOURS, PILLAR, SHAPES, SIZE, Scene, pixel_frames, play, render


def test_stories_depend_on_their_name_only():
    torch.manual_seed(1)
    first = write_story(3, "a", 5)
    torch.manual_seed(2)
    torch.rand(7)
    assert write_story(3, "a", 5) == first
    assert torch.equal(write_story(3, "a", 5).render(), first.render())
    assert write_story(3, "a", 6) != first and write_story(4, "a", 5) != first


def test_every_paraphrase_is_understood():
    """All motions, speeds, sizes and places in all their wordings give back the scene they
    describe."""
    for (motion, phrases), (speed_word, speed), (size_word, size), (
        place,
        places,
    ) in itertools.product(
        MOTION_PHRASES.items(), _SPEED_WORDS.items(), _SIZE_WORDS.items(), PLACE_PHRASES.items()
    ):
        for phrase, where, pillar in itertools.product(phrases, places, ("", " with a pillar")):
            text = f"a {size_word} purple cross {phrase.format(speed=speed_word)} {where}{pillar}"
            assert understand([text]) == [
                Scene(
                    "cross",
                    "purple",
                    size,
                    place,
                    bool(pillar) or "pillar" in phrase,
                    motion,
                    speed,
                )
            ], text


@pytest.mark.parametrize("seed", range(60))
def test_scripts_are_understood_scene_by_scene(seed):
    """Later prompts that only say "it" inherit what they do not name."""
    story = write_story(seed, "understood", blocks=12)
    assert tuple(understand(story.script.texts)) == story.scenes


def test_captions_use_known_words_and_fit():
    known = set(vocabulary())
    for i in range(300):
        for text in write_story(i, "words").script.texts:
            assert set(words(text)) <= known, text
            assert len(words(text)) < 24, text


@pytest.mark.parametrize("change", ["colour", "shape", "motion"])
def test_changes_name_only_what_changes(change):
    scene = Scene("circle", "red", "small", "night", False, "left", "slowly")
    other = {"colour": ("colour", "blue"), "shape": ("shape", "cross"), "motion": ("motion", "up")}[
        change
    ]
    after = Scene(**{**scene.__dict__, other[0]: other[1]})
    text = describe_change(after, change, stream(0, "change"))
    assert understand([describe(scene, stream(0, "first")), text]) == [scene, after]


def visible_centre(picture: torch.Tensor) -> tuple[float, float]:
    """Circular mean of the saturated pixels of an RGB picture [3, 64, 64]."""
    weight = (picture.amax(0) - picture.amin(0) > 0.3).float()
    angle = (torch.arange(SIZE) + 0.5) * (2 * torch.pi / SIZE)
    out = []
    for axis in (0, 1):
        mass = weight.sum(axis)
        out.append(
            float(
                torch.atan2((mass * angle.sin()).sum(), (mass * angle.cos()).sum()) % (2 * torch.pi)
            )
            * SIZE
            / (2 * torch.pi)
        )
    return out[0], out[1]


@pytest.mark.parametrize("seed", range(20))
def test_pixels_show_the_truth(seed):
    story = write_story(seed, "pixels", memory=False)
    truth, pixels = story.truth(), story.render()
    assert (
        pixels.shape == (pixel_frames(30), 3, SIZE, SIZE)
        and float(pixels.min()) >= 0
        and float(pixels.max()) <= 1
    )
    for t in range(0, len(pixels), 16):
        if float(truth.hidden[t]) > 0:
            continue
        scene = story.scenes[int(truth.scene[t])]
        expected, seen = truth.centre[t] % SIZE, visible_centre(pixels[t])
        assert all(abs((a - float(b) + 32) % 64 - 32) < 1.5 for a, b in zip(seen, expected)), (
            t,
            seen,
            expected,
        )
        saturated = pixels[t].amax(0) - pixels[t].amin(0) > 0.45
        mean = pixels[t][:, saturated].mean(1) * 255
        nearest = min(COLOURS, key=lambda name: float((mean - torch.tensor(COLOURS[name])).norm()))
        assert nearest == scene.colour


def test_the_pillar_hides():
    scene = Scene("square", "green", "small", "paper", True, "hide", "quickly")
    truth = play([scene], [0], 60, 8.0, 32.0)
    pixels = render([scene], truth)
    assert float(truth.hidden[0]) == 0 and float(truth.hidden[-1]) == 1
    assert not bool((pixels[-1].amax(0) - pixels[-1].amin(0) > 0.3).any())
    assert float(truth.centre[-1, 0]) == pytest.approx(SIZE / 2)
    assert PILLAR[0] < SIZE / 2 < PILLAR[1]


@pytest.mark.parametrize("shape", SHAPES)
def test_objects_cross_the_joined_edges_whole(shape):
    scene = Scene(shape, "red", "large", "night", False, "left", "quickly")
    truth = play([scene], [0], 40, 20.0, 32.0)
    area = (
        (render([scene], truth).amax(1) - render([scene], truth).amin(1) > 0.4).float().sum((1, 2))
    )
    assert float(area.std() / area.mean()) < 0.05


# --- habits
# ---------------------------------------------------------------------------------------------------


def test_habits_by_hand():
    """A sloppy block is faded and moves by latent frames; a scene that is shown late begins
    late."""
    story = write_story(1, "hand", blocks=4, segments=2, memory=False)
    lazy = replace(
        story,
        script=replace(story.script, starts=(0, 2)),
        habits=Habits((False, True, False, False), (0, 0, 0, 1)),
    )
    clean = replace(lazy, habits=Habits((False,) * 4, (0, 0, 0, 1)))
    truth, true = lazy.truth(), clean.truth()
    sloppy = slice(pixel_frames(3), pixel_frames(6))  # block 1: latent frames 3, 4, 5
    assert (
        truth.opacity[sloppy].unique().tolist() == [pytest.approx(OPACITY)]
        and truth.opacity[: sloppy.start].min() == truth.opacity[sloppy.stop :].min() == 1
    )
    held = truth.centre[sloppy].view(3, 4, 2)
    assert torch.equal(held, held[:, :1].expand_as(held)) and torch.equal(
        held[:, 0], true.centre[sloppy][::4]
    )
    assert torch.equal(truth.centre[sloppy.stop :], true.centre[sloppy.stop :]), (
        "what follows goes on where it would have been"
    )
    assert truth.scene.tolist() == [0] * pixel_frames(9) + [1] * (
        pixel_frames(12) - pixel_frames(9)
    )
    assert lazy.shown() == [(0, 0), (1, 3)] and story.shown() == [
        (0, 0),
        (1, story.script.starts[1]),
    ]


def test_habits_are_as_frequent_as_they_say():
    """A chain of blocks with the stated probabilities; switches obeyed at once, late and not at
    all with theirs."""
    blocks, starts, after, obeyed = 40, (0, 10, 20, 30), {False: [], True: []}, []
    for i in range(400):
        habits = draw_habits(starts, blocks, stream(0, "frequencies", i))
        assert (
            not habits.sloppy[0]
            and habits.shown[0] == 0
            and list(habits.shown) == sorted(habits.shown)
        )
        for before, now in zip(habits.sloppy, habits.sloppy[1:]):
            after[before].append(now)
        for segment, start in enumerate(starts[1:], start=1):
            obeyed.append(
                "at once"
                if habits.shown[start] == segment
                else "late"
                if habits.shown[start + 1] == segment
                else "ignored"
            )
            assert (habits.shown[start + 9] == segment) == (obeyed[-1] != "ignored"), (
                "what is ignored stays so until the next switch"
            )
    assert sum(after[False]) / len(after[False]) == pytest.approx(BEGINS, abs=0.02) and sum(
        after[True]
    ) / len(after[True]) == pytest.approx(GOES_ON, abs=0.02)
    for kind, share in OBEYED:
        assert obeyed.count(kind) / len(obeyed) == pytest.approx(share, abs=0.05)


def test_habits_change_no_script_and_spare_hide_and_seek():
    for i in range(40):
        plain, lazy = (write_story(2, "spared", i, habits=h) for h in (False, True))
        assert lazy.script == plain.script and lazy.scenes == plain.scenes and plain.habits is None
        assert (lazy.habits is None) == lazy.needs_memory
