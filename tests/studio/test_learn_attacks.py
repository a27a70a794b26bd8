"""Attacks on the pane *Learn*: strange answers, requests and paths, foreign pages, crafted folders."""

from __future__ import annotations

import json

import pytest
from learners import ask, new_panes
from tabs import OURS, TOKEN

from kvpo.studio.blind import Blind
from kvpo.studio.panes import LARGEST_BODY


@pytest.fixture
def client(pane_client):
    return pane_client


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ({"place": 1}, "not the next one"),
        ({"place": True}, "no pair"),
        ({"place": 4}, "no pair"),
        ({"place": "0"}, "no pair"),
        ({"answer": "trained"}, "no answer"),
        ({"rater": 3}, "is text"),
        ({"name": "../../x"}, "no name"),
        ({"name": "other"}, "no comparison"),
        ({"more": 1}, "more"),
    ],
)
def test_strange_answers(client, panes, tmp_path, what, said):
    blind = panes.learning.folder / "blind"
    blind.mkdir(parents=True)
    (tmp_path / "template" / "blind").rename(blind / "b")
    answer = {"name": "b", "place": 0, "answer": "left", "rater": "Ada"} | what
    found = ask(client, "answer", **answer)
    assert found.status_code == 400 and said in found.json()["message"]
    assert not (blind / "b" / "answers.json").exists()


@pytest.mark.parametrize(
    "content", ["[", "[]", '{"answers": 3}', '{"answers": [3]}', '{"answers": [{"rater": "A"}]}']
)
def test_answers_that_are_none_are_said(tmp_path, content):
    """A folder that someone sends is read as data; its faults are told beside the rest."""
    learning = new_panes(tmp_path).learning
    blind = learning.folder / "blind" / "b"
    blind.parent.mkdir(parents=True)
    (tmp_path / "template" / "blind").rename(blind)
    (blind / "answers.json").write_text(content)
    with pytest.raises(ValueError, match="compare again"):
        Blind(blind).state()
    learning.children.folder.mkdir()
    for kind, name in (("align", "r"), ("compare", "b")):
        record = {"kind": kind, "name": name, "pid": 2**30, "argv": ["x"], "begun": ""}
        text = json.dumps(record | {"about": {"run": "r"}})
        (learning.children.folder / f"{kind}.json").write_text(text)
    found = learning.state()
    assert found["blind"] is None and "compare again" in found["faults"][0]
    assert found["answers"]["answers"] == 0


# --- Who may ask ---


@pytest.mark.parametrize(
    "headers", [{"origin": "http://evil.example"}, {"origin": "null"}, {"origin": None}]
)
def test_work_is_begun_by_the_page_alone(client, panes, headers):
    """A form of another page may post here without reading the answer; its origin tells it apart."""
    sent = {name: value for name, value in (OURS | headers).items() if value}
    assert client.post(f"/{TOKEN}/learn/fit", headers=sent).status_code == 403
    assert client.post("/wrong/learn/fit", headers=OURS).status_code == 403
    assert panes.learning.children.latest("fit") is None


@pytest.mark.parametrize(
    ("do", "content", "status", "said"),
    [
        ("fit", b"[1]", 400, "an object"),
        ("fit", b"no JSON", 400, "not JSON"),
        ("fit", b"[" * LARGEST_BODY, 400, "not JSON"),
        ("fit", b" " * (LARGEST_BODY + 1), 400, "more than"),
        ("fit", b'{"folder": "/"}', 400, "folder"),
        ("stop", b'{"kind": "server"}', 400, "no work"),
        ("stop", b'{"kind": ["fit"]}', 400, "no work"),
        ("stop", b'{"kind": "fit"}', 400, "ended already"),
        ("resume", b"", 400, "no run was stopped"),
        ("compare", b"", 400, "no run with"),
        ("state", b"", 404, "does not know"),
        ("__init__", b"", 404, "does not know"),
    ],
)
def test_strange_requests(client, do, content, status, said):
    answer = client.post(f"/{TOKEN}/learn/{do}", content=content, headers=OURS)
    assert answer.status_code == status and said in answer.json()["message"]


@pytest.mark.parametrize(
    "path",
    [
        "blind/..%2f..%2fx/0/left.mp4",
        "blind/../0/left.mp4",
        "blind/b/0/..%2fkey.mp4",
        "blind/b/9/left.mp4",
        "blind/b/-1/left.mp4",
        "blind/b/0/middle.mp4",
        "blind/none/0/left.mp4",
    ],
)
def test_videos_of_a_comparison_do_not_lead_out_of_it(client, panes, tmp_path, path):
    folder = panes.learning.folder / "blind"
    folder.mkdir(parents=True)
    (tmp_path / "template" / "blind").rename(folder / "b")
    assert client.get(f"/{TOKEN}/blind/b/0/left.mp4").status_code == 200
    assert client.get(f"/{TOKEN}/{path}").status_code in (403, 404)
    (folder / "link").symlink_to(folder / "b")
    assert client.get(f"/{TOKEN}/blind/link/0/left.mp4").status_code == 404
