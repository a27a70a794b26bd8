"""`kvpo unblind`: win rates from the answers of a blind A/B page."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

from kvpo.commands.options import Positional
from kvpo.common.files import write_atomic
from kvpo.common.wording import count_of
from kvpo.evaluation.ab_answers import judge, left_share, read_answers, read_key, table
from kvpo.pages.ab import QUESTIONS


@dataclass(frozen=True)
class Unblind:
    """Win rates of A against B from the answers of an A/B page (`kvpo ab`)."""

    answers: Positional[tuple[Path, ...]]
    """Files that raters saved, one each."""
    key: Path
    """key.json of the same study."""
    out: Path | None = None
    """Result, JSON; default: result.json beside the key."""

    def __call__(self) -> None:
        if not self.answers:
            raise ValueError(
                "no answers: give the files that raters saved, e.g. kvpo unblind answers-*.json --key key.json"
            )
        key = read_key(self.key)
        given = read_answers(self.answers, key)
        rows, left = [judge(question, key, given) for question in QUESTIONS], left_share(given)
        print(table(rows))
        print(
            f"A = {key['a']}, B = {key['b']}, {count_of(len(key['pairs']), 'pair')}, {count_of(len(given), 'rater')}; of the answers that are not `same` {left:.1%} say left, where 50 % means no preference for a side"
        )
        out = self.out or self.key.with_name("result.json")
        write_atomic(
            out,
            json.dumps(
                {
                    "a": key["a"],
                    "b": key["b"],
                    "study": key["study"],
                    "raters": sorted(given),
                    "left": None if math.isnan(left) else left,
                    "rows": rows,
                },
                indent=1,
            )
            + "\n",
        )
        print(f"written to {out}")
