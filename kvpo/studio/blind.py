"""A blind comparison of a run's start and trained weights, answered in the studio by one person.

key.json, page/     what `kvpo ab` wrote: the pairs of videos, of equal noise, and whose side is whose
about.json          the run, its preference, and whose choices that was fitted to
answers.json        the answers in the order in which they were given; when all are, the win rate

The page never learns which video is whose: pairs are asked in an order of their own, some of them
turned round, and the result is told when the last one is answered.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from kvpo.common.files import refusals, write_atomic
from kvpo.common.rng import stream
from kvpo.evaluation.ab_answers import read_key, wilson
from kvpo.studio.library import check_name, no_link

SIDES = ("left", "right")
ANSWERS = (*SIDES, "same")
WON = {"trained": 1.0, "start": 0.0, "same": 0.5}
"""Share of a win that an answer gives to the trained weights."""


class Blind:
    """One comparison in its folder."""

    def __init__(self, folder: Path):
        self.folder = no_link(folder)

    @property
    def ready(self) -> bool:
        """Whether all videos are there; the page of `kvpo ab` is written last."""
        return (self.folder / "page" / "index.html").is_file()

    def begin(self, run: str, taste: str, raters: Sequence[str]) -> None:
        """Write what is compared, and who may answer."""
        self._write("about.json", {"run": run, "preference": taste, "raters": list(raters)})

    def about(self) -> dict[str, Any]:
        return self._read("about.json", {"run": "", "preference": "", "raters": []})

    def pairs(self) -> list[Mapping[str, Any]]:
        """Pairs as the key has them.  ValueError where the videos are not all there."""
        if not self.ready:
            raise ValueError("the videos are not all there; let the comparison be made first")
        return read_key(no_link(self.folder / "key.json"))["pairs"]

    def shown(self, place: int) -> tuple[int, bool]:
        """(number of the pair that is asked at a place, whether its sides are turned round).

        Drawn from the stream (seed, "studio", "blind"). ValueError for a place that is none.
        """
        pairs = self.pairs()
        if type(place) is not int or place not in range(len(pairs)):
            raise ValueError(f"there is no pair {place!r}; choose one of 0 to {len(pairs) - 1}")
        draws = stream(int(pairs[0].get("seed", 0)), "studio", "blind")
        order = torch.randperm(len(pairs), generator=draws)
        turned = torch.randint(2, (len(pairs),), generator=draws)
        return int(order[place]), bool(turned[place])

    def video(self, place: int, side: str) -> Path:
        """File that is shown on a side at a place."""
        if side not in SIDES:
            raise ValueError(f"{side[:20]!r} is no side; ask for left or right")
        pair, turned = self.shown(place)
        there = SIDES[SIDES.index(side) ^ turned]
        return no_link(no_link(self.folder / "page") / f"{pair:03d}-{there}.mp4")

    # --- Answers ---

    def answers(self) -> list[dict[str, Any]]:
        """Answers so far.  ValueError where the file holds something else."""
        given = self._read("answers.json", {"answers": []})["answers"]
        if not all(map(_is_answer, given)):
            raise ValueError(f"answers.json of {self.folder.name} holds no answers; compare again")
        return given

    def answer(self, place: int, answer: str, rater: str) -> None:
        """Record which side is better, ``left``, ``right`` or ``same``.

        Raises ValueError for another pair than the next one, and for another person than those
        whose choices were learnt or who answered before.
        """
        given, about = self.answers(), self.about()
        pair, turned = self.shown(place)
        if place != len(given):
            raise ValueError(f"pair {place + 1} is not the next one; reload the page")
        if answer not in ANSWERS:
            raise ValueError(f"{str(answer)[:20]!r} is no answer; give one of {', '.join(ANSWERS)}")
        asked = [given[0]["rater"]] if given else [str(name) for name in about["raters"]]
        if asked and rater not in asked:
            raise ValueError(
                f"this comparison is for {', '.join(asked)}, whose choices were learnt, and not for {rater!r}; correct the label under “You choose as”"
            )
        given.append(
            {
                "pair": pair,
                "answer": answer,
                "better": self._better(pair, turned, answer),
                "rater": rater,
                "time": datetime.now(UTC).isoformat(timespec="seconds"),
            }
        )
        whole = len(given) == len(self.pairs())
        self._write("answers.json", about | {"answers": given, "result": result(given, whole)})

    def _better(self, pair: int, turned: bool, answer: str) -> str:
        if answer == "same":
            return "same"
        owner_of_left = self.pairs()[pair]["left"]
        left = (answer == "left") != turned
        return "trained" if left == (owner_of_left == "a") else "start"

    def state(self) -> dict[str, Any]:
        """Describe the comparison to the page: how far it is, and at its end the result."""
        ready = self.ready
        count, given = (len(self.pairs()) if ready else 0), self.answers()
        facts = {"name": self.folder.name, "ready": ready, "pairs": count, "answered": len(given)}
        whole = ready and len(given) >= count
        return facts | {"run": self.about()["run"], "result": result(given, whole)}

    # --- Files ---

    def _write(self, name: str, content: Mapping[str, Any]) -> None:
        path = no_link(self.folder / name)
        with refusals(path, "nothing was recorded; free disk space and answer again"):
            write_atomic(path, json.dumps(content, indent=1) + "\n")

    def _read(self, name: str, otherwise: dict[str, Any]) -> dict[str, Any]:
        path = no_link(self.folder / name)
        if not path.is_file():
            return otherwise
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            if isinstance(found, dict) and {type(found[k]) for k in otherwise} <= {str, list}:
                return found
        except (ValueError, KeyError, RecursionError):
            pass
        raise ValueError(f"{path.name} of {self.folder.name} can not be read; compare again")


def _is_answer(value: object) -> bool:
    if not isinstance(value, dict) or not isinstance(value.get("rater"), str):
        return False
    better = value.get("better")
    return isinstance(better, str) and better in WON


def result(given: Sequence[Mapping[str, Any]], whole: bool) -> dict[str, Any] | None:
    """Win rate of the trained weights, ties half, with Wilson's 95 % interval; None before the end."""
    if not whole or not given:
        return None
    counts = {name: sum(answer["better"] == name for answer in given) for name in WON}
    share = sum(WON[answer["better"]] for answer in given) / len(given)
    return {
        "answers": len(given),
        **counts,
        "win_rate": share,
        "interval": wilson(share, len(given)),
    }


def comparison(folder: Path, name: str) -> Blind:
    """A comparison of a studio's folder by its name.  ValueError for a name that leads elsewhere."""
    return Blind(no_link(folder / "blind") / check_name(name))
