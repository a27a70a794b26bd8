"""Checkpoints that are written while training goes on: what was, not what is; and a write that
fails is heard of."""

from __future__ import annotations

import errno
import threading
import time

import pytest
import torch
from test_checkpoint import SETTINGS, load, trained, update

from kvpo.policy import checkpoint as module
from kvpo.policy.checkpoint import checkpoints
from kvpo.policy.saving import Saver


def saver_of(run, folder) -> Saver:
    return Saver(folder, 2, run.policy, 600.0)


def begin(saver: Saver, run, step: int) -> None:
    saver.begin(step, run.updater.optimizer, SETTINGS, 0)


@pytest.fixture
def disk(monkeypatch):
    """A disk that waits for the word before it writes."""
    write, word = module.save_file, threading.Event()

    def slowly(*args):
        assert word.wait(60)
        write(*args)

    monkeypatch.setattr(module, "save_file", slowly)
    return word


def full(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("train", ["full", "lora"])
def test_training_goes_on_and_the_checkpoint_is_of_before(disk, tmp_path, train):
    """Weights, EMA and moments are moved in place by the update that comes while the disk is
    busy."""
    run = trained(train=train)
    before = [w.clone() for w in run.state()]
    with saver_of(run, tmp_path) as saver:
        begin(saver, run, 1)
        update(run)
        assert not checkpoints(tmp_path) and not all(
            torch.equal(a, b) for a, b in zip(before, run.state(), strict=True)
        )
        saver.check()
        disk.set()
    resumed = trained(updates=0, train=train)
    assert load(checkpoints(tmp_path)[-1], resumed) == 1
    assert all(torch.equal(a, b) for a, b in zip(before, resumed.state(), strict=True))
    update(resumed)
    assert all(torch.equal(a, b) for a, b in zip(run.state(), resumed.state(), strict=True))


def test_one_at_a_time(disk, tmp_path):
    run = trained()
    with saver_of(run, tmp_path) as saver:
        begin(saver, run, 1)
        threading.Timer(0.2, disk.set).start()
        begin(saver, run, 2)
        assert next(p.name for p in checkpoints(tmp_path)) == "step-000001", (
            "the second began when the first was there"
        )
    assert [p.name for p in checkpoints(tmp_path)] == ["step-000001", "step-000002"]


def test_a_full_disk_is_heard_of_at_the_next_step_the_next_checkpoint_and_the_end(
    tmp_path, monkeypatch
):
    run = trained()
    saver = saver_of(run, tmp_path)
    monkeypatch.setattr(module, "save_file", full)

    def fails(hear) -> None:
        with pytest.raises(
            OSError, match="step-000001 could not be written .*No space left on device"
        ):
            hear()

    def at_a_step() -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            saver.check()

    begin(saver, run, 1)
    fails(at_a_step)
    saver.check()  # it has been heard
    begin(saver, run, 1)
    fails(lambda: begin(saver, run, 2))

    def at_the_end() -> None:
        with saver:
            begin(saver, run, 1)

    fails(at_the_end)


def test_another_error_is_not_hidden_by_the_disk_s(tmp_path, monkeypatch):
    run = trained()
    monkeypatch.setattr(module, "save_file", full)
    with pytest.raises(FloatingPointError, match="first"), saver_of(run, tmp_path) as saver:
        begin(saver, run, 1)
        raise FloatingPointError("first")
