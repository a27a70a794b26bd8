"""Choice of features and strength by cross-validation, and what the chosen model is worth.

No story is ever on both sides of a cut: clips of one story share its object and its place, and a
model would know them again. The choice itself is made anew within each part that is learnt from
(nested cross-validation), so the held-out numbers have not seen it.

A model that is linear in features can not know that a frozen clip is worthless: who likes calm
pictures would be given one, and to who likes bright ones it is as good as any. So a clip in which
hardly anything moves or is to be seen, beside the recorded ones, loses more log odds than all
features together can give it:

    u     = w . z - stake (1 - alive)
    stake = DEAD + 2 |w| . reach
    alive = min(1, motion / least motion) min(1, contrast / least contrast)

The least is a tenth of what nine in ten recorded clips have: a calm story that was not seen is no
dead one. Whether spoilt copies of the recorded clips do lose is measured, in stories that the model
has not seen.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from kvpo.common.rng import stream
from kvpo.preference.bradley_terry import Scale, fit, log_loss, scale_of
from kvpo.preference.features import FRAMES, SHARE, STEP

STRENGTHS = (0.01, 0.03, 0.1, 0.3, 1.0)
SPOILT = ("frozen", "blank")
DEAD = 20.0
"""Log odds by which a clip at least loses in which nothing moves, or nothing is to be seen."""
LIFE: Mapping[str, float] = {"motion": STEP / 10, "contrast": SHARE / 10}
"""Features of frames without which a clip is dead, and the smallest value of their limits."""
FOLDS, INNER_FOLDS = 5, 4
MIN_STORIES = 3


@dataclass(frozen=True)
class Problem:
    """Comparisons of clips, by numbers.

    Arrays of N comparisons; ``spoilt`` is 0 for answers, else 1 + the number of SPOILT.
    """

    features: Mapping[str, np.ndarray]
    """Name of a set -> float64 [C, F]."""
    floors: Mapping[str, np.ndarray]
    first: np.ndarray
    second: np.ndarray
    credit: np.ndarray
    weight: np.ndarray
    answer: np.ndarray
    """Number of the answer; -1 for spoilt copies."""
    story: np.ndarray
    spoilt: np.ndarray

    def rows(self, keep: np.ndarray) -> Problem:
        """The problem with some of its comparisons only; bool or int [N]."""
        names = ("first", "second", "credit", "weight", "answer", "story", "spoilt")
        return replace(self, **{name: getattr(self, name)[keep] for name in names})


@dataclass(frozen=True)
class Option:
    """A set of features and a strength that may be chosen."""

    sets: tuple[str, ...]
    strength: float


@dataclass(frozen=True)
class Model:
    """A fitted option."""

    option: Option
    scale: Scale
    weights: np.ndarray
    limits: Mapping[str, float]
    """Values of LIFE from which on a clip is alive."""

    def margin(self, problem: Problem) -> np.ndarray:
        """Log odds [N] that the first clip beats the second."""
        z = self.scale(joined(problem.features, self.option.sets))
        lost = stake(self.weights, self.scale) * dead(problem.features["frames"], self.limits)
        odds = z @ self.weights - lost
        return odds[problem.first] - odds[problem.second]


def joined(features: Mapping[str, np.ndarray], sets: Sequence[str]) -> np.ndarray:
    """Features of several sets side by side."""
    return np.concatenate([features[name] for name in sets], axis=-1)


def dead(frames_CF: np.ndarray, limits: Mapping[str, float]) -> np.ndarray:
    """Share [C] of the stake that clips lose because nothing moves, or nothing is to be seen."""
    at = list(FRAMES)
    alive = [np.minimum(frames_CF[:, at.index(name)] / least, 1) for name, least in limits.items()]
    return 1 - np.prod(alive, axis=0)


def stake(weights: np.ndarray, scale: Scale) -> float:
    """Log odds that a dead clip loses: more than all features together can give it."""
    return DEAD + 2 * float(np.abs(weights) @ scale.reach)


def limits_of(frames_CF: np.ndarray) -> dict[str, float]:
    """A tenth of what nine in ten clips have of each of LIFE."""
    tenth = np.quantile(frames_CF, 0.1, axis=0)
    at = list(FRAMES)
    return {name: max(float(tenth[at.index(name)]) / 10, least) for name, least in LIFE.items()}


def learn(problem: Problem, option: Option) -> Model:
    """Fit an option to the answers, standardised by their clips and their differences."""
    asked = problem.rows(problem.spoilt == 0)
    clips = np.unique(np.concatenate((asked.first, asked.second)))
    raw = joined(problem.features, option.sets)
    differences = raw[asked.first] - raw[asked.second]
    scale = scale_of(raw[clips], differences, joined(problem.floors, option.sets))
    z = scale(raw)
    w = fit(z[asked.first] - z[asked.second], asked.credit, asked.weight, option.strength)
    return Model(option, scale, w, limits_of(problem.features["frames"][clips]))


def options(sets: Sequence[str]) -> list[Option]:
    """List all that may be chosen: statistics of frames with any of the other sets, all strengths."""
    others = [name for name in sets if name != "frames"]
    kinds = [
        ("frames", *more)
        for n in range(len(others) + 1)
        for more in itertools.combinations(others, n)
    ]
    return [Option(kind, s) for kind, s in itertools.product(kinds, STRENGTHS)]


def folds(stories: np.ndarray, count: int, seed: int, *name: int | str) -> np.ndarray:
    """Part of each comparison, [N]; stories are dealt out evenly, in a random order."""
    unique = np.unique(stories)
    order = torch.randperm(len(unique), generator=stream(seed, "preference", *name)).numpy()
    part: np.ndarray = np.empty(len(unique), dtype=int)
    part[order] = np.arange(len(unique)) % min(count, len(unique))
    return part[np.searchsorted(unique, stories)]


def choose(problem: Problem, among: Sequence[Option], seed: int, *name: int | str) -> Option:
    """Choose the option of the least held-out log loss."""
    asked = problem.rows(problem.spoilt == 0)
    part = folds(asked.story, INNER_FOLDS, seed, *name)

    def loss(option: Option) -> float:
        margin = np.zeros(len(part))
        for fold in np.unique(part):
            held = part == fold
            margin[held] = learn(asked.rows(~held), option).margin(asked.rows(held))
        return log_loss(margin, asked.credit, asked.weight)

    return min(among, key=loss)


def spoilt_won(problem: Problem, margin: np.ndarray) -> dict[str, float]:
    """Share of recorded clips that beat their own spoilt copy; ties count as lost."""
    return {
        name: float((margin[problem.spoilt == kind] > 0).mean())
        for kind, name in enumerate(SPOILT, 1)
        if (problem.spoilt == kind).any()
    }


def held_out(problem: Problem, among: Sequence[Option], seed: int) -> np.ndarray:
    """Log odds [N] of every comparison by a model that knows no clip of its story."""
    part, margin = folds(problem.story, FOLDS, seed, "outer"), np.zeros(len(problem.story))
    for fold in np.unique(part):
        held = part == fold
        known = problem.rows(~held)
        option = choose(known, among, seed, "inner", int(fold))
        margin[held] = learn(known, option).margin(problem.rows(held))
    return margin
