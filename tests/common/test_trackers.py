"""Trackers by name get a run's settings, numbers and videos, and go on in the same run."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_align import settings

from kvpo.common.metric_log import MetricLog
from kvpo.common.trackers import Trackers, flat
from kvpo.common.video import write_mp4
from kvpo.config import from_dict
from kvpo.planning.missing import missing

SETTINGS = {"seed": 3, "optimizer": {"lr": 1e-4}, "rewards": [{"name": "toy"}]}
FAKE = """
import json
from pathlib import Path
from types import SimpleNamespace

LOG = Path(__file__).with_name("log.jsonl")

def _note(*what):
    with LOG.open("a") as file:
        file.write(json.dumps(what) + chr(10))

class Video:
    def __init__(self, path):
        self.path = path

class Run:
    def log(self, values, step=None):
        _note("log", step, {k: v.path if isinstance(v, Video) else v for k, v in values.items()})
    def finish(self):
        _note("finish")

def init(**given):
    _note("init", given)
    return Run()

config = SimpleNamespace(update=lambda values, allow_val_change: _note("config", values))
"""
"""A module with the names of wandb and trackio that are used."""


@pytest.fixture
def video(tmp_path) -> Path:
    frames = torch.zeros(60, 3, 8, 8, dtype=torch.uint8)
    frames[:, 0] = torch.arange(60, dtype=torch.uint8)[:, None, None]
    return write_mp4(tmp_path / "grid.mp4", frames, 16.0) or tmp_path / "grid.mp4"


@pytest.fixture(params=["wandb", "trackio"])
def fake(request, tmp_path, monkeypatch):
    """(name of the tracker, function that reads what it was told)."""
    package = tmp_path / "packages" / request.param
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(FAKE)
    monkeypatch.syspath_prepend(package.parent)
    monkeypatch.delitem(sys.modules, request.param, raising=False)
    yield (
        request.param,
        lambda: [json.loads(line) for line in (package / "log.jsonl").read_text().splitlines()],
    )
    sys.modules.pop(request.param, None)


def test_a_resumed_run_goes_on_in_the_same_run(tmp_path, fake, video):
    """`kvpo[wandb]` installed a package that nothing used."""
    name, told = fake
    run = tmp_path / "mine"
    for resume_after in (None, 0):
        trackers = Trackers([name], run, SETTINGS, resume_after)
        with MetricLog(run, resume_after, trackers) as log:
            log.write(0 if resume_after is None else 1, {"loss/kl": 0.5}, {"groups/grid": video})
    begun, config, first, shown, *_, last, _, _ = told()
    again = next(given for what, *given in told()[1:] if what == "init")
    assert begun[1]["project"] == "kvpo" and begun[1]["name"].startswith("mine")
    assert again == begun[1:] and begun[1]["resume"] == "allow", "one run of the tracker"
    assert config == ["config", {"seed": 3, "optimizer.lr": 1e-4, "rewards": '[{"name": "toy"}]'}]
    assert first == ["log", 0, {"loss/kl": 0.5}] and last == ["log", 1, {"loss/kl": 0.5}]
    assert shown == ["log", 0, {"groups/grid": str(video)}]
    assert [what for what, *_ in told()].count("config") == 1


def test_two_runs_are_two_runs_of_the_tracker(tmp_path, fake):
    name, told = fake
    for run in ("a", "b"):
        Trackers([name], tmp_path / run, {}, None).close()
    first, second = (given for what, given in (t for t in told() if len(t) == 2) if what == "init")
    assert first != second


def test_tensorboard_has_numbers_videos_and_settings(tmp_path, video, monkeypatch):
    """And forgets the steps that are run again, in the very second of the run before.

    The writers' numbers 9 and 10 stand at the end of the files' names, so that the second file
    would be read first.
    """
    from tensorboard.summary.writer import event_file_writer

    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(9))
    log = MetricLog(tmp_path, None, Trackers(["tensorboard"], tmp_path, SETTINGS, None))
    with log:
        for step in range(4):
            log.write(step, {"loss/kl": float(step), "loss/policy": math.nan})
    log = MetricLog(tmp_path, 1, Trackers(["tensorboard"], tmp_path, SETTINGS, 1))
    with log:
        log.write(2, {"loss/kl": 20.0}, {"groups/grid": video})
    board = tmp_path / "tensorboard"
    events = EventAccumulator(str(board))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss/kl")] == [(0, 0.0), (1, 1.0), (2, 20.0)]
    (image,) = events.Images("groups/grid")
    assert image.step == 2 and image.encoded_image_string[:6] == b"GIF89a"
    (written,) = board.glob("*/hparams.yml")
    assert "optimizer.lr: 0.0001" in written.read_text()


def test_a_tracker_that_is_not_installed_is_said_before_any_work(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *of: None if name == "wandb" else found(name, *of)
    )
    (fault,) = missing(from_dict({"trackers": ["wandb"]}))
    assert "trackers: wandb is not installed; pip install wandb" in str(fault)


def test_a_tracker_that_does_not_exist():
    with pytest.raises(ValueError, match=r"trackers.0 = 'wanbd'.*'tensorboard', 'wandb'"):
        from_dict({"trackers": ["wanbd"]})


def test_a_tracker_that_can_not_begin(tmp_path, fake):
    name, _ = fake
    package = tmp_path / "packages" / name / "__init__.py"
    package.write_text("def init(**given):\n    raise RuntimeError('No API key configured')\n")
    with pytest.raises(
        OSError, match=rf"{name} could not be begun \(No API key.*WANDB_MODE=offline"
    ):
        Trackers([name], tmp_path, {}, None)


def test_wandb_itself_without_a_network(tmp_path, monkeypatch, video):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for resume_after in (None, 0):
        trackers = Trackers(["wandb"], tmp_path / "mine", SETTINGS, resume_after)
        trackers.write(0, {"loss/kl": 0.5})
        trackers.show(0, {"groups/grid": video})
        trackers.close()
    runs = [p.name for p in (tmp_path / "mine" / "wandb").glob("offline-run-*")]
    assert runs and len({name.rpartition("-")[2] for name in runs}) == 1, "one id for both"


def test_settings_are_numbers_and_texts():
    found = flat(settings("p", data={"switches": [3, 5]}))
    assert found["data.switches"] == "[3, 5]"
    assert all(isinstance(value, (bool, int, float, str)) for value in found.values())
