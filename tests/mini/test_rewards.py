"""The rewards measure what they say: hand-worked scenes, the calibration suite, bad input."""

import math
from dataclasses import replace

import pytest
import torch

from kvpo.mini.habits import Habits
from kvpo.mini.rewards.asked import blend, soft
from kvpo.mini.rewards.facts import decay, measure
from kvpo.mini.rewards.motion import LAG, agreement, motion, typical_bend, typical_speed, wrap
from kvpo.mini.rewards.track import observe
from kvpo.mini.rewards.world import MotionQuality, TextAlignment, VisualQuality
from kvpo.mini.source import story_clips
from kvpo.mini.stories import write_story
from kvpo.mini.world import SIZE, Scene, pixel_frames, play, render
from kvpo.rewards.base import RewardOutput, RewardSpec, VideoBatch, check_output, to_uint8
from kvpo.rewards.calibration import DEGRADATIONS, calibrate, degrade

REWARDS = (VisualQuality(), MotionQuality(), TextAlignment())
EQUAL = {"VQ": 1.0, "MQ": 1.0, "TA": 1.0}
T = 36
RED = Scene("circle", "red", "small", "paper", False, "left", "slowly")
PROMPT = "a small red circle moves slowly to the left over white paper"


def film(scene: Scene, frames: int = T, x: float = 40.0, y: float = 30.0) -> torch.Tensor:
    return to_uint8(render([scene], play([scene], [0], frames, x, y)))


def batch_of(
    *clips: torch.Tensor, prompt: str = PROMPT, history: tuple[str, ...] = (), fps: float = 16.0
) -> VideoBatch:
    return VideoBatch(torch.stack(clips), fps, (prompt,) * len(clips), (history,) * len(clips))


def scores(batch: VideoBatch) -> dict[str, float]:
    return {name: value.mean().item() for name, value in combine(batch, EQUAL).items()}


def combine(batch: VideoBatch, weights: dict[str, float]) -> dict[str, torch.Tensor]:
    """Every reward's scores [B] by name, and ``all``: their weighted mean."""
    scores = {r.spec.name: check_output(r.spec, batch, r.score(batch)).scores for r in REWARDS}
    return scores | {
        "all": sum(weights[name] * score for name, score in scores.items()) / sum(weights.values())
    }


@pytest.fixture(scope="module")
def open_clips():
    return story_clips(16, pillar=False)


@pytest.fixture(scope="module")
def pillar_clips():
    return story_clips(16, pillar=True)


def test_true_clips_score_near_one(open_clips, pillar_clips):
    for batch in (*open_clips, *pillar_clips):
        for reward in REWARDS:
            output = check_output(reward.spec, batch, reward.score(batch))
            assert (
                output.valid.all() and output.scores.min() > 0.8 and output.scores.mean() > 0.96
            ), (reward.spec.name, output)


def test_calibration_every_flaw_costs(open_clips):
    """True clips beat every degraded copy on the combination: all pairs in the open, but for
    time's arrow."""
    table = calibrate(REWARDS, open_clips, EQUAL)
    for name, row in table.items():
        symmetric = name == "backwards"  # a bounce or a hidden rest looks the same backwards
        assert row["all"].won >= (0.7 if symmetric else 0.95), (name, row)
        assert row["all"].margin > 0.08, (name, row)


def test_calibration_behind_the_pillar(pillar_clips):
    """A clip that is hidden throughout equals its frozen or shuffled self; the others must win."""
    table = calibrate(REWARDS, pillar_clips, EQUAL)
    for name, row in table.items():
        assert row["all"].won >= 0.8, (name, row)
        assert row["all"].margin > 0.06, (name, row)


@pytest.mark.parametrize(
    "weights", [(1, 1, 1), (2, 1, 1), (5, 1, 0), (0, 1, 3), (0, 1, 0), (8, 1, 8)]
)
def test_a_frozen_clip_cannot_win(open_clips, weights):
    """Whatever the weights, as long as motion counts at all: the best frozen clip stays below
    the worst true one at equal weights."""
    weights = dict(zip(EQUAL, map(float, weights)))
    for batch in open_clips:
        good = combine(batch, weights)["all"]
        still = combine(degrade(batch, "frozen", 0), weights)["all"]
        assert (good > still).all()
        if weights["VQ"] == weights["MQ"] == 1:
            assert good.min() > still.max()


def test_a_frozen_clip_has_no_motion_quality(open_clips):
    for batch in open_clips:
        assert MotionQuality().score(degrade(batch, "frozen", 0)).scores.max() < 0.01


@pytest.mark.parametrize("name", sorted(DEGRADATIONS))
def test_bounded_and_finite_on_anything(pillar_clips, name):
    for reward in REWARDS:
        output = check_output(
            reward.spec, pillar_clips[0], reward.score(degrade(pillar_clips[0], name, 3))
        )
        assert output.valid.all()


# ---- hand-worked cases


def test_soft_and_blend():
    assert soft(torch.tensor([0.0, 0.05, 0.25]), 0.05, 0.1).tolist() == pytest.approx(
        [1, 1, math.exp(-2)]
    )
    parts = {"a": torch.tensor([0.25, 0.0, float("nan")]), "b": torch.tensor([1.0, 1.0, 0.5])}
    # sqrt(.25), sqrt(.01), b alone
    assert blend(parts, {"a": 1.0, "b": 1.0}).tolist() == pytest.approx([0.5, 0.1, 0.5])


def test_centre_and_area_to_a_tenth_of_a_pixel():
    seen = observe(batch_of(film(RED, x=3.0)))  # crosses the joined edge
    truth = play([RED], [0], T, 3.0, 30.0).centre.float()
    assert wrap(seen.centre[0] - truth).abs().max() < 0.1
    assert seen.area[0].mean().item() == pytest.approx(math.pi * (0.95 * 7) ** 2, rel=0.03)
    assert seen.whole.all() and not seen.hidden.any() and not seen.pillar.any()


@pytest.mark.parametrize("kind", ["left", "up", "circle", "bounce"])
@pytest.mark.parametrize("speed", ["slowly", "quickly"])
def test_motion_agrees_with_itself_and_has_its_typical_speed(kind, speed):
    scene = replace(RED, motion=kind, speed=speed)
    moved = motion(observe(batch_of(film(scene, 120))))
    m = agreement(moved, torch.tensor([scene.pace]))[0]
    assert (
        m.argmax().item() == {"left": 0, "up": 2, "circle": 4, "bounce": 5}[kind] and m.max() > 0.98
    )
    assert moved.smooth.norm(dim=-1).mean().item() == pytest.approx(
        typical_speed(kind, scene.pace), rel=0.06
    )
    assert moved.step.diff(dim=1).norm(dim=-1).mean().item() == pytest.approx(
        typical_bend(kind, scene.pace), abs=0.08
    )
    assert moved.smooth.shape[1] == 120 - LAG


def test_speed_is_graded_and_two_sided():
    """Half the asked speed earns (1/2 / .92)^1.5, rest nothing; text alignment does not mind."""
    slow, fast = film(RED), film(replace(RED, speed="quickly"))
    quick = PROMPT.replace("slowly", "quickly")

    def mq(clip, prompt):
        return MotionQuality().score(batch_of(clip, prompt=prompt)).scores.item()

    assert mq(slow, PROMPT) > 0.97 and mq(fast, quick) > 0.97
    assert mq(slow, quick) == pytest.approx((0.5 / 0.92) ** 1.5, abs=0.03)
    assert mq(fast, PROMPT) == pytest.approx((1.08 / 2) ** 1.5, abs=0.03)
    assert TextAlignment().score(batch_of(slow, prompt=quick)).scores.item() > 0.97


def test_the_true_frame_rate_counts():
    """The same motion filmed at 8 frames a second moves twice as far in a frame."""
    quick = film(replace(RED, speed="quickly"))
    assert MotionQuality().score(batch_of(quick, fps=8.0)).scores.item() > 0.97


@pytest.mark.parametrize(
    "prompt, part",
    [
        (PROMPT.replace("red", "blue"), "colour"),
        (PROMPT.replace("circle", "cross"), "shape"),
        (PROMPT.replace("small", "large"), "size"),
        (PROMPT.replace("over white paper", "in the night"), "place"),
        (PROMPT + " with a pillar", "place"),
        (PROMPT.replace("left", "right"), "motion"),
        ("a small red circle bounces slowly over white paper", "motion"),
        ("a small red circle circles slowly over white paper", "motion"),
    ],
)
def test_one_wrong_word_costs_its_own_part_only(prompt, part):
    clip = film(RED)
    parts = {
        k: v.item() for k, v in TextAlignment().score(batch_of(clip, prompt=prompt)).parts.items()
    }
    wrong = parts.pop(part)
    assert wrong < 0.4 and min(parts.values()) > 0.9, (part, wrong, parts)


def test_history_tells_what_it_is():
    """ "it turns blue" inherits shape, size, place and motion; without history it asks for a
    colour only."""
    clip = film(replace(RED, colour="blue"))
    with_history = TextAlignment().score(
        batch_of(clip, prompt="now it turns blue", history=(PROMPT,))
    )
    assert with_history.scores.item() > 0.97 and all(
        v.isfinite().all() for v in with_history.parts.values()
    )
    assert (
        TextAlignment()
        .score(
            batch_of(clip, prompt="now it turns blue", history=(PROMPT.replace("circle", "cross"),))
        )
        .parts["shape"]
        .item()
        < 0.2
    )
    alone = TextAlignment().score(batch_of(clip, prompt="now it turns blue")).parts
    assert alone["shape"].isnan().all() and alone["colour"].item() > 0.95


HIDE = Scene("square", "cyan", "small", "night", True, "hide", "quickly")
HIDE_PROMPTS = (
    "a small cyan square moves slowly up in the night with a pillar",
    "it hides quickly behind the pillar",
)


def test_hiding_is_not_vanishing():
    """Behind the pillar nothing is missing; the same frames in the open are missing."""
    clip = film(HIDE, 48, x=4.0)
    batch = batch_of(clip, prompt=HIDE_PROMPTS[1], history=HIDE_PROMPTS[:1])
    assert min(scores(batch).values()) > 0.85
    facts = measure(batch)
    assert facts.kind == ("hide",) and facts.alone.item() == 1 and (~facts.counted).sum() > 10
    stays = film(replace(HIDE, motion="up", speed="slowly"), 48, x=6.0)
    assert (
        TextAlignment()
        .score(batch_of(stays, prompt=HIDE_PROMPTS[1], history=HIDE_PROMPTS[:1]))
        .parts["motion"]
        .item()
        < 0.3
    )
    empty = film(replace(HIDE, pillar=False), 48, x=4.0)
    empty[24:] = film(replace(HIDE, pillar=False), 1, x=4.0)[0, :, :1, :1]  # nothing but night
    lost = batch_of(empty, prompt="a small cyan square moves quickly to the right in the night")
    assert (
        measure(lost).alone.item() == pytest.approx(0.5, abs=0.05)
        and MotionQuality().score(lost).scores.item() < 0.6
    )


def test_what_passes_behind_the_pillar_must_come_out():
    """To the right for ever hidden is not to the right; hidden throughout is fine only if the
    story has hidden it."""
    through = replace(HIDE, motion="right", speed="slowly")
    truth = play([through], [0], 96, 4.0, 30.0)
    clip = to_uint8(render([through], truth))
    prompt = "a small cyan square moves slowly to the right in the night with a pillar"
    assert min(scores(batch_of(clip, prompt=prompt)).values()) > 0.9
    gone = torch.cat((clip[:35], clip[35:36].expand(61, -1, -1, -1)))  # frozen while hidden
    assert (
        truth.hidden[35] == 1
        and MotionQuality().score(batch_of(gone, prompt=prompt)).scores.item() < 0.5
    )
    nothing = clip[35:36].expand(T, -1, -1, -1)
    rests = batch_of(nothing, prompt="it bounces slowly", history=HIDE_PROMPTS)
    assert measure(rests).kind == ("unseen",) and min(scores(rests).values()) > 0.9
    assert (
        scores(batch_of(nothing, prompt="a cyan square bounces slowly in the night with a pillar"))[
            "MQ"
        ]
        == 0
    )


def test_two_objects_are_worse_than_one():
    one = film(RED)
    two = torch.where(
        film(replace(RED, colour="blue"), x=8.0, y=10.0) < 100,
        film(replace(RED, colour="blue"), x=8.0, y=10.0),
        one,
    )
    assert (
        VisualQuality().score(batch_of(two)).parts["one"].item()
        < 0.1
        < 0.95
        < VisualQuality().score(batch_of(one)).parts["one"].item()
    )
    assert measure(batch_of(two)).alone.item() == 0 and measure(batch_of(one)).alone.item() == 1


def test_grey_clip_is_bad_not_unmeasurable():
    assert (
        max(scores(batch_of(torch.full((T, 3, SIZE, SIZE), 128, dtype=torch.uint8))).values()) < 0.1
    )


def test_scores_do_not_depend_on_company(open_clips):
    batch = open_clips[0]
    alone = VideoBatch(batch.frames[2:3], batch.fps, batch.prompts[2:3], batch.history[2:3])
    for reward in REWARDS:
        assert torch.allclose(
            reward.score(alone).scores, reward.score(batch).scores[2:3], atol=1e-6
        )


# ---- facts for evaluation


def test_facts_of_true_clips(open_clips, pillar_clips):
    for batch in (*open_clips, *pillar_clips):
        means = measure(batch).means()
        assert (
            means["alone"] > 0.99
            and means["colour"] > 0.98
            and means["shape"] > 0.98
            and means["place"] == 1
            and means["motion"] >= 0.85
        ), means


def test_facts_see_what_is_wrong():
    clip = film(RED)
    wrong = measure(batch_of(clip, prompt="a large blue cross moves quickly up in the night"))
    hurried = measure(batch_of(film(RED), prompt=PROMPT.replace("slowly", "quickly")))
    assert (
        PROMPT.count("slowly") == 1 and hurried.kind == ("left",) and hurried.means()["motion"] == 0
    )
    assert wrong.means() == {
        "alone": 1,
        "colour": 0,
        "shape": 0,
        "place": 0,
        "motion": 0,
    } and wrong.kind == ("left",)
    assert measure(degrade(batch_of(clip), "frozen", 0)).kind == ("still",)


def test_decay_of_a_long_video():
    long = batch_of(film(RED, 300))
    assert decay(long).item() == pytest.approx(1, abs=0.02)
    assert decay(degrade(long, "darkening", 0)).item() < 0.5


# ---- bad input

GOOD = torch.zeros(2, T, 3, SIZE, SIZE, dtype=torch.uint8)


@pytest.mark.parametrize(
    "frames, message",
    [
        (GOOD.float() / 255, "uint8"),
        (GOOD.transpose(1, 2), r"\[B, T, C=3, H, W\]"),
        (GOOD[0], r"\[B, T, C=3, H, W\]"),
        (GOOD[:0], "at least one clip"),
        (GOOD[:, :0], "at least one clip and one frame"),
    ],
)
def test_frames_of_another_kind_are_refused(frames, message):
    with pytest.raises(ValueError, match=message):
        VideoBatch(frames, 16.0, ("x",) * len(frames))


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(prompts=("x",)), "1 prompts for 2 clips"),
        (dict(prompts="ab"), "tuple with one string per clip"),
        (dict(history=((),)), "1 history for 2 clips"),
        (dict(fps=0.0), "fps = 0.0"),
    ],
)
def test_wrong_lengths_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        VideoBatch(**dict(frames=GOOD, fps=16.0, prompts=("x", "y")) | change)


def test_too_short_is_invalid_not_zero():
    one = batch_of(film(RED, 1))
    for reward in REWARDS:
        output = check_output(reward.spec, one, reward.score(one))
        assert (
            not output.valid.any() and output.scores.isnan().all() and "1" in output.info["invalid"]
        )


def test_another_picture_size_is_refused():
    with pytest.raises(ValueError, match=r"\[32, 64\].*64x64"):
        VisualQuality().score(VideoBatch(GOOD[..., :32, :], 16.0, ("x", "y")))


@pytest.mark.parametrize(
    "scores, valid, message",
    [
        (torch.tensor([0.5, float("nan")]), torch.ones(2, dtype=torch.bool), "clip 1 = nan"),
        (torch.tensor([0.5, 1.5]), torch.ones(2, dtype=torch.bool), "clip 1 = 1.5"),
        (
            torch.tensor([0.5]),
            torch.ones(2, dtype=torch.bool),
            r"scores torch.float32 \[1\] for 2 clips",
        ),
        (torch.zeros(2, dtype=torch.float64), torch.ones(2, dtype=torch.bool), "float64"),
        (torch.zeros(2), torch.ones(2), "valid torch.float32"),
    ],
)
def test_check_output_refuses(scores, valid, message):
    spec = RewardSpec("test", "none")
    with pytest.raises(ValueError, match=message):
        check_output(spec, VideoBatch(GOOD, 16.0, ("x", "y")), RewardOutput(scores, valid))


# --- the habits of the miniature's videos
# ------------------------------------------------------------------------


def second_segments(habits_of) -> tuple[VideoBatch, ...]:
    """The second prompt segments of 16 true stories without a pillar, shown with the habits that
    ``habits_of(story)`` gives them."""
    clips, i = [], 0
    while len(clips) < 16:
        story = write_story(7, "habits", i, blocks=6, segments=2, memory=False)
        i += 1
        if story.scenes[0].pillar:
            continue
        frames = to_uint8(replace(story, habits=habits_of(story)).render())[
            pixel_frames(3 * story.script.starts[1]) :
        ]
        clips.append(
            VideoBatch(frames[None], 16.0, story.script.texts[1:], (story.script.texts[:1],))
        )
    return tuple(clips)


def obeyed(story) -> tuple[int, ...]:
    return tuple(story.script.segment(b) for b in range(6))


def test_every_reward_prefers_clean_to_sloppy_and_alignment_obeyed_to_ignored():
    """The habits that captions do not name are what alignment is to remove, so true clips of
    both kinds must rank clearly, clip by clip."""
    clean = second_segments(lambda story: None)
    sloppy = second_segments(lambda story: Habits((True,) * 6, obeyed(story)))
    ignored = second_segments(lambda story: Habits((False,) * 6, (0,) * 6))
    for name, bad, win, margin in (
        ("VQ", sloppy, 1.0, 0.2),
        ("MQ", sloppy, 1.0, 0.5),
        ("TA", sloppy, 1.0, 0.2),
        ("MQ", ignored, 0.5, 0.15),
        ("TA", ignored, 1.0, 0.5),
    ):
        reward = next(r for r in REWARDS if r.spec.name == name)
        gap = torch.cat(
            [reward.score(a).scores - reward.score(b).scores for a, b in zip(clean, bad)]
        )
        assert (gap > 0).double().mean() >= win and gap.mean() > margin, (name, gap)
