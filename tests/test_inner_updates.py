"""Several optimizer updates on one step's groups: the loop by hand, the clip, what is saved and
what is not."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
import yaml
from test_align import CLOCK, align, equal, final, records, refused, settings, write_recipe
from test_config import refused as bad
from test_distributed import torchrun

from kvpo.common.progress import Progress
from kvpo.config import from_dict
from kvpo.method.kept_groups import all_updates
from kvpo.method.update import Updater
from kvpo.policy.checkpoint import checkpoints, read_tensors
from kvpo.train import Alignment

TWO = {
    "groups": 2,
    "inner_updates": 2,
    "policy": {"train": "full", "sync_interval": 1},
    "optimizer": {"lr": 1e-3, "warmup": 1},
}
HELD = {"velocity_penalty": {"weight": 1.0, "blocks": 1}}


def numbers(metrics: dict) -> dict:
    return {k: float(v) for k, v in metrics.items() if not k.startswith(CLOCK)}


def test_two_updates_are_the_loop_by_hand(folder, tmp_path):
    """Explore two groups, then twice: gradients of both against the energies of the weights that
    rolled them out, a step."""
    run = Alignment(from_dict(settings(folder, **TWO, **HELD)), tmp_path, Progress())
    metrics = [run.step(s) for s in range(2)]

    other = Alignment(from_dict(settings(folder, **TWO, **HELD)), tmp_path, Progress())
    for step in range(2):
        with other.parts.policy.for_groups():
            kept = list(other._explored(step))
        rolled_out = other.parts.policy.snapshot()
        assert all(torch.equal(a, b) for a, b in zip(rolled_out, other.parts.policy.behaviour)), (
            "a step begins on policy"
        )
        ratios = []
        for inner in range(2):
            # replays of all three sets of weights, nothing kept from the first update
            learnt = [other.learn(step, k, None) for k in kept]
            ratios.append(sum(m["loss/ratio_max"] for m, _ in learnt) / 2)
            assert all(
                torch.equal(a, b) for a, b in zip(rolled_out, other.parts.policy.behaviour)
            ), "and its old policy stays"
            other.parts.updater.step(last=inner == 1)
        assert ratios == pytest.approx(
            [metrics[step][f"inner/{i}/ratio_max"] for i in (1, 2)], rel=1e-5
        )
        assert ratios[0] == 1.0 < ratios[1]
    moved = max(
        float((a - r).abs().max())
        for a, r in zip(run.parts.policy.snapshot(), run.parts.policy.reference)
    )
    assert (
        moved > 1e-3
        and run.parts.policy.updates == other.parts.policy.updates == 4
        and run.parts.policy.on_policy
    )
    for a, b in zip(run.parts.policy.snapshot(), other.parts.policy.snapshot()):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-3 * moved)


def test_the_second_update_needs_no_old_energies(folder, tmp_path):
    """They are those of the first: a further update costs its replay with gradient, no rollout,
    no replay of the other weights."""
    calls = []
    for n in (1, 2, 3):
        run = Alignment(
            from_dict(settings(folder, **TWO | {"inner_updates": n, "groups": 1})),
            tmp_path,
            Progress(),
        )
        run.step(0)
        calls.append(run.step(1)["calls/generator"])
    assert calls[2] - calls[1] == calls[1] - calls[0] == 2, "a clean pass and a batch of velocities"


def test_the_clip_acts_from_the_second_update_on(folder, tmp_path):
    run = Alignment(
        from_dict(
            settings(folder, **TWO | {"inner_updates": 3, "optimizer": {"lr": 1e-2, "warmup": 1}})
        ),
        tmp_path,
        Progress(),
    )
    m = run.step(0)
    assert (
        m["inner/1/clip_fraction"] == 0.0
        and m["inner/1/ratio_min"] == m["inner/1/ratio_max"] == 1.0
        and m["inner/1/approx_kl"] == 0.0
    )
    assert (
        max(m["inner/2/clip_fraction"], m["inner/3/clip_fraction"]) > 0.0
        and m["loss/clip_fraction"] == m["inner/3/clip_fraction"]
    )
    assert all(m[f"inner/{i}/step_norm"] > 0.0 for i in (1, 2, 3)) and "inner/4/step_norm" not in m


def test_one_update_says_nothing_of_inner_ones():
    assert all_updates([{"loss/ratio_max": 1.0}]) == {"loss/ratio_max": 1.0}
    assert all_updates([{"loss/ratio_max": 1.0, "a": 2.0}, {"loss/ratio_max": 1.5}]) == {
        "loss/ratio_max": 1.5,
        "a": 2.0,
        "inner/1/ratio_max": 1.0,
        "inner/2/ratio_max": 1.5,
    }


def test_the_old_policy_is_copied_at_the_end_of_a_step_only(folder, tmp_path):
    run = Alignment(
        from_dict(
            settings(folder, **TWO | {"groups": 1, "policy": {"train": "full", "sync_interval": 3}})
        ),
        tmp_path,
        Progress(),
    )
    lags = []
    for step in range(3):
        run.step(step)
        lags.append(run.parts.policy.lag)
    assert lags == [2, 0, 2], (
        "three updates are there in the middle of the second step, the copy is made at its end"
    )


# --- What is saved ---


@pytest.fixture(scope="module")
def recipe(folder, tmp_path_factory):
    home = tmp_path_factory.mktemp("inner")
    return write_recipe(
        home / "tiny.yaml",
        settings(
            folder,
            **TWO,
            **HELD,
            steps=2,
            advantages={"std": "step"},
            evaluate={"scripts": 2, "batch": 2, "videos": 0},
        ),
    )


@pytest.fixture(scope="module")
def straight(recipe, tmp_path_factory):
    out = tmp_path_factory.mktemp("straight") / "run"
    assert align(recipe, out) == 0
    return out


def test_resume_is_the_uninterrupted_run(recipe, straight, tmp_path):
    assert align(recipe, tmp_path / "run", "--steps", "1") == 0
    assert align(recipe, tmp_path / "run", "--resume") == 0
    assert equal(final(tmp_path / "run"), final(straight))
    assert records(tmp_path / "run", evaluations=False) == records(straight, evaluations=False)


def test_what_fails_between_two_updates_is_not_saved(
    recipe, straight, tmp_path, capsys, monkeypatch
):
    """The weights of then belong to no step; resumed from the step before, the run is the
    uninterrupted one."""
    step = Updater.step

    def broken(self, last=True):
        if self.policy.updates == 3:
            raise FloatingPointError("gradient norm is nan")
        return step(self, last)

    with monkeypatch.context() as patched:
        patched.setattr(Updater, "step", broken)
        assert "gradient norm is nan" in refused(recipe, tmp_path / "run", capsys)
    assert [p.name for p in checkpoints(tmp_path / "run" / "checkpoints")] == ["step-000001"]
    assert align(recipe, tmp_path / "run", "--resume") == 0
    assert equal(final(tmp_path / "run"), final(straight))


def test_a_signal_waits_for_the_last_update(recipe, straight, tmp_path, monkeypatch):
    """It comes right after the first of two updates of the first step: the step is made whole,
    and saved."""
    step = Updater.step

    def interrupted(self, last=True):
        found = step(self, last)
        if self.policy.updates == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return found

    with monkeypatch.context() as patched:
        patched.setattr(Updater, "step", interrupted)
        align(recipe, tmp_path / "run", "--checkpoint.every", "9")
    assert [p.name for p in checkpoints(tmp_path / "run" / "checkpoints")] == ["step-000001"]
    assert align(recipe, tmp_path / "run", "--checkpoint.every", "9", "--resume") == 0
    assert equal(final(tmp_path / "run"), final(straight))


def test_two_ranks_are_one(recipe, folder, tmp_path):
    """Groups on two ranks: the step's standard deviation and both updates are those of one
    process, up to the order of sums."""
    changed = yaml.safe_load(Path(recipe).read_text()) | {
        "steps": 1,
        "optimizer": {"lr": 1e-3, "warmup": 1, "eps": 1e-3, "clip_of": "step"},
    }
    path = write_recipe(tmp_path / "r.yaml", changed)
    assert align(path, tmp_path / "one") == 0
    code, said = torchrun(path, tmp_path / "two")
    assert code == 0, said
    a, b = (records(tmp_path / name, evaluations=False)[0] for name in ("one", "two"))
    assert (
        a.keys() == b.keys()
        and {
            k
            for k in a
            if b[k] != pytest.approx(a[k], rel=1e-3, abs=1e-6) and k != "calls/generator"
        }
        == set()
    )
    ours, theirs = (
        read_tensors(checkpoints(tmp_path / name / "checkpoints")[-1]) for name in ("two", "one")
    )
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=1e-5)


@pytest.mark.parametrize("n", [0, 9])
def test_how_many_there_may_be(n):
    assert f"inner_updates = {n} must lie between 1 and 8" in bad({"inner_updates": n})
