"""The miniature's world: deterministic, described so that it can be understood, and true to its pixels."""

from __future__ import annotations

import itertools

import pytest
import torch

from kvpo.mini.stories import MOTION_PHRASES, PLACE_PHRASES, _SIZE_WORDS, _SPEED_WORDS, describe, describe_change, understand, vocabulary, words, write_story
from kvpo.mini.world import COLOURS, PILLAR, SHAPES, SIZE, Scene, pixel_frames, play, render
from kvpo.common.rng import stream


def test_stories_depend_on_their_name_only():
    torch.manual_seed(1)
    first = write_story(3, "a", 5)
    torch.manual_seed(2)
    torch.rand(7)
    assert write_story(3, "a", 5) == first
    assert torch.equal(write_story(3, "a", 5).render(), first.render())
    assert write_story(3, "a", 6) != first and write_story(4, "a", 5) != first


def test_every_paraphrase_is_understood():
    """All motions, speeds, sizes and places in all their wordings give back the scene they describe."""
    for (motion, phrases), (speed_word, speed), (size_word, size), (place, places) in itertools.product(
        MOTION_PHRASES.items(), _SPEED_WORDS.items(), _SIZE_WORDS.items(), PLACE_PHRASES.items()
    ):
        for phrase, where, pillar in itertools.product(phrases, places, ("", " with a pillar")):
            text = f"a {size_word} purple cross {phrase.format(speed=speed_word)} {where}{pillar}"
            assert understand([text]) == [Scene("cross", "purple", size, place, bool(pillar) or "pillar" in phrase, motion, speed)], text


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
    other = {"colour": ("colour", "blue"), "shape": ("shape", "cross"), "motion": ("motion", "up")}[change]
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
        out.append(float(torch.atan2((mass * angle.sin()).sum(), (mass * angle.cos()).sum()) % (2 * torch.pi)) * SIZE / (2 * torch.pi))
    return out[0], out[1]


@pytest.mark.parametrize("seed", range(20))
def test_pixels_show_the_truth(seed):
    story = write_story(seed, "pixels", memory=False)
    truth, pixels = story.truth(), story.render()
    assert pixels.shape == (pixel_frames(30), 3, SIZE, SIZE) and float(pixels.min()) >= 0 and float(pixels.max()) <= 1
    for t in range(0, len(pixels), 16):
        if float(truth.hidden[t]) > 0:
            continue
        scene = story.scenes[int(truth.scene[t])]
        expected, seen = truth.centre[t] % SIZE, visible_centre(pixels[t])
        assert all(abs((a - float(b) + 32) % 64 - 32) < 1.5 for a, b in zip(seen, expected)), (t, seen, expected)
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
    area = (render([scene], truth).amax(1) - render([scene], truth).amin(1) > 0.4).float().sum((1, 2))
    assert float(area.std() / area.mean()) < 0.05
