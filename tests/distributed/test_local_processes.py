"""`kvpo align --processes N`: N processes on this machine, without torchrun on the command line."""

from __future__ import annotations

import subprocess
import sys

import pytest
from processes import environment
from test_align import settings, write_recipe

from kvpo.distributed.local_processes import INSIDE, check_count


def test_too_few_and_others_than_torchruns(monkeypatch):
    monkeypatch.delenv(INSIDE, raising=False)
    with pytest.raises(ValueError, match="--processes 0 must be 1 or more"):
        check_count(0)
    check_count(8)
    monkeypatch.setenv(INSIDE, "2")
    check_count(2)
    with pytest.raises(ValueError, match="--processes 8, but torchrun has started 2 processes"):
        check_count(8)


def aligned(recipe: str, *options: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "kvpo", "align", recipe, *options],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=240,
    )


def test_two_processes_train_and_one_speaks(folder, tmp_path):
    recipe = write_recipe(tmp_path / "tiny.yaml", settings(folder, groups=2, steps=1))
    done = aligned(recipe, "--out", str(tmp_path / "run"), "--processes", "2")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("report: ") == 1 and (tmp_path / "run" / "report.html").exists()
    assert (tmp_path / "run" / "logs").is_dir()


def test_what_fails_is_said_in_one_line(folder, tmp_path):
    """torchrun prints a table and its own traceback below it, twenty lines that say less."""
    recipe = write_recipe(tmp_path / "tiny.yaml", settings(folder, groups=2))
    done = aligned(recipe, "--out", str(tmp_path / "run"), "--processes", "3")
    assert done.returncode == 1
    assert "2 groups a step leave 1 of 3 ranks idle" in done.stderr
    assert "Traceback" not in done.stderr
