"""`kvpo preference fit`: from recorded answers to a model that has shown what it is worth.

The clips of all answers, and spoilt copies of some, are measured once; then everything is numbers.
Nothing is kept of a model whose held-out accuracy may be chance, or that a spoilt clip wins.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kvpo.common.progress import Progress
from kvpo.common.rng import stream
from kvpo.common.video import read_mp4
from kvpo.preference import numbers, validation
from kvpo.preference.features import FeatureSet
from kvpo.preference.records import Answer, Records
from kvpo.preference.validation import SPOILT, Model, Problem
from kvpo.rewards.base import VideoBatch
from kvpo.rewards.calibration import DEGRADATIONS, MUST_WIN

MIN_ANSWERS = 10
"""Answers, ties not counted, below which nothing can be told from chance."""
MOST_SPOILT = 64
"""Recorded clips that get spoilt copies."""
FLAWS = dict(zip(SPOILT, ("frozen", "grey")))
"""Spoilt copy -> its name in `kvpo.rewards.calibration`."""

Read = Callable[[Path], tuple[torch.Tensor, float]]


@dataclass(frozen=True)
class Fitted:
    """A model and what it is worth on stories that it has not seen."""

    model: Model
    names: tuple[str, ...]
    """Names of the features, ``set.feature``, in the order of the weights."""
    networks: Mapping[str, str]
    """Identity of the weights of each set that is a network."""
    numbers: Mapping[str, Any]


@dataclass(frozen=True)
class Measured:
    """Features of all clips, and the pixels' digests of the recorded ones."""

    features: Mapping[str, np.ndarray]
    """Set -> float64 [C, F]: recorded clips, then the spoilt copies."""
    digests: Sequence[bytes]
    copies: Sequence[tuple[int, int]]
    """Number of the recorded clip and number in SPOILT, of each spoilt copy."""


def check_amount(answers: Sequence[Answer]) -> None:
    """Check that there is enough to learn from and to judge by.

    Raises ValueError where there are too few stories, or too few answers that are no ties.
    """
    stories = {answer.story for answer in answers}
    if len(stories) < validation.MIN_STORIES:
        raise ValueError(
            f"the answers are about {len(stories)} stories, and {validation.MIN_STORIES} are needed so that a model can be judged on stories it has not seen; choose in new stories of other seeds and prompts (eight or more are better)"
        )
    told = sum(any(v.credit != 0.5 for v in answer.versus) for answer in answers)
    if told < MIN_ANSWERS:
        raise ValueError(
            f"{told} answers say that a clip is better, and {MIN_ANSWERS} are needed before chance can be told from taste; give more answers (60 are better)"
        )


def measure(
    clips: Sequence[Path], sets: Mapping[str, FeatureSet], progress: Progress, read: Read
) -> Measured:
    """Measure the recorded clips and spoilt copies of some, one clip at a time.

    A branch is recorded with each answer about it; what has the pixels of a clip before is that
    clip, and not measured again. Raises ValueError for a clip that can not be read or is too short for a set.
    """
    spoil = {i * len(clips) // min(len(clips), MOST_SPOILT) for i in range(MOST_SPOILT)}
    known: dict[bytes, dict[str, torch.Tensor]] = {}
    rows: list[dict[str, torch.Tensor]] = []
    spoilt: list[dict[str, torch.Tensor]] = []
    digests, copies = [], []
    with progress.bar("measure clips", len(clips)) as bar:
        for number, path in enumerate(clips):
            batch = VideoBatch(*_clip(path, sets, read), ("",))
            digest = batch.digests[0]
            spoils = number in spoil and digest not in known
            if digest not in known:
                known[digest] = _features(batch, sets)
            digests.append(digest)
            rows.append(known[digest])
            for kind, flaw in enumerate(FLAWS.values()) if spoils else ():
                frames = DEGRADATIONS[flaw](batch.frames, stream(0, "preference", flaw))
                spoilt.append(_features(VideoBatch(frames, batch.fps, ("",)), sets))
                copies.append((number, kind))
            bar.advance(path.name)
    features = {
        name: np.concatenate([row[name].numpy() for row in [*rows, *spoilt]]) for name in sets
    }
    return Measured(features, digests, copies)


def _clip(path: Path, sets: Mapping[str, FeatureSet], read: Read) -> tuple[torch.Tensor, float]:
    video, fps = read(path)
    for name, features in sets.items():
        if len(video) < features.min_frames:
            raise ValueError(
                f"{path} has {len(video)} frames and the features {name!r} need {features.min_frames}; take the answer out, or make longer clips"
            )
    return video[None], fps


def _features(batch: VideoBatch, sets: Mapping[str, FeatureSet]) -> dict[str, torch.Tensor]:
    return {name: features.measure(batch) for name, features in sets.items()}


def problem_of(
    answers: Sequence[Answer],
    clips: Sequence[Path],
    measured: Measured,
    sets: Mapping[str, FeatureSet],
) -> Problem:
    """Make the comparisons of all answers, then those with spoilt copies."""
    number = {clip: i for i, clip in enumerate(clips)}
    stories = sorted({answer.story for answer in answers})
    rows: list[tuple[float, ...]] = []
    home: dict[int, int] = {}
    for a, answer in enumerate(answers):
        story = stories.index(answer.story)
        home |= {number[clip]: story for clip in answer.clips}
        for v in answer.versus:
            first, second = (number[answer.clips[i]] for i in (v.first, v.second))
            rows.append((first, second, v.credit, v.weight, a, story, 0))
    for at, (clip, kind) in enumerate(measured.copies, len(clips)):
        rows.append((clip, at, 1.0, 1.0, -1, home[clip], 1 + kind))
    table = np.array(rows, dtype=np.float64).T
    first, second, answer_N, story_N, spoilt = table[[0, 1, 4, 5, 6]].astype(int)
    floors = {name: np.array(features.floors) for name, features in sets.items()}
    return Problem(
        measured.features, floors, first, second, table[2], table[3], answer_N, story_N, spoilt
    )


def fit_answers(
    records: Records,
    sets: Mapping[str, FeatureSet],
    seed: int,
    progress: Progress,
    read: Read = lambda path: read_mp4(path, original=True),
) -> Fitted:
    """Fit, choose and judge a model.  ``sets`` are loaded; ``read`` gives a clip's frames and rate.

    Raises ValueError where there is too little to learn from, where the model may be chance, and
    where a spoilt clip wins.
    """
    answers = records.answers
    check_amount(answers)
    clips = list(dict.fromkeys(clip for answer in answers for clip in answer.clips))
    measured = measure(clips, sets, progress, read)
    problem, among = problem_of(answers, clips, measured, sets), validation.options(list(sets))
    with progress.timed("cross-validation"):
        margin = validation.held_out(problem, among, seed)
        model = validation.learn(problem, validation.choose(problem, among, seed, "final"))
    won = validation.spoilt_won(problem, margin)
    final = validation.spoilt_won(problem, model.margin(problem))
    found = numbers.judge(problem, margin, [answer.rater for answer in answers]) | {
        "answers": len(answers),
        "stories": len({answer.story for answer in answers}),
        "ties": sum(answer.versus[0].credit == 0.5 for answer in answers),
        "spoilt_won": {name: min(share, final[name]) for name, share in won.items()},
        "agreement": numbers.agreement(_said(answers, dict(zip(clips, measured.digests)))),
    }
    refuse(found)
    names = tuple(f"{kind}.{name}" for kind in model.option.sets for name in sets[kind].names)
    networks = {kind: sets[kind].weights for kind in model.option.sets if sets[kind].weights}
    return Fitted(model, names, networks, found)


def _said(
    answers: Sequence[Answer], digests: Mapping[Path, bytes]
) -> list[tuple[str, frozenset[bytes], bytes]]:
    """List who said what of which pair, which is known again by its pixels."""
    said = []
    for answer in answers:
        if answer.kind == "pair":
            first, second = (digests[clip] for clip in answer.clips)
            better = {1.0: first, 0.0: second}.get(answer.versus[0].credit, b"")
            said.append((answer.rater, frozenset((first, second)), better))
    return said


def refuse(found: Mapping[str, Any]) -> None:
    """Refuse a model that nothing should be aligned to.

    Raises ValueError where spoilt clips win, or where its accuracy may be chance.
    """
    for name, share in found["spoilt_won"].items():
        if share < MUST_WIN:
            raise ValueError(
                f"a {name} clip wins: only {share:.0%} of the recorded clips score above their own {name} copy, and {MUST_WIN:.0%} are asked for; nothing was written. Training would find that first: give answers about clips in which something moves"
            )
    low, high = found["interval"]
    if low <= 0.5:
        raise ValueError(
            f"the answers can not be told from chance: on stories it has not seen the best model gives {found['accuracy']:.0%} of {found['judged']} answers, interval {low:.0%} to {high:.0%}, and 50 % is chance; nothing was written. Give more answers, by one rater with one taste in mind, in more stories"
        )
