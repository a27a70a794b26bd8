"""Long work goes on though what it prints can not be shown; and what goes into a file says what
is being done."""

from __future__ import annotations

import io
import os
import sys

from kvpo.common.progress import Progress
from kvpo.common.timing import Phases


class Refusing(io.TextIOWrapper):
    """A stream whose every write fails as that of a closed pipe, or of a full disk."""

    def write(self, text):
        raise OSError(28, "No space left on device")


def test_characters_that_a_terminal_lacks_are_escaped(monkeypatch):
    """A prompt in Japanese ended a batch on a terminal in latin-1, after the first video."""
    stream = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    monkeypatch.setattr(sys, "stdout", stream)
    Progress().say("f\xfcr \u732b and half \udce9")
    stream.flush()
    assert stream.buffer.getvalue() == b"f\xfcr \\u732b and half \\udce9\n"


def test_a_full_disk_or_a_closed_stream_makes_it_silent(monkeypatch):
    for stream in (Refusing(io.BytesIO(), encoding="utf-8"), None):
        monkeypatch.setattr(sys, "stdout", stream)
        progress = Progress()
        progress.say("one")
        progress.say("two")
    closed = io.TextIOWrapper(io.BytesIO())
    closed.close()
    monkeypatch.setattr(sys, "stdout", closed)
    monkeypatch.setattr(sys, "stderr", closed)
    progress = Progress()
    with progress.bar("work", 2) as bar:
        bar.advance("x")
    progress.warn("w")


def test_a_closed_pipe_makes_it_silent(monkeypatch):
    """rich ended the whole program there, with exit code 1."""
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        progress = Progress()
        for _ in range(3):
            progress.say("a line")
        stream.write("the interpreter's last flush")


def test_redirected_output_has_a_line_for_every_step(capsys):
    """`kvpo align > log` said nothing until it had ended, hours later."""
    progress = Progress()
    with progress.bar("align", 2) as bar:
        bar.advance("step 1/2", log=True)
        bar.advance("a block", log=False)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 and lines[0].endswith(" step 1/2") and lines[0][2] == lines[0][5] == ":"


def test_a_phase_that_takes_long_has_a_line(capsys, monkeypatch):
    progress = Progress()
    phases = Phases(progress.phase, progress.ended)
    clock = iter([0.0, 1000.0, 1000.0, 1040.0, 1040.0, 1041.0])
    monkeypatch.setattr("kvpo.common.timing.time.perf_counter", lambda: next(clock))
    for name in ("total", "reward", "decode"):
        with phases(name):
            pass
    assert [line[9:] for line in capsys.readouterr().out.splitlines()] == ["phase reward took 40 s"]


def test_on_a_terminal_nothing_is_logged_and_the_phase_is_shown(monkeypatch):
    written = io.StringIO()
    written.isatty = lambda: True
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, written)
    monkeypatch.setenv("TERM", "xterm")
    progress = Progress()
    with progress.bar("align", 2) as bar:
        progress.phase("phase reward of step 0")
        bar.advance("step 1/2", log=True)
    assert (
        "phase reward of step 0" in written.getvalue()
        and written.getvalue().count(":")
        and "took" not in written.getvalue()
    )


def test_long_work_says_in_a_log_how_far_it_is(capsys, monkeypatch):
    """`kvpo evaluate > log` and `kvpo generate > log` said nothing until they had ended."""
    clock = [0.0]
    monkeypatch.setattr("kvpo.common.progress.time.perf_counter", lambda: clock[0])
    progress = Progress()
    with progress.bar("evaluate mini", 9) as bar:
        for clock[0] in (20.0, 40.0, 60.0):
            bar.move_to(int(clock[0] / 10))
        clock[0] = 75.0
        bar.advance("script 7")
    said = [line[9:] for line in capsys.readouterr().out.splitlines()]
    assert said == ["evaluate mini 4/9", "evaluate mini 7/9, script 7", "evaluate mini took 75 s"]
