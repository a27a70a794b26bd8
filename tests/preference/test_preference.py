"""From recorded answers to a reward: hand-worked numbers, hidden tastes, refusals, the folder."""

from __future__ import annotations

import json
import math
import random
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from test_align import align, settings, write_recipe
from tiny import RED

from kvpo.commands import main as cli
from kvpo.common.metric_log import read_metrics
from kvpo.common.progress import Progress
from kvpo.common.video import write_mp4
from kvpo.preference import fit as fitting
from kvpo.preference.bradley_terry import Scale, fit, log_loss, scale_of
from kvpo.preference.features import FRAMES, at_hand, make_sets, statistics
from kvpo.preference.fit import Fitted, fit_answers
from kvpo.preference.numbers import agreement, clustered_interval, reliability, verdicts
from kvpo.preference.records import Answer, Records, Versus, read_records
from kvpo.preference.reward import Preference
from kvpo.preference.saved import read, save
from kvpo.preference.validation import (
    DEAD,
    Option,
    Problem,
    dead,
    folds,
    learn,
    options,
    stake,
)
from kvpo.rewards.base import VideoBatch, check_output
from kvpo.rewards.calibration import refuse_frozen
from kvpo.rewards.registry import RewardEntry, make_reward
from kvpo.rewards.scorer import Scorer
from kvpo.studio.library import append_line

# --- Synthetic clips, and people who rate them ---


@dataclass(frozen=True)
class Look:
    """What differs between clips; each number in [0, 1]."""

    light: float
    size: float
    shake: float


def filmed(look: Look, seed: int, frames: int = 16) -> torch.Tensor:
    """A disc that crosses a ground of one colour, [T, 3, 32, 48]."""
    draw, (height, width) = random.Random(seed), (32, 48)
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    ground = 40 + 110 * look.light + 8 * (y / height)
    radius, top = 4 + 4 * look.size, draw.uniform(12, 20)
    colour = torch.tensor([draw.choice(((200, 40, 40), (40, 60, 220), (220, 200, 40)))]).view(3, 1)
    clip = []
    for t in range(frames):
        jump = [4 * look.shake * draw.uniform(-1, 1) for _ in range(2)]
        at = 10 + 1.8 * t + jump[0]
        inside = (x - at) ** 2 + (y - top - jump[1]) ** 2 < radius**2
        picture = ground.expand(3, -1, -1).clone()
        picture[:, inside] = colour.float().expand(3, int(inside.sum()))
        clip.append(picture)
    return torch.stack(clip).round().to(torch.uint8)


TASTES = {
    "brighter": lambda look: look.light,
    "larger": lambda look: look.size,
    "steadier": lambda look: -look.shake,
}


def rated(prefers, pairs: int = 60, stories: int = 12, wrong: float = 0.1, rater: str = "ann"):
    """Answers of one rater who errs, and the clips by path."""
    draw, videos, answers = random.Random(5), {}, []
    for number in range(pairs):
        # Three levels, two different ones of each: what a rater can tell apart, mixed at random.
        levels = [draw.sample((0.0, 0.5, 1.0), 2) for _ in range(3)]
        looks = [Look(*row) for row in zip(*levels)]
        clips = tuple(Path(f"clips/{number}/{row}.mp4") for row in range(2))
        for row, (clip, look) in enumerate(zip(clips, looks)):
            videos[clip] = filmed(look, 2 * number + row)
        wins = prefers(looks[0]) > prefers(looks[1])
        credit = float(wins != (draw.random() < wrong))
        versus = (Versus(0, 1, credit, 1.0),)
        story = f"story-{number % stories}"
        answers.append(Answer(number + 1, "pair", clips, versus, rater, story, "synthetic"))
    return answers, videos


def fitted(answers, videos, names=("frames",)) -> Fitted:
    records = Records(tuple(answers), (), (), 0)
    return fit_answers(
        records, make_sets(names), 0, Progress(quiet=True), lambda p: (videos[p], 16.0)
    )


@pytest.fixture(scope="module")
def brighter() -> Fitted:
    return fitted(*rated(TASTES["brighter"]))


# --- The model ---


def test_one_feature_is_hand_worked():
    """d = 1 wins 3 of 4: the gradient is sigmoid(w) - 3/4 + strength w, 0 at w = ln 2 for this
    strength."""
    strength = (3 / 4 - 2 / 3) / math.log(2)  # sigmoid(ln 2) = 2/3
    w = fit(np.ones((4, 1)), np.array([1.0, 1, 1, 0]), np.ones(4), strength)
    assert w == pytest.approx([math.log(2)], abs=1e-6)
    loss = log_loss(np.full(4, math.log(2)), np.array([1.0, 1, 1, 0]), np.ones(4))
    assert loss == pytest.approx(-(3 * math.log(2 / 3) + math.log(1 / 3)) / 4)


def test_ties_are_half_wins_and_weights_count():
    """Two ties are a win and a loss; a win of weight 3 is three wins."""
    x = np.array([[1.0, 0.5], [0.2, -1.0]])
    tie = fit(x[[0, 0, 1]], np.array([0.5, 0.5, 1.0]), np.ones(3), 0.1)
    split = fit(x[[0, 0, 1]], np.array([1.0, 0.0, 1.0]), np.ones(3), 0.1)
    assert tie == pytest.approx(split, abs=1e-6)
    heavy = fit(x, np.array([1.0, 1.0]), np.array([3.0, 1.0]), 0.1)
    often = fit(x[[0, 0, 0, 1]], np.ones(4), np.ones(4), 0.1)
    assert heavy == pytest.approx(often, abs=1e-6)


def test_more_features_than_answers_give_the_same_minimum():
    """The search in the span of the differences leaves the gradient of the whole loss at 0."""
    draw = np.random.default_rng(3)
    x, c = draw.normal(size=(6, 40)), np.array([1.0, 0, 1, 0.5, 1, 0])
    w = fit(x, c, np.ones(6), 0.05)
    gradient = x.T @ (1 / (1 + np.exp(-x @ w)) - c) / 6 + 0.05 * w
    assert np.abs(gradient).max() < 1e-5
    with pytest.raises(ValueError, match="must be above 0"):
        fit(x, c, np.ones(6), 0.0)


def test_features_are_standardised_by_what_could_be_measured():
    x = np.array([[1.0, 5.0], [3.0, np.nan], [np.nan, 5.0]])
    scale = scale_of(x, np.array([[0.3, np.nan], [-0.4, 0.0]]), np.array([0.1, 0.5]))
    unit = math.sqrt((0.3**2 + 0.4**2) / 2)
    assert scale.mean.tolist() == [2.0, 5.0]
    assert scale.spread.tolist() == pytest.approx([unit, 0.005]), "the second is a floor"
    assert scale.reach.tolist() == pytest.approx([4 / unit, 4 * 0.5 / 0.005])
    z = scale(np.array([[np.nan, 5.005], [900.0, -900.0]]))
    expected = [[0.0, 1.0], [4 / unit, -400.0]]
    assert z == pytest.approx(np.array(expected)), "cut where nobody saw anything"


def test_statistics_of_frames_are_hand_worked():
    """A red pixel column moves right, then stands, on black of 4 x 4."""
    x = torch.zeros(3, 3, 4, 4)
    for t, column in enumerate((0, 1, 1)):
        x[t, 0, :, column] = 1.0
    found = statistics(x)
    assert found["brightness"] == pytest.approx(0.299 / 4) and found["size"] == 0.25
    assert found["warmth"] == 0.25 and found["green"] == -0.125 and found["still"] == 0.5
    assert found["motion"] == pytest.approx((8 / 48 + 0) / 2)
    assert found["unsteady"] == pytest.approx(1 / math.sqrt(32))
    assert set(found) == set(FRAMES)


# --- Cross-validation and numbers ---


def test_no_story_is_in_two_parts():
    stories = np.array([3, 1, 1, 2, 0, 3, 4, 4, 5])
    part = folds(stories, 3, 0, "outer")
    assert all(len(set(part[stories == s])) == 1 for s in stories)
    assert sorted(np.bincount([part[stories == s][0] for s in range(6)])) == [2, 2, 2]


def small_problem(credit, weight, answer, story) -> Problem:
    n = len(credit)
    row = np.arange(n)
    features, floors = {"frames": np.zeros((2 * n, 1))}, {"frames": np.ones(1)}
    return Problem(
        features,
        floors,
        2 * row,
        2 * row + 1,
        np.array(credit),
        np.array(weight),
        np.array(answer),
        np.array(story),
        np.zeros(n, int),
    )


def test_verdicts_and_bins_are_hand_worked():
    """A pick of three rows counts once, a tie not at all, and what can not be told by half."""
    problem = small_problem(
        [1.0, 1, 0.5, 0, 1], [0.5, 0.5, 1, 1, 1], [0, 0, 1, 2, 3], [0, 0, 0, 1, 1]
    )
    margin = np.array([2.0, -1.0, 5.0, -3.0, 0.0])
    numbers, right = verdicts(problem, margin)
    assert numbers.tolist() == [0, 2, 3] and right.tolist() == [0.5, 1.0, 0.5]
    rows = reliability(problem, margin)
    assert [row["comparisons"] for row in rows] == [1, 0, 1, 1, 1]
    assert rows[4]["sure"] == pytest.approx(1 / (1 + math.exp(-3))) and rows[4]["right"] == 1.0
    assert rows[2]["right"] == 0.0 and rows[1]["right"] is None


def test_answers_of_one_story_that_err_together_count_less():
    story = np.repeat(np.arange(10), 6)
    apart = (np.arange(60) % 6 > 0).astype(float)  # each story errs once
    together = (story > 1).astype(float)  # two stories err always
    wide, narrow = (clustered_interval(r, story) for r in (together, apart))
    assert narrow[0] > 0.7 and wide[0] < 0.52 and together.mean() == 0.8


def test_two_raters_agree_on_pairs_that_they_share():
    ab, cd = frozenset((b"a", b"b")), frozenset((b"c", b"d"))
    said = [("ann", ab, b"a"), ("bob", ab, b"a"), ("ann", cd, b"c"), ("bob", cd, b"")]
    assert agreement(said) == {"compared": 2, "same": 0.5}
    assert agreement(said[::2]) == {"compared": 0, "same": None}
    assert agreement([("ann", ab, b"a"), ("ann", ab, b"b")])["compared"] == 0, "one person"


def test_statistics_of_frames_are_in_every_option():
    kinds = {option.sets for option in options(["frames", "classic", "efficientnet"])}
    assert kinds == {
        ("frames",),
        ("frames", "classic"),
        ("frames", "efficientnet"),
        ("frames", "classic", "efficientnet"),
    }


def test_what_is_dead_loses_by_hand():
    """Motion at half of its limit is half dead; contrast at its limit or above is alive."""
    frames = np.zeros((3, len(FRAMES)))
    frames[:, list(FRAMES).index("motion")] = (0.01, 0.02, 0.0)
    frames[:, list(FRAMES).index("contrast")] = (0.1, 0.3, 0.3)
    lost = dead(frames, {"motion": 0.02, "contrast": 0.1})
    assert lost.tolist() == [0.5, 0.0, 1.0]
    scale = Scale(np.zeros(2), np.ones(2), np.array([4.0, 10.0]))
    assert stake(np.array([1.0, -0.5]), scale) == DEAD + 2 * (4 + 5)


# --- Hidden tastes ---


@pytest.mark.parametrize("taste", TASTES)
def test_a_hidden_taste_is_found_from_sixty_pairs(taste):
    """10 % of the answers are wrong; on fresh clips the score must rank as the taste does, and a
    clip must beat its own first frame held still."""
    model = fitted(*rated(TASTES[taste]))
    assert model.numbers["interval"][0] > 0.5 and model.numbers["log_loss"] < math.log(2)
    draw = random.Random(99)
    looks = [Look(draw.random(), draw.random(), draw.random()) for _ in range(24)]
    videos = torch.stack([filmed(look, 1000 + i) for i, look in enumerate(looks)])
    batch = VideoBatch(videos, 16.0, ("",) * len(looks))
    z = model.model.scale(make_sets(["frames"])["frames"].measure(batch).numpy())
    wanted = np.array([TASTES[taste](look) for look in looks])
    assert np.corrcoef(z @ model.model.weights, wanted)[0, 1] > 0.8
    assert min(model.numbers["spoilt_won"].values()) >= 0.9


def alike(pairs: int = 60, stories: int = 12):
    """Pairs of one story that hardly differ, of stories that differ by far more.

    The rater takes the brighter one by a hundredth of what stories differ by, and errs in a tenth.
    """
    draw, videos, answers = random.Random(5), {}, []
    for number in range(pairs):
        story = number % stories
        light, size = story / stories, draw.uniform(0.2, 0.8)
        looks = [Look(light + draw.choice((0, 0.01)), size, 0.1) for _ in range(2)]
        looks[1] = Look(light + (0.01 if looks[0].light == light else 0), size, 0.1)
        clips = tuple(Path(f"clips/{number}/{row}.mp4") for row in range(2))
        # one seed: both branches have one past
        videos |= {clip: filmed(look, number) for clip, look in zip(clips, looks)}
        credit = float((looks[0].light > looks[1].light) != (draw.random() < 0.1))
        versus = (Versus(0, 1, credit, 1.0),)
        answers.append(Answer(number + 1, "pair", clips, versus, "ann", str(story), "synthetic"))
    return answers, videos


def test_branches_of_one_story_are_told_apart_where_stories_differ_far_more(tmp_path):
    """A rater of the miniature's branches was refused as chance: features were measured in what
    stories differ by, a hundred times what branches do, and a probability told no branches apart."""
    answers, videos = alike()
    model = fitted(answers, videos)
    assert model.numbers["accuracy"] > 0.8 and model.numbers["log_loss"] < 0.5
    save(tmp_path / "taste", model, {})
    reward = make_reward(f"preference:{tmp_path / 'taste'}")
    reward.load("cpu")
    for answer in answers[:12]:  # one of every story, the darkest to the brightest
        batch = VideoBatch(torch.stack([videos[c] for c in answer.clips]), 16.0, ("",) * 2)
        darker, brighter = sorted(range(2), key=lambda i: batch.frames[i].float().mean())
        scores = reward.score(batch).scores
        assert 0.5 < float(scores[brighter] - scores[darker]) < 20


def test_random_answers_are_refused():
    with pytest.raises(ValueError, match=r"can not be told from chance.*nothing was written"):
        fitted(*rated(TASTES["brighter"], wrong=0.5))


def test_a_taste_for_frozen_clips_is_refused():
    """The rater always takes the clip that stands still: right by every answer, and worthless."""
    answers, videos = rated(TASTES["brighter"], pairs=40, wrong=0.0)
    for answer in answers:
        loser = answer.clips[int(answer.versus[0].credit)]
        winner = answer.clips[1 - int(answer.versus[0].credit)]
        videos[winner] = videos[winner][:1].expand(16, -1, -1, -1)
        assert winner != loser
    with pytest.raises(ValueError, match=r"a frozen clip wins.*nothing was written"):
        fitted(answers, videos)


def test_too_little_is_refused_before_a_clip_is_read():
    answers, _ = rated(TASTES["brighter"])
    with pytest.raises(ValueError, match="about 2 stories, and 3 are needed"):
        fitted([a for a in answers if a.story in ("story-0", "story-1")], {})
    with pytest.raises(ValueError, match="9 answers say that a clip is better"):
        fitted(answers[:9], {})


def test_a_clip_that_is_too_short_is_named():
    answers, videos = rated(TASTES["brighter"])
    videos[Path("clips/7/1.mp4")] = videos[Path("clips/7/1.mp4")][:2]
    with pytest.raises(ValueError, match=r"clips/7/1.mp4 has 2 frames.*'frames' need 3"):
        fitted(answers, videos)


def test_a_clip_that_is_recorded_with_several_answers_is_measured_once():
    """A fork of five rows gave 17 clips by six pairs and a choice, and the button took minutes."""
    _, videos = rated(TASTES["brighter"], pairs=4, stories=4)
    clips = [*videos, Path("again/0.mp4"), Path("again/1.mp4")]
    videos |= {clips[-2]: videos[clips[0]], clips[-1]: videos[clips[0]]}
    sets, seen = make_sets(["frames"]), []
    measure = sets["frames"].measure
    sets["frames"].measure = lambda batch: (seen.append(1), measure(batch))[1]
    found = fitting.measure(clips, sets, Progress(quiet=True), lambda p: (videos[p], 16.0))
    assert len(seen) == 8 + len(found.copies) == 8 + 2 * 8
    rows = found.features["frames"]
    assert rows[8].tolist() == rows[9].tolist() == rows[0].tolist() != rows[1].tolist()
    assert found.digests[8] == found.digests[0] and {at for at, _ in found.copies} == set(range(8))


def test_two_raters_are_counted_apart():
    """Bob has the opposite taste: the model follows ann, who says more, and the numbers show it."""
    answers, videos = rated(TASTES["brighter"])
    other = [
        Answer(
            99,
            "pair",
            a.clips,
            (Versus(0, 1, 1 - a.versus[0].credit, 1.0),),
            "bob",
            a.story,
            a.generator,
        )
        for a in answers[:12]
    ]
    found = fitted([*answers, *other], videos).numbers
    assert found["agreement"] == {"compared": 12, "same": 0.0}
    assert found["by_rater"]["ann"]["accuracy"] > 0.7 > 0.4 > found["by_rater"]["bob"]["accuracy"]


def test_ties_have_no_right_answer_and_are_learnt_from():
    answers, videos = rated(TASTES["larger"])
    ties = [
        Answer(200 + i, "pair", a.clips, (Versus(0, 1, 0.5, 1.0),), "ann", a.story, "synthetic")
        for i, a in enumerate(answers[:6])
    ]
    found = fitted([*answers, *ties], videos).numbers
    assert (found["answers"], found["ties"], found["judged"]) == (66, 6, 60)


# --- The recorded folder ---


def recorded(folder: Path, answers, videos) -> Path:
    """Write what the studio would have."""
    for clip, video in videos.items():
        write_mp4(folder / clip, video, factor=1)
    for answer in answers:
        credit = answer.versus[0].credit
        line = {
            "kind": "pair",
            "rows": list(map(str, answer.clips)),
            "row_numbers": [0, 1],
            "answer": {1.0: "left", 0.0: "right", 0.5: "same"}[credit],
        }
        about = {"rater": answer.rater, "story": answer.story, "generator": "synthetic"}
        append_line(folder / "preferences.jsonl", line | about)
    return folder


@pytest.fixture(scope="module")
def studio(tmp_path_factory) -> Path:
    answers, videos = rated(TASTES["brighter"], pairs=30, stories=10, wrong=0.0)
    return recorded(tmp_path_factory.mktemp("studio"), answers, videos)


def line(**changes) -> dict:
    whole = {"kind": "pair", "rows": ["a.mp4", "b.mp4"], "answer": "same", "story": "s"}
    return whole | {"rater": "ann"} | changes


def test_a_cut_line_and_missing_clips_are_passed_over_with_a_word(tmp_path):
    for name in "abc":
        (tmp_path / f"{name}.mp4").touch()
    path = tmp_path / "preferences.jsonl"
    append_line(path, line())
    with path.open("a") as file:
        file.write('{"kind": "pa')  # killed here; the next start closes the line
    append_line(path, line(kind="pick", rows=["a.mp4", "b.mp4", "c.mp4"], chosen=2))
    append_line(path, line(rows=["a.mp4", "gone.mp4"]))
    found = read_records(tmp_path)
    assert [a.line for a in found.answers] == [1, 3] and found.broken == (2,)
    assert found.answers[0].versus == (Versus(0, 1, 0.5, 1.0),)
    assert found.answers[1].versus == (Versus(2, 0, 1.0, 0.5), Versus(2, 1, 1.0, 0.5))
    cut, gone = found.words()
    assert "line 2" in cut and "1 answers whose clips are missing: gone.mp4" in gone


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kind": "vote"}, "no answer: its kind"),
        ({"rows": ["../x.mp4", "b.mp4"]}, "within the folder"),
        ({"rows": ["/etc/x.mp4", "b.mp4"]}, "within the folder"),
        ({"rows": ["a.mp4", "b.mp4", "c.mp4"]}, "a pair of 3 clips"),
        ({"answer": ["left"]}, "left, right or same"),
        ({"kind": "pick", "chosen": 2}, "a row from 0 to 1"),
        ({"kind": "pick", "chosen": True}, "a row from 0 to 1"),
        ({"story": ""}, "the first not empty"),
    ],
)
def test_a_whole_line_that_is_no_answer_is_refused_with_its_number(tmp_path, changes, words):
    append_line(tmp_path / "preferences.jsonl", line(**changes))
    with pytest.raises(ValueError, match=rf"preferences.jsonl, line 1.*{words}"):
        read_records(tmp_path)


def test_the_command_fits_shows_and_scores(studio, tmp_path, capsys):
    out = tmp_path / "taste"
    argv = ["preference", "fit", str(studio), "--out", str(out), "--features", "frames"]
    assert cli.main(argv) == 0
    said = capsys.readouterr().out
    assert "accuracy" in said and f"preference:{out}" in said and "spoilt copies" in said
    assert {p.name for p in out.iterdir()} == {"preference.json", "preference.safetensors"}
    assert cli.main(["preference", "show", str(out)]) == 0
    assert capsys.readouterr().out.splitlines() == said.splitlines()[-8:-1], "all but the last line"
    clip = str(studio / "clips" / "0" / "0.mp4")
    assert cli.main(["rewards", "score", clip, "--reward", f"preference:{out}"]) == 0
    assert "preference-taste " in capsys.readouterr().out
    assert cli.main(argv) == 1 and "is there already" in capsys.readouterr().err


def test_nothing_is_written_where_it_is_refused(studio, tmp_path, capsys):
    bad = shutil.copytree(studio, tmp_path / "bad")
    lines = (bad / "preferences.jsonl").read_text().splitlines()
    with (bad / "preferences.jsonl").open("w") as file:
        for number, text in enumerate(lines):  # odd stories are of the opposite taste
            value = json.loads(text)
            other = {"left": "right", "right": "left"}[value["answer"]]
            value["answer"] = other if number % 2 else value["answer"]
            file.write(json.dumps(value) + "\n")
    argv = ["preference", "fit", str(bad), "--out", str(tmp_path / "out"), "--features", "frames"]
    assert cli.main(argv) == 1
    assert "can not be told from chance" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--features", "frame"], "did you mean frames"),
        (["--features", "clip"], "known are frames, classic, efficientnet"),
    ],
)
def test_unknown_features_are_refused(studio, tmp_path, capsys, options, words):
    argv = ["preference", "fit", str(studio), "--out", str(tmp_path / "out"), *options]
    assert cli.main(argv) == 1 and words in capsys.readouterr().err


def test_a_folder_without_answers_is_refused(tmp_path, capsys):
    argv = ["preference", "fit", str(tmp_path), "--out", str(tmp_path / "out")]
    assert cli.main(argv) == 1 and "give the folder of a studio" in capsys.readouterr().err


# --- The reward ---


def test_the_saved_reward_gives_the_same_scores(brighter, tmp_path):
    save(tmp_path / "a taste", brighter, {"raters": ["ann"]})
    reward = make_reward(f"preference:{tmp_path / 'a taste'}")
    assert reward.spec.name == "preference-a_taste" and reward.spec.weights
    videos = torch.stack([filmed(Look(light, 0.5, 0.2), 7) for light in (0.0, 0.5, 1.0)])
    batch = VideoBatch(videos, 16.0, (RED,) * 3)
    reward.load("cpu")
    output = check_output(reward.spec, batch, reward.score(batch))
    raw = make_sets(["frames"])["frames"].measure(batch).numpy()
    odds = brighter.model.scale(raw) @ brighter.model.weights
    assert output.scores.tolist() == pytest.approx(odds.tolist(), rel=1e-5)
    assert output.parts["frames"].tolist() == pytest.approx(odds.tolist(), rel=1e-5)
    assert output.scores[0] < output.scores[1] < output.scores[2]
    short = reward.score(batch.cut(0, 2))
    assert not short.valid.any() and short.scores.isnan().all()


def test_the_mean_clip_scores_0(brighter, tmp_path, monkeypatch):
    save(tmp_path / "taste", brighter, {})
    reward = Preference(str(tmp_path / "taste"))
    mean = torch.from_numpy(brighter.model.scale.mean)[None]  # it moves
    monkeypatch.setattr(reward.sets["frames"], "measure", lambda batch: mean)
    batch = VideoBatch(filmed(Look(0.5, 0.5, 0.5), 1)[None], 16.0, ("",))
    assert reward.score(batch).scores.tolist() == [0.0]


def test_a_frozen_picture_does_not_win_a_training(brighter, tmp_path):
    """What every training begins with: by brightness alone a clip and its first frame are equal."""
    save(tmp_path / "taste", brighter, {})
    scorer = Scorer(
        make_reward(f"preference:{tmp_path / 'taste'}"),
        RewardEntry(f"preference:{tmp_path / 'taste'}"),
    )
    scorer.load("cpu")
    clips = torch.stack([filmed(Look(i / 12, 0.5, 0.3), 50 + i) for i in range(12)])
    refuse_frozen([scorer], [VideoBatch(clips, 16.0, ("",) * 12)], {scorer.spec.name: 1.0})


@pytest.mark.parametrize(
    ("break_it", "words"),
    [
        (lambda f: shutil.rmtree(f), "is no preference"),
        (lambda f: (f / "preference.json").write_text("{"), "is not JSON"),
        (lambda f: (f / "preference.json").write_text('{"a": 1}'), "something else than a pref"),
        (lambda f: (f / "preference.safetensors").write_bytes(b"junk"), "can not be read"),
        (lambda f: (f / "preference.safetensors").unlink(), "can not be read"),
        (lambda f: _edit(f, version=9), "reads version 2"),
        (lambda f: _edit(f, names=["frames.brightness"]), "does not fit preference.json"),
        (lambda f: _edit(f, names=[f"x{i}" for i in range(len(FRAMES))]), "other features than"),
        (lambda f: _edit(f, sets=["dino"]), "there are no features 'dino'"),
        (lambda f: _edit(f, sets=3), "has no sets"),
        (lambda f: _edit(f, limits={"motion": 0.0}), "limits must be numbers above 0"),
        (lambda f: _spoil(f, "spread", 0.0), "a spread and a reach above 0"),
        (lambda f: _spoil(f, "weights", math.nan), "does not fit"),
    ],
)
def test_a_foreign_or_broken_folder_is_refused(brighter, tmp_path, break_it, words):
    save(tmp_path / "taste", brighter, {})
    break_it(tmp_path / "taste")
    with pytest.raises((ValueError, OSError), match=words):
        make_reward(f"preference:{tmp_path / 'taste'}")


def _edit(folder: Path, **changes) -> None:
    path = folder / "preference.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _spoil(folder: Path, name: str, value: float) -> None:
    tensors = load_file(folder / "preference.safetensors")
    tensors[name] = tensors[name].copy()
    tensors[name][0] = value
    save_file(tensors, folder / "preference.safetensors")


def test_names_without_a_folder_or_with_other_params_are_refused(brighter, tmp_path):
    save(tmp_path / "taste", brighter, {})
    with pytest.raises(ValueError, match="needs its folder"):
        make_reward("preference:")
    with pytest.raises(ValueError, match="no parameter 'gain'"):
        make_reward(f"preference:{tmp_path / 'taste'}", {"gain": 2})


def test_missing_packages_and_other_weights_are_named(brighter, tmp_path, monkeypatch):
    save(tmp_path / "taste", brighter, {})
    _edit(tmp_path / "taste", networks={"frames": "a network sha256:1"})
    with pytest.raises(ValueError, match="was fitted with a network sha256:1"):
        Preference(str(tmp_path / "taste")).load("cpu")
    monkeypatch.setattr("kvpo.preference.features.missing_modules", lambda names: ["cv2"])
    with pytest.raises(ValueError, match=r"features 'frames' need cv2: pip install"):
        Preference(str(tmp_path / "taste"))


@pytest.mark.skipif(len(at_hand()) < 3, reason="needs kvpo[mini]")
def test_all_sets_measure_a_clip_and_are_saved_with_their_weights(tmp_path):
    """The network's weights are named, and loaded again for the reward."""
    sets = make_sets(["frames", "classic", "efficientnet"])
    answers, videos = rated(TASTES["brighter"], pairs=4, stories=4)
    clips = list(videos)
    for features in sets.values():
        features.load("cpu")
    measured = fitting.measure(clips, sets, Progress(quiet=True), lambda p: (videos[p], 16.0))
    problem = fitting.problem_of(answers, clips, measured, sets)
    model = learn(problem, Option(tuple(sets), 0.1))
    names = tuple(f"{k}.{n}" for k in sets for n in sets[k].names)
    networks = {"efficientnet": sets["efficientnet"].weights}
    numbers = {"accuracy": 1.0}
    save(tmp_path / "all", Fitted(model, names, networks, numbers), {})
    assert len(read(tmp_path / "all").names) == len(FRAMES) + 8 + 1280
    reward = Preference(str(tmp_path / "all"))
    reward.load("cpu")
    batch = VideoBatch(torch.stack([videos[c] for c in clips[:2]]), 16.0, ("", ""))
    output = check_output(reward.spec, batch, reward.score(batch))
    raw = np.concatenate([measured.features[k][:2] for k in sets], axis=1)
    odds = model.scale(raw) @ model.weights
    assert output.scores.tolist() == pytest.approx(odds.tolist(), rel=1e-4)
    assert set(output.parts) == {*sets, "dead"}


def test_a_run_is_aligned_to_a_fitted_preference(brighter, folder, tmp_path):
    """The recipe names its folder, and the metrics are logged under its name."""
    save(tmp_path / "taste", brighter, {})
    changes = {"steps": 2, "rewards": [{"name": f"preference:{tmp_path / 'taste'}"}]}
    recipe = write_recipe(tmp_path / "tiny.yaml", settings(folder, **changes))
    assert align(recipe, tmp_path / "run") == 0
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert sum(any("preference-taste" in key for key in row) for row in rows) >= 2
    assert (tmp_path / "run" / "report.html").is_file()
