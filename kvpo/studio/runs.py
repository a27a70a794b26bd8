"""The folders of runs, read while they are trained: a list, curves, the report; files only.

Nothing here asks a process. What a run has logged is read on from where the last look ended, so a
look at a long run takes no longer than one at a short one.
"""

from __future__ import annotations

import functools
import json
import math
import re
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvpo.common.files import in_words
from kvpo.common.metrics import declaration, pick
from kvpo.evaluation.intervals import TOTAL
from kvpo.report.curves import series
from kvpo.report.read_run import Missing, read_config
from kvpo.studio.library import no_link

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:+=,-]{0,127}")
"""Names of run folders that are served; none of them leads to another folder."""
MOST_RUNS = 200
MOST_POINTS = 400
"""Points of a line; of a longer run every second, third, ... is shown, and the last one."""
LONGEST_LINE = 2**20
"""Bytes of a record, and of the settings; what is longer was not written by a run."""
CHARTS: Mapping[str, str] = {
    "Reward of the explored window": "reward/local/{component}/mean",
    "Evaluation, difference from the start": "eval/ema/{component}/diff",
    "KL to the start weights": "loss/kl",
    "Gradient norm": "optim/grad_norm",
    "Drift from the start weights": "optim/drift",
    "Seconds of a step": "time/total",
}
"""Title of a chart -> the metrics in it."""


def check_run_name(name: object) -> str:
    """Return the name of a run's folder.  ValueError for one that could lead elsewhere."""
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise ValueError(
            f"{str(name)[:80]!r} is no name of a run; choose one of the list, the folders right under --runs"
        )
    return name


@dataclass
class Followed:
    """A log of metrics that is read on from where the last look ended."""

    path: Path
    offset: int = 0
    identity: tuple[int, int] = (0, 0)
    records: list[dict[str, float]] = field(default_factory=list)
    """The metrics that are shown of each line, and its step."""

    def look(self) -> list[dict[str, float]]:
        """Read what was written since; all over again where a resumed run has cut its log."""
        facts = no_link(self.path).stat()
        identity = (facts.st_dev, facts.st_ino)
        if identity != self.identity or facts.st_size < self.offset:
            self.offset, self.identity, self.records = 0, identity, []
        with self.path.open("rb") as file:
            file.seek(self.offset)
            while (line := file.readline(LONGEST_LINE)).endswith(b"\n"):
                self.offset += len(line)
                if (record := shown_part(line)) is not None:
                    self.records.append(record)
        return self.records


def shown_part(line: bytes) -> dict[str, float] | None:
    """Metrics of a line that charts show, and its step; None of a line that is no record."""
    try:
        found = {name: float(value) for name, value in json.loads(line).items()}
        step = int(found["step"])
    except (ValueError, TypeError, AttributeError, KeyError, OverflowError, RecursionError):
        return None
    kept = {name: value for name, value in found.items() if is_shown(name)}
    return {"step": step, **kept}


@functools.lru_cache(4096)
def is_shown(name: str) -> bool:
    """Whether a chart shows a metric."""
    return any(pick({name: 0.0}, pattern) for pattern in CHARTS.values())


def thinned(steps: Sequence[float], values: Sequence[float]) -> list[list[float | None]]:
    """Points [step, value] for the page; a value that is no number is None."""
    stride = -(-len(steps) // MOST_POINTS)
    picked = [*range(0, len(steps), stride or 1)]
    if picked and picked[-1] != len(steps) - 1:
        picked.append(len(steps) - 1)
    return [[steps[i], values[i] if math.isfinite(values[i]) else None] for i in picked]


class Runs:
    """The folders right under one folder."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._followed: dict[str, Followed] = {}
        self._configs: dict[Path, tuple[float, Mapping[str, Any]]] = {}
        self._lock = threading.Lock()

    def path(self, name: str) -> Path:
        """Folder of a run.  ValueError where there is none of that name, or a link has it."""
        path = no_link(self.folder / check_run_name(name))
        if not is_run_folder(path):
            raise ValueError(
                f"there is no run {name} in {self.folder.name}; choose one of the list"
            )
        return path

    def report(self, name: str) -> Path:
        """File of a run's report.  ValueError where it has none yet."""
        path = no_link(self.path(name) / "report.html")
        if not path.is_file():
            raise ValueError(
                f"{name} has no report yet: it is written at the end; let the run end, or write it by `kvpo report`"
            )
        return path

    def names(self) -> list[str]:
        """Names of the runs, the latest written first."""
        if not self.folder.is_dir():
            return []
        found = [
            (_written(path), path.name)
            for path in self.folder.iterdir()
            if NAME.fullmatch(path.name) and not path.is_symlink() and is_run_folder(path)
        ]
        return [name for _, name in sorted(found, reverse=True)[:MOST_RUNS]]

    def listed(self) -> list[dict[str, Any]]:
        """Facts of all runs for the list; of one that can not be read its name and the reason."""
        found = []
        for name in self.names():
            try:
                found.append(self.facts(name))
            except (ValueError, OSError) as error:
                found.append({"name": name, "fault": in_words(error)})
        return found

    def facts(self, name: str) -> dict[str, Any]:
        """Describe how far a run is, what it is, and how long ago it wrote."""
        path = self.path(name)
        config, records = self._config(path), self.records(name)
        objective, rewards = config.get("objective"), config.get("rewards")
        kind = objective.get("kind", "tve_ppo") if isinstance(objective, dict) else "tve_ppo"
        return {
            "name": name,
            "step": max((int(record["step"]) + 1 for record in records), default=0),
            "steps": config.get("steps") if type(config.get("steps")) is int else None,
            "method": f"{kind} by {config.get('explorer', 'kv_routing')}"[:60],
            "rewards": [
                str(entry.get("name", "")).rpartition("/")[2][:60]
                for entry in (rewards if isinstance(rewards, list) else ())
                if isinstance(entry, dict) and entry.get("role", "train") == "train"
            ],
            "seconds_ago": max(0, round(time.time() - _written(path))),
            "report": (path / "report.html").is_file(),
        }

    def records(self, name: str) -> list[dict[str, float]]:
        path = self.path(name) / "metrics.jsonl"
        if not path.is_file():
            return []
        with self._lock:  # two tabs may look at once
            return list(self._followed.setdefault(name, Followed(path)).look())

    def curves(self, name: str) -> dict[str, Any]:
        """Facts of a run, and its charts: title, unit, lines of points [step, value]."""
        records = self.records(name)
        charts = []
        for title, pattern in CHARTS.items():
            lines = [
                {"label": label, "points": thinned(steps, values)}
                for label, (steps, values) in series(records, pattern).items()
            ]
            charts += _charts(title, _unit(pattern), lines)
        return self.facts(name) | {"charts": charts}

    def _config(self, path: Path) -> Mapping[str, Any]:
        """Settings of a run; none where they can not be read."""
        file = path / "config.resolved.yaml"
        if file.is_symlink() or not file.is_file() or file.stat().st_size > LONGEST_LINE:
            return {}
        at = file.stat().st_mtime
        known = self._configs.get(path)
        if known is None or known[0] != at:
            try:
                self._configs[path] = (at, read_config(path)[1])
            except Missing:
                self._configs[path] = (at, {})
        return self._configs[path][1]


def _charts(title: str, unit: str, lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Charts of a title; preferences, and a mean they are in, have one of their own.

    They are log odds, beside which rewards in [0, 1] would be a flat line.
    """
    odds = [line for line in lines if line["label"].startswith("preference-")]
    if odds:
        odds += [line for line in lines if line["label"] == TOTAL.replace(" ", "_")]
    parts = {title: [line for line in lines if line not in odds], f"{title}: preference": odds}
    units = {title: unit, f"{title}: preference": "log odds"}
    return [{"title": t, "unit": units[t], "lines": part} for t, part in parts.items() if part]


def is_run_folder(path: Path) -> bool:
    """Whether `kvpo align` made a folder, or is about to."""
    return path.is_dir() and any(
        (path / name).is_file() for name in ("config.resolved.yaml", "metrics.jsonl")
    )


def _written(path: Path) -> float:
    files = (path / "metrics.jsonl", path / "config.resolved.yaml")
    return max((file.stat().st_mtime for file in files if file.is_file()), default=0.0)


def _unit(pattern: str) -> str:
    unit = declaration(pattern.replace("{component}", "x")).unit
    return "" if unit == "its own" else unit
