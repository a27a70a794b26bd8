"""Processes of the studio: known again, never mistaken for others, and never left without a record."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from learners import wait_for

from kvpo.studio.children import Children, command_of


def test_a_process_is_known_by_its_command_line(tmp_path):
    """A record of a folder from elsewhere, or an old one, names a number that is another's now."""
    children = Children(tmp_path)
    with subprocess.Popen([sys.executable, "-S", "-c", "input()"], stdin=subprocess.PIPE) as other:
        wait_for(lambda: command_of(other.pid))  # for a moment a new process has none yet
        assert command_of(other.pid) == f"{sys.executable} -S -c input()"
        record = {"kind": "align", "name": "a", "pid": other.pid, "argv": ["kvpo"], "begun": ""}
        children.folder.mkdir(parents=True)
        (children.folder / "align.json").write_text(json.dumps(record))
        assert children.latest("align") is not None and children.running() is None
        with pytest.raises(ValueError, match="ended already"):
            children.stop("align")
        assert other.poll() is None
        other.communicate(b"\n")
    assert command_of(other.pid) == ""
    strange = (
        {"name": "../x"},
        {"argv": []},
        {"argv": [1]},
        {"pid": 2**40},
        {"pid": 0},
        {"more": 1},
    )
    for broken in ("[" * 9000, "[]", "{}", *(json.dumps(record | one) for one in strange)):
        (children.folder / "align.json").write_text(broken)
        assert children.latest("align") is None


def test_how_far_work_is_comes_from_its_log(tmp_path):
    """A fit of minutes said only that it was fitting."""
    children = Children(tmp_path)
    children.folder.mkdir(parents=True)
    assert children.how_far("fit") == ""
    lines = (
        "12:00:01 kvpo align /a/b/c 3/4 on cpu: 4 steps, 1/2",
        "12:00:30 measure clips 7/85, 1.mp4",
    )
    (children.folder / "fit.log").write_text("\n".join((*lines, "measure clips ━━ 9/85", "")))
    assert children.how_far("fit") == "measure clips: 7 of 85"
    (children.folder / "align.log").write_text(
        "12:00:30 evaluate mini 16/64\n12:01:00 step 2/50  VQ 1\n"
    )
    assert children.how_far("align") == "step: 2 of 50"


def test_what_can_not_be_recorded_is_not_left_running(tmp_path, monkeypatch):
    """A process whose record did not fit on the disk would be known to nobody."""

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("kvpo.studio.children.write_atomic", full)
    children, started = Children(tmp_path), []
    popen = subprocess.Popen
    monkeypatch.setattr(
        subprocess, "Popen", lambda *a, **k: started.append(popen(*a, **k)) or started[-1]
    )
    with pytest.raises(OSError, match="nothing was started"):
        children.start("fit", "a", [sys.executable, "-S", "-c", "import time; time.sleep(99)"])
    assert started[0].returncode == -9 and children.running() is None
