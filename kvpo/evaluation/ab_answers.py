"""`kvpo unblind`: what raters answered on a blind A/B page, with the key, as win rates of A.

The unit is the script: a script's share is the mean over its seeds and raters of 1 (A better), 1/2
(same), 0 (B better).

    win rate   mean share over scripts
    interval   Wilson, 95 %, one trial a script.  Shares between 0 and 1 vary less than wins and losses, so it is never too narrow
    p          exact two-sided sign test over the scripts whose share is not 1/2
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from kvpo.common.json_values import JsonFault, json_values
from kvpo.common.text_files import line_at, read_text
from kvpo.pages.ab import QUESTIONS

Z = 1.959964
"""Half width of a 95 % interval, in standard deviations."""


def read_key(path: Path) -> dict:
    """Read the key of an A/B page.

    Raises ValueError where the file is no key.json of `kvpo ab`.
    """
    key = _json(path)
    if not {"study", "a", "b", "pairs"} <= set(key):
        raise ValueError(
            f"{path} is no key of an A/B page: it lacks study, a, b or pairs; give the key.json that `kvpo ab` wrote"
        )
    pairs = key["pairs"] if isinstance(key["pairs"], list) else [None]
    if not pairs or not all(map(_is_pair, pairs)):
        raise ValueError(
            f"{path}: its pairs must be a list of objects with a script and the side `left`, a or b, and are not; give the key.json that `kvpo ab` wrote"
        )
    return key


def _is_pair(pair: object) -> bool:
    return (
        isinstance(pair, dict)
        and isinstance(pair.get("script"), str)
        and pair.get("left") in ("a", "b")
    )


def read_answers(paths: Sequence[Path], key: Mapping) -> dict[str, list[dict]]:
    """Rater -> answers {"pair": 0, "VQ": "left", ...}.  ValueError that names file and fault."""
    given: dict[str, list[dict]] = {}
    for path in paths:
        content = _json(path)
        if content.get("study") != key["study"]:
            raise ValueError(
                f"{path} answers study {content.get('study')!r}, the key is of {key['study']!r}; give the key.json that was made with that page"
            )
        rater, answers = content.get("rater", ""), content.get("answers")
        if not isinstance(rater, str):
            raise ValueError(f"{path}: the rater is {json.dumps(rater)}; it must be a name, a text")
        if not isinstance(answers, list):
            raise ValueError(f'{path} has no list "answers"; give the file that the page saved')
        if rater in given:
            raise ValueError(
                f"{path}: a file by rater {rater!r} is given already; leave one out, or give its rater a name of their own"
            )
        for number, answer in enumerate(answers):
            _check_answer(answer, number, len(key["pairs"]), path)
        pairs = [answer["pair"] for answer in answers]
        if twice := [pair for pair in pairs if pairs.count(pair) > 1]:
            raise ValueError(
                f"{path} answers pair {twice[0]} twice, and each answer counts as a vote; leave one out"
            )
        given[rater] = answers
    return given


def _json(path: Path) -> dict:
    text = read_text(path)
    try:
        ((_, listed, content),) = json_values(text)
    except JsonFault as fault:
        raise ValueError(
            f"{path}, line {line_at(text, fault.at)}: {fault}. Give what the page or `kvpo ab` saved"
        ) from None
    except ValueError:
        raise ValueError(
            f"{path} must hold one JSON object; give what the page or `kvpo ab` saved"
        ) from None
    if listed or not isinstance(content, dict):
        raise ValueError(
            f"{path} holds {json.dumps(content)[:60]}, which is not one object; give what the page or `kvpo ab` saved"
        )
    return content


def _check_answer(answer: object, number: int, pairs: int, path: Path) -> None:
    if not isinstance(answer, dict) or type(answer.get("pair")) is not int:
        raise ValueError(
            f'{path}: answer {number + 1} is {json.dumps(answer)[:80]}; it must be an object whose "pair" is a whole number'
        )
    if answer["pair"] not in range(pairs):
        raise ValueError(
            f"{path} answers pair {answer.get('pair')!r}, but the study has pairs 0 to {pairs - 1}; give the answers to this study's page"
        )
    wrong = {
        k: v
        for k, v in answer.items()
        if k != "pair" and (k not in QUESTIONS or v not in ("left", "same", "right"))
    }
    if wrong:
        raise ValueError(
            f"{path}, pair {answer['pair']}: {wrong} is no answer; known are {', '.join(QUESTIONS)} with left, same or right"
        )


def judge(question: str, key: Mapping, given: Mapping[str, Sequence[Mapping]]) -> dict:
    """Make a question's row: counts of answers, win rate of A, its interval and sign test.

    Both are over scripts; None where nobody answered.
    """
    shares: dict[str, list[float]] = {}
    for answer in (a for answers in given.values() for a in answers if question in a):
        pair = key["pairs"][answer["pair"]]
        better = {"left": pair["left"], "same": "", "right": "b" if pair["left"] == "a" else "a"}[
            answer[question]
        ]
        shares.setdefault(pair["script"], []).append({"a": 1.0, "": 0.5, "b": 0.0}[better])
    counts = {
        name: sum(x == value for script in shares.values() for x in script)
        for name, value in (("a", 1.0), ("same", 0.5), ("b", 0.0))
    }
    means = [sum(script) / len(script) for script in shares.values()]
    if not means:
        return {
            "question": question,
            **counts,
            "scripts": 0,
            **dict.fromkeys(("win", "low", "high", "p")),
        }
    win = sum(means) / len(means)
    low, high = wilson(win, len(means))
    return {
        "question": question,
        **counts,
        "scripts": len(means),
        "win": win,
        "low": low,
        "high": high,
        "p": sign_test(sum(m > 0.5 for m in means), sum(m < 0.5 for m in means)),
    }


def wilson(share: float, trials: float) -> tuple[float, float]:
    """Wilson's 95 % interval of a share of ``trials``; also at 0 and 1 it has a width.

    Wilson, Probable inference, the law of succession, and statistical inference, JASA 1927.
    """
    scale = 1.0 + Z**2 / trials
    middle = (share + Z**2 / (2 * trials)) / scale
    half = Z * math.sqrt(share * (1 - share) / trials + Z**2 / (4 * trials**2)) / scale
    return max(0.0, middle - half), min(1.0, middle + half)


def sign_test(wins: int, losses: int) -> float:
    """Exact two-sided p of so uneven a split, were both equally likely.

    1 without any win or loss.
    """
    n = wins + losses
    return min(1.0, 2.0 * sum(math.comb(n, k) for k in range(min(wins, losses) + 1)) / 2**n)


def left_share(given: Mapping[str, Sequence[Mapping]]) -> float:
    """Share of left among left and right over all answers; NaN without any."""
    sides = [
        value
        for answers in given.values()
        for answer in answers
        for value in answer.values()
        if value in ("left", "right")
    ]
    return sides.count("left") / len(sides) if sides else math.nan


def table(rows: Sequence[Mapping]) -> str:
    lines = [
        f"{'question':<10} {'A better':>8} {'same':>6} {'B better':>8} {'scripts':>8} {'A wins':>8} {'95 % interval':>17} {'sign test p':>12}"
    ]
    for r in rows:
        judged = (
            f"{r['win']:>8.1%}  [{r['low']:>6.1%}, {r['high']:>6.1%}] {r['p']:>12.3g}"
            if r["scripts"]
            else f"{'nobody answered':>39}"
        )
        lines.append(
            f"{r['question']:<10} {r['a']:>8} {r['same']:>6} {r['b']:>8} {r['scripts']:>8} {judged}"
        )
    return "\n".join(lines)
