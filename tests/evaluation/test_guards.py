"""Guards against rewards that are gamed: conflicts between them, Goodhart's stop."""

from __future__ import annotations

import json

import pytest
import torch
from test_align import align, settings, write_recipe

from kvpo.common.metric_log import read_metrics
from kvpo.evaluation.goodhart import held_out_score, history, judge
from kvpo.evaluation.sentinels import BAD, Look, SentinelConfig
from kvpo.evaluation.sentinels import judge as judge_sentinels
from kvpo.method.advantages import conflicts, ranks, spearman
from kvpo.policy.checkpoint import checkpoints
from kvpo.rewards.classic.watched import longest_run, watched
from kvpo.runs.loading import load_generator


def tensor(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


# --- Conflicts ---


def test_ranks_share_ties():
    assert ranks(torch.tensor([5.0, 1.0, 5.0, 9.0])).tolist() == [1.5, 0.0, 1.5, 3.0]


def test_spearman_by_hand():
    """Ranks 0 1 2 3 against 0 2 1 3: 1 - 6 * 2 / (4 * 15) = 0.8; monotone functions do not
    matter."""
    a, b = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([1.0, 30.0, 20.0, 999.0])
    assert (
        spearman(a, b) == pytest.approx(0.8)
        and spearman(a, -b) == pytest.approx(-0.8)
        and spearman(a, a.exp()) == pytest.approx(1.0)
    )
    assert spearman(a, torch.ones(4)) != spearman(a, torch.ones(4)), "constant: NaN"


def test_conflicts_by_hand():
    """VQ and MQ lie on opposite sides of the anchor in two of four branches; TA says nothing."""
    A_KG = tensor([1.0, -1.0, 2.0, -2.0], [2.0, 1.0, -1.0, -3.0], [0.0, 0.0, 0.0, 0.0])
    metrics = conflicts(("VQ", "MQ", "TA"), A_KG)
    assert metrics["conflict/VQ-MQ/sign"] == 0.5 and metrics[
        "conflict/VQ-MQ/rank"
    ] == pytest.approx(0.4)
    assert metrics["conflict/VQ-TA/sign"] == 0.0 and "conflict/VQ-TA/rank" not in metrics
    assert [metrics[f"conflict/{name}/flat"] for name in ("VQ", "MQ", "TA")] == [0.0, 0.0, 1.0]


# --- Goodhart's stop ---


def rows(trained: tuple[float, float], **held_out: tuple[float, float]) -> list[dict]:
    """Intervals of the trained mean and of the held-out evaluators."""

    def row(name, kind, low, high):
        return {
            "component": name,
            "kind": kind,
            "diff": (low + high) / 2,
            "low": low,
            "high": high,
            "n": 64,
        }

    return [
        row("mean of trained", "train", *trained),
        *(row(name, "heldout", *interval) for name, interval in held_out.items()),
    ]


UP, DOWN, FLAT = (0.01, 0.03), (-0.03, -0.01), (-0.01, 0.02)


@pytest.mark.parametrize(
    ("evaluations", "fallen"),
    [
        ([rows(UP, identity=DOWN), rows(UP, identity=DOWN)], ("identity",)),
        ([rows(UP, identity=DOWN)], ()),
        ([rows(UP, identity=DOWN), rows(UP, identity=FLAT)], ()),
        ([rows(UP, identity=DOWN), rows(FLAT, identity=DOWN)], ()),
        ([rows(UP, identity=DOWN, flow=UP), rows(UP, identity=UP, flow=DOWN)], ()),
        ([rows(UP, identity=DOWN), rows(UP, identity=UP), rows(UP, identity=DOWN)], ()),
        (
            [rows(UP, identity=FLAT), rows(UP, identity=DOWN), rows(UP, identity=DOWN)],
            ("identity",),
        ),
    ],
)
def test_it_takes_two_evaluations_on_end_of_one_evaluator(evaluations, fallen):
    assert judge(dict(zip((20, 40, 60), evaluations))).fallen == fallen


def test_a_run_is_not_ended_by_a_handful_of_scripts():
    """An evaluation of two scripts has intervals that leave out 0 as soon as both move alike; it
    could end a run."""
    few = [row | {"n": 15} for row in rows(UP, identity=DOWN)]
    assert (
        judge({20: few, 40: few}).fallen == ()
        and judge({20: rows(UP, identity=DOWN), 40: few}).fallen == ()
    )


def test_the_best_is_the_best_held_out_not_the_best_trained():
    evaluations = {
        20: rows(UP, identity=(0.0, 0.02)),
        40: rows((0.05, 0.07), identity=FLAT),
        60: rows((0.1, 0.2), identity=DOWN),
    }
    assert judge(evaluations).best == 20
    assert judge({20: rows(UP, identity=DOWN)}).best == 0, "the start weights"


def test_the_held_out_score_has_no_units():
    """Differences over half their interval: (+1 -2) / 2, in whatever unit."""
    assert held_out_score(rows(UP, a=(0.0, 2.0), b=(-300.0, -100.0))) == pytest.approx((1 - 2) / 2)
    assert held_out_score(rows(UP)) == 0.0
    unmeasured = {"component": "x", "kind": "heldout", "diff": None, "low": None, "high": None}
    assert judge({20: [*rows(UP), unmeasured], 40: [*rows(UP), unmeasured]}).fallen == ()


def test_history_is_read_from_the_runs_own_files(tmp_path):
    for step in (40, 20):
        (tmp_path / f"ema-step-{step:06d}.json").write_text(json.dumps({"rows": rows(UP, x=DOWN)}))
    (tmp_path / "online-step-000020.json").write_text("{}")
    assert list(history(tmp_path, "ema")) == [20, 40] and judge(
        history(tmp_path, "ema")
    ).fallen == ("x",)


# --- Sentinels ---

CALM = Look({name: tensor([0.4, 0.5, 0.6], [0.5, 0.6, 0.7]) for name in BAD})
"""Two prompts, three seeds: a spread of 0.1 within a prompt, which the prompts' own difference
does not touch."""


def moved(by: float, **others: float) -> Look:
    return Look({name: v + others.get(name, by) for name, v in CALM.values.items()})


def test_the_scale_is_the_spread_over_seeds_of_one_prompt():
    assert CALM.spread("saturation") == pytest.approx(0.1) and CALM.mean(
        "saturation"
    ) == pytest.approx(0.55)


@pytest.mark.parametrize(
    ("look", "kl", "warns", "stops"),
    [
        (moved(0.0), 0.0, [], []),
        (moved(0.0, motion=-0.15), 0.0, ["motion"], []),
        (moved(0.0, motion=+0.35), 0.0, [], []),  # more motion is not the side that is bad
        (moved(0.0, motion=-0.35), 0.0, ["motion"], ["motion"]),
        (
            moved(0.0, saturation=0.35, luminance=-0.35),
            0.0,
            ["saturation", "luminance"],
            ["saturation", "luminance"],
        ),
        (moved(0.0, colour_drift=-0.5, still_run=0.15), 0.0, ["still_run"], []),
        (moved(0.0), 0.5, ["KL"], []),
        (moved(0.0), 1.5, ["KL"], ["KL"]),
    ],
)
def test_limits_by_hand(look, kl, warns, stops):
    verdict = judge_sentinels(CALM, look, kl, SentinelConfig())
    assert [w.split()[0] for w in verdict.warnings] == warns and [
        s.split()[0] for s in verdict.stops
    ] == stops
    assert verdict.metrics["sentinel/motion/moved"] == pytest.approx(
        (look.mean("motion") - 0.55) / 0.1
    )


def test_a_spread_of_nothing_is_no_limit():
    """Found on the miniature, whose colours are given by the prompt: saturation moved by 1.3 %,
    which was 1.6 spreads over seeds."""
    tight = Look({name: tensor([0.55, 0.551, 0.552], [0.55, 0.551, 0.552]) for name in BAD})
    near, far = (Look({name: v + by for name, v in tight.values.items()}) for by in (0.02, 0.05))
    assert (
        judge_sentinels(tight, near, 0.0, SentinelConfig()).warnings == ()
        and judge_sentinels(tight, far, 0.0, SentinelConfig()).stops
    )
    assert judge_sentinels(tight, near, 0.0, SentinelConfig(least=0.0)).stops


def test_stopping_can_be_left_out():
    assert (
        judge_sentinels(CALM, moved(-0.9), 9.0, SentinelConfig(stop=0.0, kl_stop=0.0)).stops == ()
    )


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ({"seeds": 1}, "seeds = 1 at least 2"),
        ({"every": -1}, "every = -1"),
        ({"warn": 2.0, "stop": 1.0}, "must be above 0 and at most its stop limit"),
        ({"kl_warn": 0.0}, "must be above 0"),
    ],
)
def test_bad_limits(bad, reason):
    with pytest.raises(ValueError, match=reason):
        SentinelConfig(**bad)


def test_what_is_watched_by_hand():
    """Ten frames: dark red, then from the sixth on bright grey; within both halves nothing
    changes."""
    video = torch.zeros(10, 3, 24, 32, dtype=torch.uint8)
    video[:5, 0], video[5:] = 51, 204
    found = watched(video, 16.0)
    assert found["saturation"] == pytest.approx(0.1) and found["luminance"] == pytest.approx(
        (0.299 * 0.2 + 0.8) / 2
    )
    assert found["motion"] < 1e-3 and found["residual_motion"] == pytest.approx(0.0, abs=1e-6)
    assert found["colour_drift"] == pytest.approx(0.8) and found["still_run"] == pytest.approx(
        4 / 9
    )
    assert (
        longest_run(torch.tensor([True, False, True, True])) == 2
        and longest_run(torch.tensor([False])) == 0
    )


# --- In a run ---


def run(folder, out, tmp_path, **changes) -> int:
    return align(write_recipe(tmp_path / "r.yaml", settings(folder, **changes)), out)


def gamed(a, b, kinds):
    """In place of `compare`: trained rewards rose, and a held-out evaluator fell."""
    return [{**row, "a": 0.5, "b": 0.5, "win": 0.5, "sd": 0.1} for row in rows(UP, identity=DOWN)]


def test_a_run_whose_rewards_are_gamed_stops(folder, tmp_path, capsys, monkeypatch):
    """After the second evaluation, with everything written; resumed, it stops at once."""
    monkeypatch.setattr("kvpo.runs.monitor.compare", gamed)
    out, evaluate = tmp_path / "run", {"every": 1, "scripts": 2, "batch": 2, "videos": 0}
    assert run(folder, out, tmp_path, evaluate=evaluate) == 0
    said = capsys.readouterr().out
    assert (
        "stopped after 2 steps: trained rewards rose while identity fell, in 2 evaluations on end. Best held-out weights: those of the start"
        in said
    )
    assert [p.name for p in checkpoints(out / "checkpoints")] == ["step-000001", "step-000002"]
    report = (out / "report.html").read_text()
    assert (
        "The rewards were gamed: they rose while identity fell" in report
        and "training stopped early: 2 of 4 updates" in report.lower().replace("<li>", "")
    )
    assert (
        align(str(tmp_path / "r.yaml"), out, "--resume") == 0
        and "stopped after 2 steps" in capsys.readouterr().out
    )
    assert len(checkpoints(out / "checkpoints")) == 2
    assert (
        align(
            str(tmp_path / "r.yaml"), out, "--resume", "--override", "--evaluate.no-stop-when-gamed"
        )
        == 0
        and checkpoints(out / "checkpoints")[-1].name == "step-000004"
    )


def test_the_best_held_out_checkpoint_stays_and_has_a_name(folder, tmp_path, monkeypatch):
    """Held-out scores rise and fall again: the checkpoint of the first evaluation outlives newer
    ones."""
    # online and EMA of four evaluations
    scores = iter([UP, UP, FLAT, FLAT, DOWN, DOWN, DOWN, DOWN])
    monkeypatch.setattr(
        "kvpo.runs.monitor.compare",
        lambda a, b, kinds: [
            {**row, "a": 0.5, "b": 0.5, "win": 0.5, "sd": 0.1}
            for row in rows(FLAT, identity=next(scores))
        ],
    )
    out = tmp_path / "run"
    assert (
        run(
            folder,
            out,
            tmp_path,
            evaluate={"every": 1, "scripts": 2, "batch": 2, "videos": 0},
            checkpoint={"every": 1, "keep": 1},
        )
        == 0
    )
    assert [p.name for p in checkpoints(out / "checkpoints")] == ["step-000001", "step-000004"]
    assert load_generator(f"{out}:best")[1] == "run:best step-000001"


def test_sentinels_in_a_run(folder, tmp_path, capsys, monkeypatch):
    """Looked at every second step, against the start weights; a limit that is reached ends the
    run after its evaluation."""
    out = tmp_path / "run"
    sentinels = {"every": 2, "scripts": 2, "seeds": 2, "stop": 0.0, "kl_stop": 0.0}
    assert run(folder, out, tmp_path, sentinels=sentinels) == 0
    looks = [r for r in read_metrics(out / "metrics.jsonl") if "sentinel/saturation/moved" in r]
    assert (
        [r["step"] for r in looks] == [1, 3]
        and looks[0]["time/sentinels"] > 0
        and "stopped" not in capsys.readouterr().out
    )
    assert (
        run(
            folder,
            tmp_path / "other",
            tmp_path,
            sentinels=sentinels | {"kl_warn": 1e-12, "kl_stop": 1e-12},
            checkpoint={"every": 9},
        )
        == 0
    )
    said = capsys.readouterr().out
    assert (
        "sentinel after 2 steps: KL to the start policy" in said
        and "stopped after 2 steps: beyond the stop limit: KL" in said
    )
    assert [p.name for p in checkpoints(tmp_path / "other" / "checkpoints")] == ["step-000002"], (
        "what was evaluated is there, though no checkpoint was due"
    )
    assert (
        tmp_path / "other" / "evaluation" / "ema-step-000002.json"
    ).exists() and "Sentinels" in (tmp_path / "other" / "report.html").read_text()
