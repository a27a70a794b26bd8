"""Every objective from the command line: a run to its end where the pair is legal, else an error."""

from __future__ import annotations

import itertools
import json

import pytest
from test_align import align, settings, write_recipe

from kvpo.method.objectives.kinds import OBJECTIVES

EXPLORERS = ("kv_routing", "start_noise", "renoise", "sde", "best_of", "prompt")
LEGAL = {
    "tve_ppo": ("kv_routing", "prompt"),
    "regression": ("kv_routing", "prompt"),
    "nft": EXPLORERS,
    "rvm": EXPLORERS,
    "kernel_grpo": ("renoise", "best_of"),
    "sde_grpo": ("sde",),
    "denoised_distance": tuple(e for e in EXPLORERS if e != "best_of"),
}
"""The table of docs/methods.md."""
SHORT = ("--rollout.branches", "2")


def pair_of(kind: str, explorer: str) -> tuple[str, ...]:
    """Options of a pair, with the sampler that its explorer needs."""
    sampler = "ode" if explorer == "sde" else "renoise"
    stories = ("--data.segments", "2") if explorer == "prompt" else ()
    return ("--objective.kind", kind, "--explorer", explorer, "--sampler", sampler, *stories)


def test_every_objective_has_its_pairs():
    assert set(LEGAL) == set(OBJECTIVES)


@pytest.mark.parametrize(
    ("kind", "explorer"),
    [
        pytest.param("tve_ppo", "kv_routing", marks=pytest.mark.slow),
        pytest.param("regression", "kv_routing", marks=pytest.mark.slow),
        pytest.param("tve_ppo", "prompt", marks=pytest.mark.slow),
        ("nft", "start_noise"),
        pytest.param("rvm", "renoise", marks=pytest.mark.slow),
        pytest.param("rvm", "best_of", marks=pytest.mark.slow),
        pytest.param("kernel_grpo", "renoise", marks=pytest.mark.slow),
        pytest.param("sde_grpo", "sde", marks=pytest.mark.slow),
        pytest.param("denoised_distance", "start_noise", marks=pytest.mark.slow),
    ],
)
def test_a_run_by_every_objective_ends_whole(folder, tmp_path, kind, explorer):
    """It has its log, report and evaluation, and goes on with --resume."""
    recipe = write_recipe(tmp_path / "r.yaml", settings(folder, trackers=[]))
    out = tmp_path / "run"
    pair = pair_of(kind, explorer)
    assert align(recipe, out, *SHORT, *pair, "--steps", "2") == 0
    assert align(recipe, out, *SHORT, *pair, "--resume", "--steps", "3") == 0
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in lines if "loss/policy" in r] == [0, 1, 2]
    assert (out / "report.html").stat().st_size > 10_000
    assert (out / "evaluation/ema-step-000003.json").is_file()


ILLEGAL = [
    pair for pair in itertools.product(OBJECTIVES, EXPLORERS) if pair[1] not in LEGAL[pair[0]]
]


@pytest.mark.parametrize(("kind", "explorer"), ILLEGAL)
def test_an_illegal_pair_is_one_error_before_any_work(capsys, tmp_path, kind, explorer):
    recipe = write_recipe(tmp_path / "r.yaml", settings(tmp_path / "no generator"))
    pair = pair_of(kind, explorer)
    assert align(recipe, tmp_path / "run", *pair) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert f"objective {kind} can not be paired with explorer {explorer}" in line
    assert "docs/methods.md" in line and not (tmp_path / "run").exists()
