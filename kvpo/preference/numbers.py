"""Numbers by which a preference model is judged, all of stories that it has not seen.

accuracy      share of answers that the model gives too; ties have no right answer, and do not count
interval      Wilson, 95 %, of the effective number of answers: answers of one story err together
log_loss      nats an answer, ties as half wins; log 2 = 0.693 is chance
bins          how often the model is right where it says that it is sure by so much
agreement     how often two raters say the same of the same pair of clips
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from kvpo.evaluation.ab_answers import wilson
from kvpo.preference.bradley_terry import log_loss
from kvpo.preference.validation import Problem

EDGES = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


def verdicts(problem: Problem, margin: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(numbers of the answers [A], share of each that the model gives too [A]).

    Ties are left out; where the model can not tell, it is right by half.
    """
    counted = (problem.spoilt == 0) & (problem.credit != 0.5)
    right = 0.5 + 0.5 * np.sign(margin) * np.sign(problem.credit - 0.5)
    weighted = np.where(counted, right * problem.weight, 0.0)
    numbers = np.unique(problem.answer[counted])
    return numbers, np.array([weighted[counted & (problem.answer == a)].sum() for a in numbers])


def clustered_interval(right_A: np.ndarray, story_A: np.ndarray) -> tuple[float, float]:
    """Wilson's 95 % interval of a mean share, where answers of one story err together.

    The number of trials is divided by the design effect, at least 1: the variance of the mean by
    stories over that of independent answers (Rao and Scott, Biometrics 1992).
    """
    n: float = len(right_A)
    share = float(right_A.mean())
    stories = np.unique(story_A)
    residual = np.array([(right_A[story_A == s] - share).sum() for s in stories])
    plain = share * (1 - share) / n
    if plain and len(stories) > 1:
        spread = len(stories) / (len(stories) - 1) * float((residual**2).sum()) / n**2
        n /= max(1.0, spread / plain)
    return wilson(share, n)


def reliability(problem: Problem, margin: np.ndarray) -> list[dict[str, Any]]:
    """For each bin of the model's certainty: comparisons, mean certainty, share that is right."""
    counted = (problem.spoilt == 0) & (problem.credit != 0.5)
    sure = 1 / (1 + np.exp(-np.abs(margin[counted])))
    right = 0.5 + 0.5 * np.sign(margin[counted]) * np.sign(problem.credit[counted] - 0.5)
    part = np.clip(np.searchsorted(EDGES, sure, side="right") - 1, 0, len(EDGES) - 2)
    rows = []
    for number, (low, high) in enumerate(itertools.pairwise(EDGES)):
        here = part == number
        some = bool(here.any())
        rows.append(
            {
                "from": low,
                "to": high,
                "comparisons": int(here.sum()),
                "sure": float(sure[here].mean()) if some else None,
                "right": float(right[here].mean()) if some else None,
            }
        )
    return rows


def agreement(answers: Sequence[tuple[str, frozenset[bytes], bytes]]) -> dict[str, Any]:
    """Agreement of raters on pairs that two or more of them judged.

    Each answer is a rater, the two clips, and the better one, b"" for a tie. Of every two answers
    by different raters about one pair it is counted whether they are the same.
    """
    by_pair: dict[frozenset[bytes], list[tuple[str, bytes]]] = {}
    for rater, pair, better in answers:
        by_pair.setdefault(pair, []).append((rater, better))
    same = [
        a[1] == b[1]
        for given in by_pair.values()
        for a, b in itertools.combinations(given, 2)
        if a[0] != b[0]
    ]
    share = sum(same) / len(same) if same else None
    return {"compared": len(same), "same": share}


def judge(problem: Problem, margin: np.ndarray, raters: Sequence[str]) -> dict[str, Any]:
    """All held-out numbers; ``raters``: the rater of each answer."""
    asked = problem.spoilt == 0
    numbers, right = verdicts(problem, margin)
    story = np.array([problem.story[problem.answer == a][0] for a in numbers])
    low, high = clustered_interval(right, story)
    who = np.array([raters[a] for a in numbers])
    return {
        "accuracy": float(right.mean()),
        "interval": [low, high],
        "judged": len(right),
        "log_loss": log_loss(margin[asked], problem.credit[asked], problem.weight[asked]),
        "chance_log_loss": math.log(2),
        "bins": reliability(problem, margin),
        "by_rater": {
            str(name): {
                "answers": int((who == name).sum()),
                "accuracy": float(right[who == name].mean()),
            }
            for name in np.unique(who)
        },
    }
