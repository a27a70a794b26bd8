"""How many scripts a difference needs: by hand, against simulation, under the table and in the
report."""

from __future__ import annotations

import json
import math

import pytest
import torch
from test_evaluate import scored
from tiny import draw

from kvpo.evaluation.evaluate import compare, enough_scripts
from kvpo.evaluation.power import scripts_needed, sentence, spread
from kvpo.report.evaluation import tables
from kvpo.report.read_run import read_evaluations


def test_scripts_needed_by_hand():
    """(1.95996 + 0.84162)^2 = 7.8489, so sd 0.1 takes 784.9 scripts for 0.01 and 31.4 for 0.05."""
    assert [scripts_needed(0.1, d) for d in (0.01, -0.01, 0.05)] == [785, 785, 32]
    assert scripts_needed(0.0, 0.05) == scripts_needed(0.1, 0.09) == 16, (
        "of fewer no interval is believed"
    )
    assert scripts_needed(0.1, 0.0) == scripts_needed(math.nan, 0.01) == 0


def test_four_of_five_intervals_leave_out_zero_then():
    """Of 2,000 evaluations of that many scripts with a true difference of 0.5 and spread 1: 32
    scripts."""
    n = scripts_needed(1.0, 0.5)
    x = 0.5 + draw(2000, n, seed=3, dtype=torch.float64)
    error = x.std(dim=1) / math.sqrt(n)
    found = float((x.mean(dim=1) - 1.96 * error > 0.0).double().mean())
    assert n == 32 and found == pytest.approx(0.8, abs=0.03)


def test_the_spread_comes_back_from_an_interval():
    assert spread(0.1 - 1.959964 * 0.2 / 8, 0.1 + 1.959964 * 0.2 / 8, 64) == pytest.approx(
        0.2, rel=1e-6
    )


def test_the_sentence():
    text = sentence("mean of trained", 24, 0.027, 0.13)
    assert text == (
        "mean of trained on 24 scripts, whose differences spread by 0.130: to show a difference in 4 of "
        "5 evaluations takes 182 scripts (more than these 24) for the +0.0270 found and 1327 scripts "
        "(more than these 24) for one of 0.01"
    )
    enough = sentence("VQ", 200, 0.05, 0.1)
    assert "takes 32 scripts for the +0.0500 found and 785 scripts (more than these 200)" in enough
    assert "found" not in sentence("VQ", 9, 0.0, 0.1) and sentence("VQ", 9, 0.0, math.nan) == ""


def test_under_the_table():
    """Differences .1, .3, .2: their spread is 0.1."""
    rows = compare(scored(VQ=[0.2, 0.5, 0.5]), scored(VQ=[0.1, 0.2, 0.3]), ["train"])
    assert (
        rows[0]["sd"] == pytest.approx(0.1)
        and "mean of trained on 3 scripts" in enough_scripts(rows)
        and "785 scripts (more than these 3) for one of 0.01" in enough_scripts(rows)
    )
    assert (
        enough_scripts(compare(scored(VQ=[0.2, math.nan]), scored(VQ=[0.1, 0.2]), ["train"])) == ""
    )


@pytest.mark.parametrize("noted", [True, False])
def test_in_the_report(tmp_path, noted):
    """Also of evaluations that were written before the spread was: it is worked out from their
    interval."""
    row = {
        "component": "mean of trained",
        "kind": "train",
        "a": 0.6,
        "b": 0.5,
        "diff": 0.1,
        "low": 0.1 - 1.959964 * 0.2 / 8,
        "high": 0.1 + 1.959964 * 0.2 / 8,
        "win": 0.9,
        "n": 64,
    }
    record = {
        "label_a": "ema step 3",
        "label_b": "start",
        "scripts": 64,
        "seed": 1000,
        "rows": [row | ({"sd": 0.2} if noted else {})],
    }
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / "ema-step-000003.json").write_text(json.dumps(record))
    found, problems = read_evaluations(tmp_path)
    assert (
        problems == []
        and "mean of trained on 64 scripts, whose differences spread by 0.200" in tables(found)[1]
    )
    assert "3140 scripts (more than these 64) for one of 0.01" in tables(found)[1]
