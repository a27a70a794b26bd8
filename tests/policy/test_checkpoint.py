"""Checkpoints: all of a run, bit for bit, or not at all."""

from __future__ import annotations

import errno
import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file
from test_update import Run
from tiny import draw, new_pipeline

from kvpo.distributed.ranks import Lost
from kvpo.method.update import OptimizerConfig
from kvpo.policy import checkpoint as module
from kvpo.policy.checkpoint import (
    Snapshot,
    checkpoints,
    load_checkpoint,
    read_state,
    save_checkpoint,
)
from kvpo.policy.policy import PolicyConfig
from kvpo.policy.settings import CheckpointConfig

SETTINGS = {"seed": 3, "data": {"blocks": 6}}


def trained(updates: int = 1, **kwargs) -> Run:
    run = Run(
        optimizer=OptimizerConfig(lr=1e-3, warmup=2),
        policy=PolicyConfig(**{"train": "full", "sync_interval": 2, "rank": 2} | kwargs),
    )
    for _ in range(updates):
        update(run)
    return run


def update(run: Run) -> None:
    run.accumulate()
    run.updater.step()


def save(folder, run: Run, step: int, keep: int = 2):
    return save_checkpoint(
        folder, Snapshot.of(step, run.policy, run.updater.optimizer, SETTINGS), keep
    )


def load(path, run: Run) -> int:
    return load_checkpoint(path, run.policy, run.updater.optimizer)


@pytest.fixture(scope="module")
def run():
    """A run after one of two updates of a behaviour policy; these tests only save it."""
    return trained()


@pytest.mark.parametrize("train", ["full", "lora"])
def test_round_trip_bit_for_bit(tmp_path, train):
    """Everything is put back: an update later, all four sets of weights and the moments are the
    same numbers."""
    straight = trained(train=train)
    path = save(tmp_path, straight, 1)
    resumed = trained(updates=0, train=train)
    assert load(path, resumed) == 1
    for a, b in zip(straight.state(), resumed.state(), strict=True):
        assert torch.equal(a, b)
    assert (resumed.policy.updates, resumed.policy.lag) == (1, 1) and not resumed.policy.on_policy
    for _ in range(2):
        update(straight)
        update(resumed)
    assert all(torch.equal(a, b) for a, b in zip(straight.state(), resumed.state(), strict=True))
    for p, q in zip(straight.policy.parameters, resumed.policy.parameters):
        a, b = straight.updater.optimizer.state[p], resumed.updater.optimizer.state[q]
        assert all(torch.equal(a[k], b[k]) for k in ("step", "exp_avg", "exp_avg_sq"))


@pytest.mark.parametrize("train", ["full", "lora"])
def test_the_file_for_elsewhere(tmp_path, train):
    """diffusers loads it into the start weights, which then are the averaged ones; the newest
    checkpoint's, once."""
    run = trained(train=train)
    save(tmp_path, run, 1)
    update(run)
    save(tmp_path, run, 2)
    state, stock = load_file(tmp_path / "ema.safetensors"), new_pipeline().generator
    if train == "lora":
        stock.transformer.load_lora_adapter(state, prefix="transformer")
    else:
        stock.transformer.load_state_dict(state)
    x, text = draw(1, 2, 4, 4, 4), draw(1, 5, 16)
    with run.policy.using(run.policy.average), torch.no_grad():
        average = run.policy.model.velocity(x, 0.5, text, [0, 1])
    with torch.no_grad():
        found = stock.velocity(x, 0.5, text, [0, 1])
        start = new_pipeline().generator.velocity(x, 0.5, text, [0, 1])
    assert torch.allclose(found, average, atol=1e-6) and not torch.allclose(found, start, atol=1e-5)


def test_before_the_first_update(tmp_path):
    """A run whose groups were all skipped so far has no moments yet."""
    fresh = trained(updates=0)
    path, other = save(tmp_path, fresh, 5), trained(updates=0)
    assert (
        load(path, other) == 5 and other.policy.updates == 0 and not other.updater.optimizer.state
    )


def test_the_newest_stay(tmp_path, run):
    for step in (2, 4, 10, 12):
        save(tmp_path, run, step)
    assert (
        [p.name for p in checkpoints(tmp_path)]
        == ["step-000010", "step-000012"]
        == sorted(set(os.listdir(tmp_path)) - {"ema.safetensors"})
    )
    assert read_state(checkpoints(tmp_path)[-1])["config"] == SETTINGS


def test_later_ones_that_could_not_be_read_do_not_push_out_a_new_one(tmp_path, run):
    """Resumed from before two broken checkpoints, a run once removed its own next one as the
    oldest of three."""
    for step in (20, 30):
        save(tmp_path, run, step)
    save(tmp_path, run, 10, keep=1)
    save(tmp_path, run, 15, keep=1)
    assert [p.name for p in checkpoints(tmp_path)] == ["step-000015", "step-000020", "step-000030"]


def test_a_lost_rank_is_no_full_disk(tmp_path, run, monkeypatch):
    def lost(*_):
        raise Lost("rank 1 did not come")

    monkeypatch.setattr(module, "save_file", lost)
    with pytest.raises(Lost, match="^rank 1 did not come$"):
        save(tmp_path, run, 1)


def test_a_step_may_be_saved_again(tmp_path, run):
    assert save(tmp_path, run, 2) == save(tmp_path, run, 2)
    assert [p.name for p in checkpoints(tmp_path)] == ["step-000002"]


class Killed(BaseException):
    """What kill -9 does: no handler runs."""


def test_a_crash_half_way_leaves_the_older_one(tmp_path, run, monkeypatch):
    """Between the tensors and the state, and just before the folder gets its name."""
    save(tmp_path, run, 1)
    for place in ("_finish", "_flush"):

        def die(*_):
            raise Killed

        with monkeypatch.context() as patched, pytest.raises(Killed):
            patched.setattr(module, place, die)
            save(tmp_path, run, 2)
        assert (tmp_path / ".step-000002.part" / "tensors.safetensors").exists(), (
            "the crash came when it should"
        )
        assert [p.name for p in checkpoints(tmp_path)] == ["step-000001"]
        assert load(checkpoints(tmp_path)[-1], trained(updates=0)) == 1
    save(tmp_path, run, 2)
    assert sorted(os.listdir(tmp_path)) == ["ema.safetensors", "step-000001", "step-000002"], (
        "what the crash left is cleared away"
    )


@pytest.mark.parametrize("place", ["save_file", "os.replace", "_flush"])
def test_a_full_disk_is_one_clear_error(tmp_path, run, monkeypatch, place):
    save(tmp_path, run, 1)

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(f"kvpo.policy.checkpoint.{place}", full)
    with pytest.raises(
        OSError,
        match=r"checkpoint .*step-000002 could not be written \(.*No space left on device\); the ones before it are untouched. Free disk space.*--resume",
    ) as caught:
        save(tmp_path, run, 2)
    assert "\n" not in str(caught.value)
    assert sorted(os.listdir(tmp_path)) == ["ema.safetensors", "step-000001"], (
        "nothing half-written stays"
    )


@pytest.mark.parametrize(
    "damage", ["truncate tensors", "lose tensors", "truncate state", "empty state", "strip state"]
)
def test_a_broken_checkpoint_is_named(tmp_path, run, damage):
    save(tmp_path, run, 1)
    path = save(tmp_path, run, 2)
    tensors, state = path / "tensors.safetensors", path / "state.json"
    if damage == "truncate tensors":
        tensors.write_bytes(tensors.read_bytes()[:-50])
    elif damage == "lose tensors":
        tensors.unlink()
    else:
        content = state.read_text()
        state.write_text(
            {
                "truncate state": content[:20],
                "empty state": "",
                "strip state": json.dumps({"step": 2}),
            }[damage]
        )
    before = run.state()
    with pytest.raises(
        ValueError,
        match=f"{'tensors.safetensors' if 'tensors' in damage else 'state.json'} is broken or missing .*; delete {path} to go on from the checkpoint before it",
    ):
        load(path, run)
    assert all(torch.equal(a, b) for a, b in zip(before, run.state())), "nothing was half loaded"
    shutil.rmtree(path)
    assert load(checkpoints(tmp_path)[-1], trained(updates=0)) == 1


def test_another_policy_is_refused(tmp_path, run):
    save(tmp_path, run, 1)
    narrow = save(tmp_path / "narrow", trained(updates=0, train="lora", rank=2), 1)
    with pytest.raises(ValueError, match="belongs to another policy"):
        load(narrow, trained(updates=0, train="lora", rank=3))


def test_parts_and_strangers_are_no_checkpoints(tmp_path, run):
    save(tmp_path, run, 1)
    (tmp_path / "step-000009").mkdir()
    shutil.copytree(tmp_path / "step-000001", tmp_path / ".step-000007.part")
    assert [p.name for p in checkpoints(tmp_path)] == ["step-000001"]
    assert checkpoints(tmp_path / "nowhere") == []


@pytest.mark.parametrize("bad", [{"every": 0}, {"keep": 0}])
def test_bad_settings_are_refused(bad):
    with pytest.raises(ValueError, match="checkpoint.every = .* must be 1 or more"):
        CheckpointConfig(**bad)
