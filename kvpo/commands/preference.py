"""`kvpo preference`: from choices made in the studio to a reward, and what that reward is worth."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from kvpo.commands.options import Positional
from kvpo.common.environment import command, git_commit, packages, pick_device
from kvpo.common.files import must_be_new, try_folder
from kvpo.common.progress import Progress

if TYPE_CHECKING:
    from kvpo.preference.saved import Saved

STRONGEST = 6
"""Features that are listed, of those with the largest weights."""


@dataclass(frozen=True)
class Fit:
    """Fit a preference model to the answers of a studio; it becomes a reward, preference:OUT."""

    folder: Positional[Path]
    """Folder of a studio (`kvpo studio --out`), with preferences.jsonl in it."""
    out: Path
    """Folder of the result, a new one; the reward is preference:OUT."""
    features: tuple[str, ...] = ()
    """Feature sets to choose from: frames, which is always one, classic, efficientnet.
    Default: all whose packages are installed."""
    seed: int = 0
    """Seed of the parts of the cross-validation."""
    device: str = "auto"

    def __call__(self) -> None:
        must_be_new(self.out)
        try_folder(self.out.parent)
        from kvpo.preference.features import at_hand, make_sets
        from kvpo.preference.fit import check_amount, fit_answers
        from kvpo.preference.records import read_records
        from kvpo.preference.saved import read, save

        progress, records = Progress(), read_records(self.folder)
        for sentence in records.words():
            progress.warn(f"warning: {sentence}")
        check_amount(records.answers)
        sets = make_sets(list(dict.fromkeys(("frames", *(self.features or at_hand())))))
        device = pick_device(self.device)
        for features in sets.values():
            features.load(device)
        fitted = fit_answers(records, sets, self.seed, progress)
        save(
            self.out,
            fitted,
            {
                "folder": str(self.folder.resolve().name),
                "raters": sorted({answer.rater for answer in records.answers}),
                "generators": sorted({answer.generator for answer in records.answers}),
                "passed_over": records.words(),
                "candidates": list(sets),
                "seed": self.seed,
                "commit": git_commit(),
                "kvpo": packages()["kvpo"],
                "command": command(),
            },
        )
        for line in described(read(self.out)):
            progress.say(line)
        progress.say(f"written to {self.out}; a recipe names it preference:{self.out}")


@dataclass(frozen=True)
class Show:
    """Show what a fitted preference looks at and what it is worth."""

    folder: Positional[Path]
    """Folder that `kvpo preference fit` wrote."""

    def __call__(self) -> None:
        from kvpo.preference.saved import read

        for line in described(read(self.folder)):
            print(line)


@dataclass(frozen=True)
class Preference:
    """Preferences: a reward fitted to choices made in the studio, and what it is worth."""

    do: Annotated[Fit | Show, tyro.conf.OmitSubcommandPrefixes]

    def __call__(self) -> None:
        self.do()


def described(saved: Saved) -> list[str]:
    """Describe a preference in lines: its features, and its held-out numbers."""
    found, strongest = saved.about["numbers"], _strongest(saved)
    low, high = found["interval"]
    lines = [
        f"features      {', '.join(saved.sets)} ({len(saved.names)}), strength {saved.about['strength']:g}",
        f"strongest     {'  '.join(f'{name} {weight:+.2f}' for name, weight in strongest)}",
        f"answers       {found['answers']} ({found['ties']} ties) in {found['stories']} stories",
        f"accuracy      {found['accuracy']:.1%} of {found['judged']} answers in unseen stories, 95 % interval {low:.1%} to {high:.1%}",
        f"log loss      {found['log_loss']:.3f} nats; chance is {found['chance_log_loss']:.3f}",
        "certainty     " + "  ".join(filter(None, map(_bin, found["bins"]))),
        "spoilt copies "
        + ", ".join(f"{n} loses to {s:.0%}" for n, s in found["spoilt_won"].items()),
    ]
    return lines + _of_raters(found)


def _strongest(saved: Saved) -> list[tuple[str, float]]:
    pairs = zip(saved.names, saved.weights.tolist())
    return sorted(pairs, key=lambda pair: -abs(pair[1]))[:STRONGEST]


def _bin(row: Mapping[str, Any]) -> str:
    """One bin: how sure the model was, how often it was right, of how many."""
    n = row["comparisons"]
    return f"{row['sure']:.0%} sure: {row['right']:.0%} right of {n}" if n else ""


def _of_raters(found: Mapping[str, Any]) -> list[str]:
    """Lines about the raters, where there are several."""
    if len(found["by_rater"]) < 2:
        return []
    each = (
        f"{name} {row['accuracy']:.0%} of {row['answers']}"
        for name, row in found["by_rater"].items()
    )
    both = found["agreement"]
    shared = (
        f"{both['same']:.0%} of {both['compared']} answers to the same pairs agree"
        if both["compared"]
        else "they answered no pair in common"
    )
    return [f"raters        {', '.join(each)}; {shared}"]
