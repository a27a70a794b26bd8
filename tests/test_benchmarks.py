"""The benchmarks run, on the tiny generator: one once broke unseen when a function it calls took one more argument."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path

from kvpo.align import Alignment
from kvpo.config import load_config, recipe_path
from kvpo.progress import Progress

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


def load(name: str):
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_both_schedules_give_the_same_numbers(folder):
    schedule, config = load("schedule"), load_config(recipe_path("mini"))
    config = replace(config, pipeline=str(folder), rollout=replace(config.rollout, branches=3), kv_routing=schedule.EXPLORER)
    run = Alignment(config, Path("."), Progress())
    ours, theirs = schedule.measure(run, True), schedule.measure(run, False)
    assert ours["rollout"].plans == theirs["rollout"].plans and ours["rollout"].window == theirs["rollout"].window
    assert float((ours["rollout"].latents - theirs["rollout"].latents).abs().max()) < 1e-4
    assert float(((ours["energy"] - theirs["energy"]) / ours["energy"]).abs().max()) < 1e-4
    assert float((ours["gradient"] - theirs["gradient"]).norm() / ours["gradient"].norm()) < 1e-4
    assert 3 * ours["calls"] < theirs["calls"]


def test_calls_are_counted_as_they_are_made():
    """45 of 49 blocks are looked at, of 5 calls each, whatever the fork; and a replay of 5 window blocks for two sets of weights."""
    assert {sum(load("schedule").counted(fork).values()) for fork in (7, 20, 32)} == {5 * 45 + 10}
