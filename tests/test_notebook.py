"""The notebook of examples/: its cells run, and its kept output is that of its cells."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from examples.run_notebook import run

ROOT = Path(__file__).resolve().parents[1]
QUICKSTART = ROOT / "examples" / "quickstart.ipynb"


def outputs(notebook: dict) -> list[list[dict]]:
    return [cell["outputs"] for cell in notebook["cells"] if cell["cell_type"] == "code"]


def kinds(notebook: dict) -> list[list[list[str]]]:
    """What every code cell put out: "stream", or the forms of its value."""
    return [[sorted(out.get("data", {"stream": 0})) for out in cell] for cell in outputs(notebook)]


def test_kept_output_shows_the_videos_and_no_machine():
    """A notebook without its output shows nothing where it is read, on a code host's page."""
    notebook = json.loads(QUICKSTART.read_text(encoding="utf-8"))
    text = json.dumps(outputs(notebook))
    assert text.count("data:video/mp4;base64,") == 2
    assert not re.search(r"/(home|root|tmp|Users)/", text)
    assert all(outputs(notebook)), "every cell says something"
    counts = [c["execution_count"] for c in notebook["cells"] if c["cell_type"] == "code"]
    assert counts == [*range(1, len(counts) + 1)]


def test_a_cell_is_run_as_a_kernel_runs_it():
    """It keeps what was printed, then the last line's value; an assignment has none."""
    sources = ["a = 2\nprint(a)\na * 21", "b = a", "print(b)"]
    cells = [{"cell_type": "code", "source": source} for source in sources]
    first, second, third = outputs(run({"cells": cells}))
    assert [out["output_type"] for out in first] == ["stream", "execute_result"]
    assert (first[0]["text"], first[1]["data"]) == ("2\n", {"text/plain": "42"})
    assert second == [] and third[0]["text"] == "2\n"
    with pytest.raises(ZeroDivisionError):
        run({"cells": [{"cell_type": "code", "source": "1 / 0"}]})


@pytest.mark.slow
def test_the_quickstart_runs(tmp_path, monkeypatch):
    """Every cell gives what its kept output shows: the same forms, and the same file of a run."""
    monkeypatch.chdir(tmp_path)
    notebook = json.loads(QUICKSTART.read_text(encoding="utf-8"))
    done = run(notebook)
    assert kinds(done) == kinds(notebook)
    assert outputs(done)[0][-1]["data"] == outputs(notebook)[0][-1]["data"]
    assert (tmp_path / "runs" / "quickstart" / "report.html").is_file()
