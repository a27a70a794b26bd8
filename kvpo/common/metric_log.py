"""The log of a run's metrics, `metrics.jsonl`: one line a step, readable after any kill."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from kvpo.common.metrics import declaration

if TYPE_CHECKING:
    from kvpo.common.trackers import Trackers


class MetricLog:
    """Log of a run's metrics, one line and one flush a step.

    It appends to ``folder/metrics.jsonl``, and tells the run's trackers.

    A line is ``{"step": 3, "unix_time": 1.7e9, "loss/kl": 0.01, ...}``. JSON has no NaN or
    infinity: they are written as the strings "NaN", "Infinity", "-Infinity", which `read_metrics`
    turns back into numbers.
    """

    def __init__(
        self, folder: Path, resume_after: int | None = None, trackers: Trackers | None = None
    ):
        """Open the log of a run; ``trackers`` are closed with it.

        ``resume_after``: the last step to keep (-1: none); None = a new run. Raises ValueError if a
        new run's log is there already.
        """
        self.path = Path(folder) / "metrics.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if resume_after is not None:
            truncate_after(self.path, resume_after)
        elif self.path.exists() and self.path.stat().st_size:
            raise ValueError(
                f"{self.path} already holds a run; resume that run, or choose another folder"
            )
        self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        self._trackers = trackers

    def write(
        self, step: int, values: Mapping[str, float], videos: Mapping[str, Path] | None = None
    ) -> None:
        """Log ``values`` (numbers or one-element tensors) of a step.

        ``videos``: files that trackers show, by name.

        Raises ValueError for an undeclared name: nothing is written then.
        """
        for name in values:
            declaration(name)
        numbers = {name: float(value) for name, value in values.items()}
        record = {"step": step, "unix_time": round(time.time(), 3)} | {
            name: _to_json(number) for name, number in numbers.items()
        }
        _append(self._file, json.dumps(record, allow_nan=False).encode() + b"\n", self.path)
        if self._trackers is not None:
            self._trackers.write(step, numbers)
            self._trackers.show(step, videos or {})

    def close(self) -> None:
        os.close(self._file)
        if self._trackers is not None:
            self._trackers.close()

    def __enter__(self) -> MetricLog:
        return self

    def __exit__(self, *_) -> None:
        self.close()


class NoLog:
    """Log of the ranks that do not write."""

    def write(
        self, step: int, values: Mapping[str, float], videos: Mapping[str, Path] | None = None
    ) -> None: ...

    def __enter__(self) -> NoLog:
        return self

    def __exit__(self, *_) -> None: ...


def _append(file: int, line: bytes, path: Path) -> None:
    """All of ``line``, or, where the disk refuses, none of it and an OSError."""
    start = os.fstat(file).st_size
    try:
        written = os.write(file, line)
        if written != len(line):
            raise OSError(
                f"{path}: only {written} of {len(line)} bytes could be written; free disk space, then go on with --resume"
            )
    except OSError:
        os.ftruncate(file, start)
        raise


def _to_json(number: float) -> float | str:
    if math.isfinite(number):
        return number
    return "NaN" if math.isnan(number) else "Infinity" if number > 0 else "-Infinity"


def _lines(path: Path):
    """Yield (offset in bytes, record) of every whole line.

    A last line without its newline was torn by a kill: it is left out.
    """
    offset = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                return
            try:
                record = {name: float(value) for name, value in json.loads(line).items()}
                record["step"] = int(record["step"])
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(
                    f"{path} line {number} is not a metrics record ({error}); mend or delete that line"
                ) from None
            yield offset, record
            offset += len(line)


def read_metrics(path: Path) -> list[dict[str, float]]:
    """All records in the order written; several may share a step.

    [] if the file is missing. Raises ValueError if it is damaged.
    """
    return [record for _, record in _lines(path)] if path.exists() else []


def truncate_after(path: Path, step: int) -> None:
    """Cut a torn last line, and everything from the first record of a later step on.

    A resumed run logs those again.
    """
    if not path.exists():
        return
    keep = whole = 0
    with path.open("rb") as file:
        whole = file.read().rfind(b"\n") + 1
    keep = next((offset for offset, record in _lines(path) if record["step"] > step), whole)
    os.truncate(path, keep)
