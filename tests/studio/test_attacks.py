"""What an attacker or a clumsy user does to the studio: nothing is lost, nothing foreign is read,
and what can not be is said in one message."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tabs import FORK, TOKEN, tab
from tiny import BLUE, RED

from kvpo.studio import library as libraries
from kvpo.studio.library import Library, append_line, read_preferences
from kvpo.studio.shared import new_worker
from kvpo.studio.tree import Tree, new_tree


@pytest.fixture
def forked(client):
    """A tab that looks at a fork."""
    with tab(client) as opened:
        opened.do("begin", prompt=RED, seed=3)
        opened.play_to(3)
        opened.do(**FORK)
        opened.until("forked")
        yield opened


@pytest.mark.parametrize("name", ["stories/link.json", "videos/link.mp4"])
def test_links_do_not_lead_out_of_the_folder(client, studio, tmp_path, name):
    """A link among the stories or videos was followed, so a folder got from elsewhere could show
    any file of the machine in the page."""
    secret = new_tree("link", "tiny", "renoise", 5, RED).write(tmp_path / "secret")
    link = studio.library.folder / name
    link.parent.mkdir(parents=True)
    link.symlink_to(secret)
    answer = client.get(f"/{TOKEN}/videos/link.mp4")
    assert answer.status_code == 404 and "renoise" not in answer.text
    with pytest.raises(ValueError, match="link"):
        getattr(studio.library, "story" if "json" in name else "video")("link")


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "%2fetc%2fpasswd", "%2e%2e/main.js", "videos//a.mp4"]
)
def test_absolute_and_encoded_paths(client, path):
    assert client.get(f"/{TOKEN}/{path}").status_code in (403, 404)


@pytest.mark.parametrize(
    ("message", "said"),
    [
        (FORK | {"by": ["kv_routing"]}, "no explorer"),
        (FORK | {"window": 10**30}, "window"),
        (FORK | {"window": 0}, "window_blocks"),
        (FORK | {"draw": 2**40}, "draw"),
        (FORK | {"block": True}, "whole numbers"),
        ({"do": "say", "prompt": "\ud800"}, "prompt"),
        ({"do": "rater", "label": "\ud800"}, "has"),
        ({"do": "\ud800"}, "does not know"),
        ({"do": "go", "node": 10**30, "block": 0}, "no node"),
        ({"do": "play", "more": 1}, "more"),
        ({"do": "name", "name": {"a": 1}}, "no name"),
    ],
)
def test_strange_values_are_said_and_never_fail(client, message, said):
    """Values that JSON can hold and the page never sends; some ended in "the studio failed"."""
    with tab(client) as opened:
        opened.do("begin", prompt=RED, seed=3)
        opened.play_to(0)
        opened.do(**message)
        found = opened.until("error")["message"]
        assert said in found and "the studio failed" not in found


@pytest.mark.parametrize("left", [0.0, True, -1, "0", None, 10**30])
def test_rows_are_whole_numbers(forked, studio, left):
    """0.0 and true are in range(3), but they index other things than a row."""
    forked.do("pair", left=left, right=1, answer="left")
    assert "no pair" in forked.until("error")["message"]
    assert read_preferences(studio.library.folder) == ([], 0)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('"renoise"', '"magic"', "no sampler"),
        ('"digests": []', '"digests": "abc"', "not text"),
        ('"digests": []', '"digests": ' + "[" * 20000, "no story"),
        ('"fork": null', '"fork": {"block": 0, "by": [], "settings": {}, "branches": 2}', "no"),
    ],
)
def test_a_crafted_story_is_refused(tmp_path, old, new, said):
    """A story that someone sends is read as data, and refused before anything is made of it."""
    path = new_tree("story", "tiny", "renoise", 5, RED).write(tmp_path / "a.json")
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(ValueError, match=said):
        Tree.read(path)


def test_two_tabs_on_one_story_lose_nothing(client, studio):
    """Both wrote the same file, so a choice of the first was lost when the second paused; now the
    second tells a copy. A tab that comes back after its connection broke gets the story itself."""
    with tab(client) as first:
        first.do("begin", prompt=RED, seed=3)
        first.play_to(1)
        name = first.got[-1]["name"]
        with tab(client) as second:
            second.do("open", name=name)
            assert "another tab tells" in second.until("note")["message"]
            copy = second.until("opened") and second.got[-2]["name"]
            assert copy != name
            second.do("say", prompt=BLUE)
            second.until("story")
        assert Tree.read(studio.library.story(name)).prompts(0) == {0: RED}
    while studio.told:
        time.sleep(0.02)
    with tab(client) as again:
        again.do("open", name=name)
        again.until("opened")
        assert again.got[-2]["name"] == name


def test_a_disk_that_is_full_at_the_line_leaves_nothing_of_it(forked, studio, monkeypatch):
    """The clips were there, then the line did not fit: half a line and clips that no line names
    stayed, and choosing again would have left both."""
    folder = studio.library.folder
    with monkeypatch.context() as patch:
        patch.setattr(libraries, "_write_all", half_of_it)
        forked.do("choose", row=0)
        assert "was not recorded" in forked.until("error")["message"]
    assert (folder / "preferences.jsonl").read_bytes() == b"" and not list(folder.glob("clips/*"))
    forked.do("choose", row=0)
    forked.until("chosen")
    (pick,), broken = read_preferences(folder)
    assert broken == 0 and (folder / pick["rows"][0]).is_file()
    forked.do("pause")


def half_of_it(file, text: bytes) -> None:
    file.write(text[: len(text) // 2])
    raise OSError(28, "No space left on device")


def test_a_name_that_can_not_be_written_is_not_taken(client, studio, monkeypatch):
    """On a full disk the story had its new name in the page, and no file of that name."""

    def full(*args):
        raise OSError(28, "No space left on device")

    with tab(client) as opened:
        opened.do("begin", prompt=RED, seed=3)
        opened.play_to(0)
        name = opened.got[-1]["name"]
        with monkeypatch.context() as patch:
            patch.setattr("kvpo.studio.tree.write_atomic", full)
            opened.do("name", name="mine")
            assert "free disk space" in opened.until("error")["message"]
            assert opened.until("story")["name"] == name
        assert studio.library.stories() == [name]


WRITER = """
import sys
from pathlib import Path
from kvpo.studio.library import append_line
number = 0
while True:
    append_line(Path(sys.argv[1]), {"number": number, "text": "x" * 50_000})
    print(number, flush=True)
    number += 1
"""


def test_a_server_killed_while_it_writes_loses_no_line_it_confirmed(tmp_path):
    """Killed at any moment; what was said to be written is there, and writing goes on."""
    path = tmp_path / "preferences.jsonl"
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True
    )
    with process:
        while int(process.stdout.readline()) < 20:
            pass
        process.send_signal(signal.SIGKILL)
        said = 20 + len(process.stdout.read().split())
    append_line(path, {"number": -1})
    found, broken = read_preferences(tmp_path)
    assert [line["number"] for line in found[: said + 1]] == list(range(said + 1))
    assert found[-1] == {"number": -1} and broken <= 1


def test_the_worker_has_the_threads_that_were_asked_for():
    """Torch's default, a thread a core, made a block last 80 s instead of 1.7 s while other
    programs ran: every small operation waited for the thread whose core was taken."""
    import torch

    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            with new_worker(threads) as worker:
                assert worker.submit(torch.get_num_threads).result() == threads
                assert worker._max_workers == 1
    finally:
        torch.set_num_threads(before)


def test_a_folder_that_can_not_be_written_is_said_at_the_start(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="nothing can be written"):
        Library(tmp_path / "file" / "studio")
    assert os.listdir(tmp_path) == ["file"]


def test_the_benchmark_of_latencies_runs(studio, monkeypatch):
    """On the tiny generator: four times, each above 0 and none below that of what it includes."""
    path = Path(__file__).resolve().parents[2] / "benchmarks" / "studio.py"
    spec = importlib.util.spec_from_file_location("benchmark_studio", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "FIRST", RED)
    monkeypatch.setattr(module, "OTHER", BLUE)
    monkeypatch.setattr(module, "FORKED", 4)
    studio.branches = 2
    found = asyncio.run(module.measure(studio, 0))
    assert list(found) == ["first block", "switch", "fork, first block", "fork, whole"]
    assert min(found.values()) > 0 and found["fork, whole"] > found["fork, first block"]
    assert not studio.told and not studio.turns._line
