"""The studio's server: who may speak to it, and what a tab gets, with the tiny generator."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
from starlette.websockets import WebSocketDisconnect
from tabs import FORK, HOST, OURS, TOKEN, tab
from tiny import BLUE, RED

from kvpo.common.video import read_about, read_mp4
from kvpo.generators.generate import streamed
from kvpo.generators.sampler import SAMPLERS
from kvpo.studio import tab as tabs
from kvpo.studio.library import append_line, check_name, read_preferences
from kvpo.studio.live import NOISE
from kvpo.studio.server import HEADERS, PAGE, Guard
from kvpo.studio.shared import AHEAD
from kvpo.types import Script

# --- Who may speak ---


def test_the_page_has_its_files_and_a_policy(client):
    """Nothing foreign is allowed, and nothing in the page names another host."""
    for name, kind in PAGE.items():
        answer = client.get(f"/{TOKEN}/{name}")
        assert answer.status_code == 200 and answer.headers["content-type"].startswith(kind)
        assert all(answer.headers[key] == value for key, value in HEADERS.items())
        assert "://" not in answer.text.replace("http://www.w3.org/2000/svg", "")
        assert "innerHTML" not in answer.text
    assert client.get(f"/{TOKEN}/").text == client.get(f"/{TOKEN}/index.html").text


@pytest.mark.parametrize(
    ("path", "headers", "said"),
    [
        ("/", {}, "token"),
        ("/wrong/", {}, "token"),
        (f"/{TOKEN}x/", {}, "token"),
        ("/%C3%A4/", {}, "token"),
        (f"/{TOKEN}/", {"host": "evil.example"}, "host"),
        (f"/{TOKEN}/", {"host": "127.0.0.1.evil.example:8765"}, "host"),
        (f"/{TOKEN}/", {"origin": "http://evil.example"}, "origin"),
        (f"/{TOKEN}/", {"origin": "null"}, "origin"),
    ],
)
def test_strangers_are_refused(client, path, headers, said):
    answer = client.get(path, headers=headers)
    assert answer.status_code == 403 and said in answer.text and TOKEN not in answer.text


@pytest.mark.parametrize(
    ("path", "headers"),
    [
        ("/socket", OURS),
        ("/wrong/socket", OURS),
        (f"/{TOKEN}/socket", OURS | {"origin": "http://evil.example"}),
        (f"/{TOKEN}/socket", {"host": HOST}),
        (f"/{TOKEN}/socket", {"host": "evil.example", "origin": "http://evil.example"}),
    ],
)
def test_strange_sockets_are_refused(client, path, headers):
    """A page that a browser opens elsewhere may open sockets here; its origin tells it apart."""
    with pytest.raises(WebSocketDisconnect), client.websocket_connect(path, headers=headers):
        pass


@pytest.mark.parametrize(
    ("listens", "host", "known"),
    [
        ("127.0.0.1", "localhost:9000", True),
        ("127.0.0.1", "[::1]:9000", True),
        ("127.0.0.1", "10.0.0.5:8765", False),
        ("0.0.0.0", "10.0.0.5:8765", True),
        ("0.0.0.0", "[fe80::1]:8765", True),
        ("0.0.0.0", "evil.example", False),
        ("box.example", "box.example:8765", True),
        ("127.0.0.1", "", False),
    ],
)
def test_hosts(listens, host, known):
    """A foreign name that points at this machine is no name of the studio."""
    assert Guard(None, TOKEN, listens).knows(host) is known


@pytest.mark.parametrize(
    "path",
    [
        "../pyproject.toml",
        "..%2fsession.py",
        "session.py",
        "videos/..%2f..%2fpicks.mp4",
        "videos/x.mp4",
        "videos/.mp4",
    ],
)
def test_paths_do_not_leave_their_folders(client, path):
    answer = client.get(f"/{TOKEN}/{path}")
    assert answer.status_code in (403, 404)


@pytest.mark.parametrize("name", ["", "../a", "a/b", "a.b", ".a", "a" * 65, "a\n", None, 3])
def test_names_that_lead_elsewhere_are_refused(name):
    with pytest.raises(ValueError, match="no name for a story"):
        check_name(name)


@pytest.mark.parametrize(
    "text", ["no JSON", "[1]", "{}", '{"do": 3}', "[" * 9000, '"' + "x" * 70000 + '"']
)
def test_what_no_page_sends_closes_the_tab(client, text):
    with tab(client) as opened:
        opened.socket.send_text(text)
        assert opened.next()["is"] == "error"
        assert opened.socket.receive()["type"] == "websocket.close"


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ({"do": "destroy"}, "does not know"),
        ({"do": "__init__"}, "does not know"),
        ({"do": "begin", "prompt": RED}, "seed"),
        ({"do": "begin", "prompt": RED, "seed": 0, "more": 1}, "more"),
        ({"do": "begin", "prompt": "", "seed": 0}, "not blank"),
        ({"do": "begin", "prompt": ["x"], "seed": 0}, "must be text"),
        ({"do": "begin", "prompt": RED, "seed": -1}, "whole number"),
        ({"do": "begin", "prompt": f"{RED} " * 20, "seed": 0}, "tokens"),
        ({"do": "begin", "prompt": "<script>alert</script>", "seed": 0}, "knows no word"),
        ({"do": "play"}, "no story yet"),
        ({"do": "open", "name": "../../secret"}, "no name"),
        ({"do": "choose", "row": 0}, "no story yet"),
    ],
)
def test_a_bad_request_is_said_and_the_tab_lives_on(client, message, said):
    with tab(client) as opened:
        opened.do(**message)
        assert said in opened.until("error")["message"]
        opened.do("status")
        assert opened.until("status")["block"] == 0


def test_a_prompt_that_is_refused_does_not_stop_the_story(client):
    with tab(client) as opened:
        opened.do("begin", prompt=RED, seed=0)
        opened.until("block")
        opened.do("say", prompt="zzz")
        assert "knows no word" in opened.until("error")["message"]
        assert opened.until("story")["playing"]
        opened.until("block")
        opened.do("pause")


# --- What a tab gets ---


def test_the_stream_is_what_generate_makes(client, pipeline):
    """Frames arrive bit for bit, a prompt typed in a pause switches at the next block."""
    with tab(client) as opened:
        opened.do("begin", prompt=RED, seed=3)
        opened.play_to(2)
        switch = len(opened.blocks)
        opened.do("say", prompt=BLUE)
        opened.do("play")
        opened.play_to(switch + 2)
    script = Script("story", (RED, BLUE), (0, switch), len(opened.blocks))
    whole = torch.cat(list(streamed(pipeline, SAMPLERS["renoise"], [script], 3, [NOISE])), dim=1)
    assert [b["number"] for b in opened.blocks] == list(range(script.blocks))
    assert torch.equal(torch.cat([b["pixels"][0] for b in opened.blocks]), whole[0])


def test_fork_choose_undo_and_replay(client, studio):
    """The whole round, and then the story opened in another tab, equal bit for bit."""
    with tab(client) as opened:
        opened.do("begin", prompt=RED, seed=3)
        opened.play_to(4)
        made = len(opened.blocks)
        opened.do(**FORK)
        fork = opened.until("fork")
        assert (
            fork["rows"] == 3 and len(fork["reads"]) == 3 and fork["reads"][2] == [[0, 2, 3, 4, 5]]
        )
        opened.until("forked")
        branch = opened.blocks[-1]
        assert branch["kind"] == "branch" and len(branch["pixels"]) == 3
        opened.do("say", prompt=BLUE)
        assert "leave the fork" in opened.until("error")["message"]
        opened.do("pair", left=0, right=2, answer="same")
        opened.until("rated")
        opened.do("rater", label="Ada")
        opened.do("choose", row=1)
        assert opened.until("chosen") == {"is": "chosen", "node": 1, "row": 1}
        opened.play_to(5)
        told = opened.got[-1]
        opened.do("undo")
        undone = opened.until("story", at=0)
        assert undone["block"] == made and len(undone["nodes"]) == 2
        opened.do("go", node=1, block=told["block"])
        opened.until("story", at=1)
        name = told["name"]
    chosen = [b for b in opened.blocks if b["node"] == 1]
    with tab(client) as other:
        other.do("open", name=name)
        found = other.until("opened")
        assert found["blocks"] == found["same"] == told["block"]
        replayed = {b["number"]: b["pixels"][0] for b in other.blocks}
        assert torch.equal(replayed[3], branch["pixels"][1])
        assert all(torch.equal(replayed[b["number"]], b["pixels"][0]) for b in chosen)
    (pair, pick), broken = read_preferences(studio.library.folder)
    assert (pick["kind"], pick["chosen"], pick["rater"], pick["seed"]) == ("pick", 1, "Ada", 3)
    assert (pair["kind"], pair["answer"], pair["row_numbers"], broken) == (
        "pair",
        "same",
        [0, 2],
        0,
    )
    assert len(pick["rows"]) == 3 and pick["prompt"] == RED
    clip, _ = read_mp4(studio.library.folder / pick["rows"][1], original=True)
    assert clip.shape == branch["pixels"][1].shape
    assert (clip.float() - branch["pixels"][1].float()).abs().mean() < 12


def test_a_saved_video_is_the_story(client, studio):
    with tab(client) as opened:
        opened.do("begin", prompt=RED, seed=3)
        opened.play_to(2)
        stop = opened.got[-1]["block"]
        opened.do("save")
        saved = opened.until("saved")
        name = opened.until("story")["name"]
    path = studio.library.folder / saved["file"]
    frames, _ = read_mp4(path)
    assert len(frames) == studio.pipeline.geometry.pixel_frames(2 * stop)
    assert (read_about(path)["seed"], read_about(path)["prompts"]) == (3, [RED])
    answer = client.get(f"/{TOKEN}/{saved['file']}")
    assert answer.content == path.read_bytes() and name in answer.headers["content-disposition"]


def test_a_slow_reader_makes_nothing_pile_up(client):
    with tab(client) as opened:
        opened.slow = True
        opened.do("begin", prompt=RED, seed=3)
        while len(opened.blocks) < AHEAD:
            opened.next()
        for _ in range(3):
            opened.do("status")
            status = opened.until("status")
            assert (status["sent"], status["seen"], status["block"]) == (AHEAD, 0, AHEAD)
        opened.do("seen", blocks=1)
        assert opened.until("block")["number"] == AHEAD
        opened.do("pause")


def test_one_tab_at_a_time(client, monkeypatch):
    """The second waits and is told so; it is told too when it is its turn, here because the first
    pauses, then because the first one is gone."""
    monkeypatch.setattr(tabs, "PATIENCE", 60.0)
    with tab(client) as second:
        with tab(client) as first:
            first.do("begin", prompt=RED, seed=3)
            first.until("block")
            second.do("begin", prompt=BLUE, seed=4)
            assert second.until("queue")["before"] == 1 and not second.blocks
            assert first.until("queue", behind=1)["before"] == 0
            first.do("pause")
            second.until("block")
            first.do("play")
            first.until("queue", before=1)
            second.do("pause")
            first.until("block")
            second.do("play")
            second.until("queue", before=1)
        second.until("block")
        second.do("pause")
        second.until("story", playing=False)


def test_a_tab_that_is_not_looked_at_gives_way(client, monkeypatch):
    """A hidden tab shows no frames and takes no blocks; it kept all others waiting for ever."""
    monkeypatch.setattr(tabs, "PATIENCE", 0.05)
    with tab(client) as hidden, tab(client) as other:
        hidden.slow = True
        hidden.do("begin", prompt=RED, seed=3)
        while len(hidden.blocks) < AHEAD:
            hidden.next()
        other.do("begin", prompt=BLUE, seed=4)
        other.until("block")
        other.do("pause")


def test_a_closed_tab_ends_its_work_and_keeps_its_story(client, studio):
    with tab(client) as opened:
        opened.do("begin", prompt=RED, seed=3)
        opened.until("block")
    for _ in range(200):  # the block that was being made is ended first
        if not studio.tabs:
            break
        time.sleep(0.05)
    assert not studio.tabs and not studio.turns._line
    with tab(client) as other:
        other.do("stories")
        (name,) = other.until("stories")["stories"]
        other.do("open", name=name)
        found = other.until("opened")
        assert found["same"] == found["blocks"] >= 1


def test_too_many_tabs_are_refused(client, studio):
    studio.tabs = 4
    with client.websocket_connect(f"/{TOKEN}/socket", headers=OURS) as socket:
        assert "close one" in json.loads(socket.receive()["text"])["message"]


def test_a_full_disk_is_said_and_the_choice_can_be_made_again(client, studio, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    with tab(client) as opened:
        opened.do("begin", prompt=RED, seed=3)
        opened.play_to(3)
        opened.do(**FORK)
        opened.until("forked")
        with monkeypatch.context() as patch:
            patch.setattr("kvpo.studio.library.write_mp4", full)
            opened.do("choose", row=0)
            assert "nothing was recorded" in opened.until("error")["message"]
        assert read_preferences(studio.library.folder) == ([], 0)
        opened.do("choose", row=0)
        opened.until("chosen")
        opened.do("pause")


def test_a_line_that_was_cut_off_spoils_no_other(tmp_path):
    path = tmp_path / "preferences.jsonl"
    append_line(path, {"a": 1})
    with path.open("ab") as file:
        file.write(b'{"b": ')
    append_line(path, {"c": 3})
    assert read_preferences(tmp_path) == ([{"a": 1}, {"c": 3}], 1)


def test_a_story_of_another_generator_is_refused(client, studio):
    with tab(client) as opened:
        opened.do("begin", prompt=RED, seed=3)
        opened.play_to(0)
        name = opened.got[-1]["name"]
        path: Path = studio.library.story(name)
        path.with_name("other.json").write_text(path.read_text().replace('"tiny"', '"large"'))
        opened.do("open", name="other")
        assert "told by large" in opened.until("error")["message"]
        opened.do("name", name="other")
        assert "already" in opened.until("error")["message"]
        opened.do("name", name="mine")
        opened.until("story", name="mine")
        assert sorted(opened.until("stories")["stories"]) == ["mine", "other"]
