"""The layout of a run's folder, read back: what a run leaves behind, as records.

    config.resolved.yaml                  every setting, defaults included
    environment.json                      versions, git commit, hardware, command
    metrics.jsonl, tensorboard/           see `kvpo.common.metrics`
    checkpoints/step-000010/              see `kvpo.policy.checkpoint`; beside them ema.safetensors
    samples/step-000010/index.json        [{"file", "script_id", "texts", "starts", "blocks", "seed", "which"}, ...]
    groups/step-000010/group.json         `group_record`, beside grid.mp4 and routing.png
    evaluation/*.json                     {"label_a", "label_b", "scripts": [id, ...], "seed", "rows": [...], "values", ...}

Readers raise `Missing` with a reason that can be shown to the user; they never change the folder.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from kvpo.evaluation.intervals import VERDICT_PAIRS


class Missing(ValueError):
    """Error for a part of the run that cannot be shown.

    Its text is the reason, a whole sentence without the full stop.
    """


@dataclass(frozen=True)
class Sample:
    """One video of fixed script and seed."""

    path: Path
    script_id: str
    texts: tuple[str, ...]
    starts: tuple[int, ...]
    """First block of every segment."""
    blocks: int | None
    """Length of the video in blocks, where recorded."""
    seed: int
    which: str
    """Weights: start, online or ema."""
    step: int


@dataclass(frozen=True)
class Group:
    """One training group: its branches, and what became of them."""

    folder: Path
    step: int
    record: Mapping[str, Any]
    """Numbers of the group, as `group_record` makes them."""


@dataclass(frozen=True)
class Row:
    """One component of an evaluation of A against B, paired over scripts and seeds."""

    component: str
    kind: str
    """train, heldout (never trained on) or guard (must not fall)."""
    a: float
    b: float
    diff: float
    """Mean of a - b."""
    low: float
    high: float
    """The difference's 95 % bootstrap interval."""
    win: float
    """Share of pairs in which A is better."""
    n: int
    better: str = "higher"
    sd: float = math.nan
    """Standard deviation of the paired differences over the scripts."""

    @property
    def verdict(self) -> str:
        """Verdict of the interval: better, worse, unclear, unmeasured or few.

        `few` = there are too few pairs for an interval to say anything.
        """
        sign = -1.0 if self.better == "lower" else 1.0
        if any(math.isnan(x) for x in (self.diff, self.low, self.high)):
            return "unmeasured"
        if self.n < VERDICT_PAIRS:
            return "few"
        if sign * self.low > 0.0 and sign * self.high > 0.0:
            return "better"
        return "worse" if sign * self.low < 0.0 and sign * self.high < 0.0 else "unclear"


@dataclass(frozen=True)
class Evaluation:
    path: Path
    label_a: str
    label_b: str
    scripts: int
    seed: int
    videos: int
    """Videos of every script, each with noise of its own."""
    rows: tuple[Row, ...]
    created: str
    command: str
    unseen: bool
    """True: the scripts were not trained on."""


def number(value: Any) -> float:
    """A number as JSON files give it: null and text that is no number are NaN."""
    try:
        return math.nan if value is None else float(value)
    except (TypeError, ValueError):
        return math.nan


def _json(path: Path, what: str) -> Any:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise Missing(f"{what}: the run has no {path.name}") from None
    except (OSError, ValueError) as error:
        raise Missing(f"{what}: {path.name} cannot be read ({error})") from None


def _steps(folder: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every step-000010 in ``folder``, ascending."""
    found = [
        (path.name.removeprefix("step-"), path) for path in folder.glob("step-*") if path.is_dir()
    ]
    return sorted((int(step), path) for step, path in found if step.isdigit())


def read_config(run: Path) -> tuple[str, Mapping[str, Any]]:
    """The resolved config: its text and its content."""
    path = run / "config.resolved.yaml"
    try:
        text = path.read_text()
        config = yaml.safe_load(text)
    except FileNotFoundError:
        raise Missing(f"the run has no {path.name}") from None
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise Missing(f"{path.name} cannot be read ({error})") from None
    return text, config if isinstance(config, dict) else {}


def read_environment(run: Path) -> Mapping[str, Any]:
    return _json(run / "environment.json", "versions and hardware are unknown")


def read_evaluations(run: Path) -> tuple[list[Evaluation], list[str]]:
    """Read the run's evaluations, newest first; returns also why files could not be used.

    Of several of the same pair (steps apart) only the newest is kept.
    """
    newest: dict[tuple[str, ...], Evaluation] = {}
    problems = []
    for path in sorted((run / "evaluation").glob("*.json")):
        try:
            evaluation = read_evaluation(path)
        except Missing as reason:
            problems.append(str(reason))
            continue
        pair = tuple(
            re.sub(r",? step \d+$", "", label) for label in (evaluation.label_a, evaluation.label_b)
        )
        if pair not in newest or newest[pair].created <= evaluation.created:
            newest[pair] = evaluation
    return sorted(newest.values(), key=lambda e: e.created, reverse=True), problems


def read_evaluation(path: Path) -> Evaluation:
    """One evaluation of A against B.  `Missing` where the file is none."""
    data = _json(path, "an evaluation is lost")
    if isinstance(data, dict) and "label" in data and "label_a" not in data:
        raise Missing(
            f"{path.name} measures one set of weights alone and is not shown; give --against to compare two"
        )
    try:
        rows = tuple(
            Row(
                str(row["component"]),
                str(row["kind"]),
                number(row.get("a")),
                number(row.get("b")),
                number(row.get("diff")),
                number(row.get("low")),
                number(row.get("high")),
                number(row.get("win")),
                int(row["n"]),
                str(row.get("better", "higher")),
                number(row.get("sd")),
            )
            for row in data["rows"]
        )
        scripts = data["scripts"]
        count = len(scripts) if isinstance(scripts, list) else int(scripts)
        # the second: runs before 2026-12
        seed = int(data["seed"] if "seed" in data else data["seeds"][0])
        words = (str(data.get("created", "")), str(data.get("command", "")))
        return Evaluation(
            path,
            str(data["label_a"]),
            str(data["label_b"]),
            count,
            seed,
            int(data.get("videos", 1)),
            rows,
            *words,
            bool(data.get("unseen", True)),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise Missing(
            f"an evaluation is lost: {path.name} does not have the expected form ({error!r})"
        ) from None


def read_samples(run: Path) -> list[Sample]:
    """All recorded videos that are still there, by step."""
    samples = [
        _sample(folder, step, entry)
        for step, folder in _steps(run / "samples")
        for entry in _index(folder)
    ]
    samples = [sample for sample in samples if sample.path.is_file()]
    if not samples:
        raise Missing(
            "no sample videos: the run has no samples/step-*/index.json that names a video still there"
        )
    return samples


def _index(folder: Path) -> list[Any]:
    return (
        _json(folder / "index.json", f"samples of {folder.name} are lost")
        if (folder / "index.json").exists()
        else []
    )


def _sample(folder: Path, step: int, entry: Any) -> Sample:
    try:
        blocks = int(entry["blocks"]) if entry.get("blocks") else None
        return Sample(
            folder / entry["file"],
            str(entry["script_id"]),
            tuple(entry["texts"]),
            tuple(map(int, entry["starts"])),
            blocks,
            int(entry["seed"]),
            str(entry["which"]),
            step,
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise Missing(
            f"samples of {folder.name} are lost: index.json does not have the expected form ({error!r})"
        ) from None


def read_group(run: Path) -> Group:
    """The last group that was recorded."""
    steps = [
        (step, folder)
        for step, folder in _steps(run / "groups")
        if (folder / "group.json").exists()
    ]
    if not steps:
        raise Missing("no group was recorded: the run has no groups/step-*/group.json")
    step, folder = steps[-1]
    return Group(folder, step, _json(folder / "group.json", "the group is lost"))
