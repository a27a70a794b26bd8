"""Metrics: declared once, logged whole or not at all, readable after any kill."""

from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path

import pytest
import torch

from kvpo.common import metrics
from kvpo.common.metric_log import MetricLog, read_metrics, truncate_after
from kvpo.common.metrics import DECLARED, console_line, declaration, pick, render_docs
from kvpo.method.advantages import Advantages
from kvpo.method.loss import ClippedObjective
from kvpo.types import RewardTable


def examples(pattern: str) -> list[str]:
    """Names that the pattern declares, one for every choice of its first placeholder."""
    name = pattern.replace("{component}", "VQ")
    found = re.search(r"\{(\w+)\}", name)
    return (
        [name.replace(found[0], value) for value in metrics.PLACEHOLDERS[found[1]]]
        if found
        else [name]
    )


def test_docs_are_what_the_declarations_say():
    committed = Path(__file__).parents[2] / "docs/metrics.md"
    assert committed.read_text() == render_docs(), (
        "docs/metrics.md is out of date: python -m kvpo.common.metrics > docs/metrics.md"
    )


def test_every_name_has_exactly_one_declaration():
    for metric in DECLARED:
        assert (
            metric.meaning.endswith(".")
            and metric.unit
            and metric.better in ("higher", "lower", "")
        )
        for name in examples(metric.pattern):
            assert [m for m in DECLARED if metrics._regex(m.pattern).fullmatch(name)] == [metric]


def test_stages_log_declared_names_only():
    table = RewardTable(
        ("VQ", "TA"),
        torch.rand(2, 5).double(),
        torch.rand(2, 5).double(),
        torch.ones(5, dtype=torch.bool),
    )
    logits = torch.linspace(0.0, 1.0, 4)
    loss = ClippedObjective()(logits, logits, None, torch.tensor([1.0, -1.0, 0.5, -0.5]))
    for name in (*Advantages()(table).metrics, *loss.metrics):
        declaration(name)


@pytest.mark.parametrize(
    "name",
    [
        "loss/klx",
        "reward/lokal/VQ/mean",
        "time/replay",
        "reward/local/V Q/mean",
        "eval/ema/VQ/median",
        "kl",
        "",
        "reward/local//mean",
    ],
)
def test_undeclared_name_is_an_error_and_writes_nothing(tmp_path, name):
    with (
        MetricLog(tmp_path) as log,
        pytest.raises(ValueError, match="is not declared"),
    ):
        log.write(0, {"loss/kl": 0.0, name: 1.0})
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_misspelling_names_the_nearest():
    with pytest.raises(ValueError, match="nearest: optim/grad_norm"):
        declaration("optim/gradnorm")


def test_numbers_come_back(tmp_path):
    with MetricLog(tmp_path) as log:
        log.write(
            0,
            {
                "loss/kl": math.nan,
                "loss/policy": math.inf,
                "loss/weight": -math.inf,
                "energy/mean": torch.tensor(0.1, dtype=torch.float64),
            },
        )
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    strict = json.loads(
        line, parse_constant=lambda constant: pytest.fail(f"{constant} is not JSON")
    )
    assert (
        strict["loss/kl"] == "NaN"
        and strict["loss/weight"] == "-Infinity"
        and list(strict)[:2] == ["step", "unix_time"]
    )
    (record,) = read_metrics(tmp_path / "metrics.jsonl")
    assert (
        math.isnan(record["loss/kl"])
        and record["loss/policy"] == math.inf
        and record["energy/mean"] == 0.1
        and record["step"] == 0
    )


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_torn_last_line_is_left_out_and_repaired(tmp_path, cut):
    """kill -9 while a line was written: readers see the lines before it, and a resumed run does
    not glue its own to it."""
    path = tmp_path / "metrics.jsonl"
    with MetricLog(tmp_path) as log:
        for step in range(3):
            log.write(step, {"loss/kl": step})
    os.truncate(path, path.stat().st_size - cut)
    assert [r["step"] for r in read_metrics(path)] == [0, 1]
    with MetricLog(tmp_path, resume_after=5) as log:
        log.write(2, {"loss/kl": 9.0})
    assert [r["loss/kl"] for r in read_metrics(path)] == [0.0, 1.0, 9.0]


@pytest.mark.parametrize(
    "after, left", [(-1, []), (0, [0]), (1, [0, 1, 1]), (2, [0, 1, 1, 2]), (9, [0, 1, 1, 2])]
)
def test_truncate_after_keeps_whole_steps(tmp_path, after, left):
    path = tmp_path / "metrics.jsonl"
    with MetricLog(tmp_path) as log:
        for step in (0, 1, 1, 2):
            log.write(step, {"loss/kl": 0.0})
    truncate_after(path, after)
    truncate_after(path, after)  # resuming twice changes nothing
    assert [r["step"] for r in read_metrics(path)] == left
    truncate_after(tmp_path / "absent.jsonl", 3)


def test_new_run_does_not_append_to_an_old_one(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n')
    with pytest.raises(ValueError, match="already holds a run"):
        MetricLog(tmp_path)


def test_damaged_line_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n{"step": \n{"step": 2}\n')
    with pytest.raises(ValueError, match="line 2 is not a metrics record"):
        read_metrics(tmp_path / "metrics.jsonl")


def test_full_disk_leaves_no_half_line(tmp_path, monkeypatch):
    log = MetricLog(tmp_path)
    log.write(0, {"loss/kl": 0.0})
    before, write = (tmp_path / "metrics.jsonl").read_bytes(), os.write
    monkeypatch.setattr(os, "write", lambda file, data: write(file, data[:10]))
    with pytest.raises(OSError, match="free disk space, then go on with --resume"):
        log.write(1, {"loss/kl": 0.0})
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    monkeypatch.undo()
    log.close()


def test_console_line_shows_the_main_metrics():
    values = {
        "reward/local/VQ/mean": 0.8124,
        "reward/local/TA/mean": torch.tensor(0.5),
        "loss/clip_fraction": 0.125,
        "time/total": 9.06,
        "loss/weight": 1.0,
    }
    assert console_line(3, values, 60) == "step 3/60  VQ 0.812  TA 0.500  clip 12%  seconds 9.1"
    assert console_line(0, {}) == "step 0"


def test_every_console_pattern_is_declared():
    assert {pattern.replace("local", "{signal}") for pattern, _, _ in metrics.CONSOLE} <= {
        m.pattern for m in DECLARED
    } | {"time/total"}


def test_pick_keys_by_placeholder():
    values = {"eval/ema/VQ/mean": 1.0, "eval/start/VQ/mean": 2.0, "eval/ema/VQ/diff": 3.0}
    assert pick(values, "eval/{weights}/{component}/mean") == {"ema/VQ": 1.0, "start/VQ": 2.0}
