"""The pane *Learn*: fit, align, compare, as processes that outlive the page and the studio."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from learners import NUMBERS, new_panes, wait_for, write_template
from starlette.testclient import TestClient
from tabs import HOST, OURS, TOKEN

from kvpo.commands.main import _parse
from kvpo.config import load_config
from kvpo.evaluation.ab_answers import wilson
from kvpo.studio.aligning import align_to, studio_recipe, write_recipe
from kvpo.studio.children import Children, command_of
from kvpo.studio.learning import Learning, fresh_seed
from kvpo.studio.library import append_line
from kvpo.studio.panes import LARGEST_BODY
from kvpo.studio.programs import PAIRS, Programs
from kvpo.studio.server import new_app


@pytest.fixture
def panes(tmp_path):
    found = new_panes(tmp_path)
    yield found
    finish(found.learning)


@pytest.fixture
def client(panes):
    with TestClient(new_app(None, TOKEN, panes=panes), base_url=f"http://{HOST}") as client:
        yield client


def finish(learning: Learning) -> None:
    """End what still runs, and wait for it."""
    for process in learning.children._started.values():
        process.kill()
        process.wait()


def ask(client, do: str, **what):
    return client.post(f"/{TOKEN}/learn/{do}", json=what, headers=OURS)


def state(client) -> dict:
    return client.get(f"/{TOKEN}/learn").json()


def until(client, kind: str, *states: str) -> dict:
    return wait_for(lambda: (s := state(client))[kind]["state"] in states and s)


# --- The command lines ---


def test_the_command_lines_are_those_of_the_commands(tmp_path):
    """Parsed by the program itself; the recipe of an alignment keeps a KL and guards."""
    programs, run = Programs(), tmp_path / "runs" / "aligned"
    taste = write_template(tmp_path, 1) / "taste"
    written = align_to(studio_recipe("", "mini"), taste)
    recipe = write_recipe(written, tmp_path / "recipes" / "a.yaml")
    align = parsed(programs.align(recipe, run))
    assert align.settings == written == load_config(recipe) and align.out == run
    roles = {entry.name: entry.role for entry in align.settings.rewards}
    assert roles[f"preference:{taste}"] == "train" and list(roles.values()).count("train") == 1
    assert roles["world_vq"] == roles["world_facts"] == "guard" and roles["identity"] == "eval"
    assert align.settings.objective.kl_beta > 0 and align.settings.evaluate.every > 0

    write_recipe(written, run / "config.resolved.yaml")
    again = parsed(programs.resume(run))
    assert again.resume and again.out == run and again.settings == written
    fit = parsed(programs.fit(tmp_path, tmp_path / "new"))
    assert (fit.do.folder, fit.do.out) == (tmp_path, tmp_path / "new")
    compare = parsed(programs.compare(run, 5, tmp_path / "blind"))
    assert (compare.a, compare.b, compare.recipe) == (str(run), f"{run}:start", str(run))
    assert (compare.seeds, compare.scripts, compare.out) == ((5,), PAIRS, tmp_path / "blind")


def parsed(argv: list[str]):
    assert argv[:3] == [sys.executable, "-m", "kvpo"]
    return _parse(argv[3], argv[4:])


def test_a_pipeline_folder_needs_a_recipe(folder, tmp_path):
    with pytest.raises(ValueError, match="--recipe"):
        studio_recipe("", str(folder))
    assert studio_recipe("mini", str(folder)).pipeline == str(folder)


def test_fresh_noise_is_another_one_each_time():
    assert fresh_seed("blind-a") == fresh_seed("blind-a") != fresh_seed("blind-b")


# --- Fit ---


def test_a_preference_is_fitted_beside_the_server(client, panes):
    for story, rater in (("a", "Ada"), ("a", "Ada"), ("b", "")):
        line = {"kind": "pair", "story": story, "rater": rater}
        append_line(panes.learning.folder / "preferences.jsonl", line)
    before = state(client)
    assert before["answers"] == {"answers": 3, "stories": 2, "by_rater": {"Ada": 2, "(no name)": 1}}
    assert (before["taste"], before["run"], before["blind"], before["fit"]["state"]) == (
        None,
        None,
        None,
        "none",
    )
    assert ask(client, "fit").status_code == 200
    found = until(client, "fit", "done")
    assert found["taste"]["numbers"] == NUMBERS and found["taste"]["raters"] == ["Ada"]


def test_a_refusal_is_told_as_it_is(tmp_path):
    panes = new_panes(tmp_path, refuses=True)
    with TestClient(new_app(None, TOKEN, panes=panes), base_url=f"http://{HOST}") as client:
        ask(client, "fit")
        found = until(client, "fit", "failed")
        assert found["fit"]["said"] == "3 answers are too few; give more"
        assert "fit one" in ask(client, "align").json()["message"]
    finish(panes.learning)


# --- Align ---


def test_a_run_is_followed_stopped_found_again_and_gone_on_with(client, panes, tmp_path):
    """One piece of work at a time; a studio that is started again knows the run, and stops it."""
    assert ask(client, "align").status_code == 400
    ask(client, "fit")
    until(client, "fit", "done")
    begun = ask(client, "align").json()
    assert begun["working"] == "align"
    assert "let it end, or stop it" in ask(client, "fit").json()["message"]
    seen = wait_for(lambda: (run := state(client)["run"]) and run["step"] >= 2 and run)
    assert seen["steps"] == 200
    assert [chart["title"] for chart in seen["charts"]] == [
        "Reward of the explored window",
        "KL to the start weights",
    ]
    own = panes.learning.children._started.pop("align")  # what a new studio does not have
    other = Learning(tmp_path / "studio", panes.runs, "mini", programs=panes.learning.programs)
    assert other.state()["align"]["state"] == "working"
    other.stop("align")
    own.wait(60)
    found = other.state()
    assert found["align"]["state"] == "stopped" and "saved" in found["align"]["said"]
    (other.runs.folder / found["align"]["name"] / "report.html").write_text("by kvpo report")
    assert other.state()["align"]["state"] == "stopped"
    assert ask(client, "resume").status_code == 200
    done = until(client, "align", "done")
    assert done["run"]["report"] and done["align"]["name"] == begun["align"]["name"]


def test_a_process_is_known_by_its_command_line(tmp_path):
    """A record of a folder from elsewhere, or an old one, names a number that is another's now."""
    children = Children(tmp_path)
    with subprocess.Popen([sys.executable, "-S", "-c", "input()"], stdin=subprocess.PIPE) as other:
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
    for broken in ("[" * 9000, "[]", "{}", json.dumps(record | {"name": "../x"})):
        (children.folder / "align.json").write_text(broken)
        assert children.latest("align") is None


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


# --- Before and after ---


@pytest.fixture
def compared(client):
    ask(client, "fit")
    until(client, "fit", "done")
    ask(client, "align")
    wait_for(lambda: state(client)["run"])
    ask(client, "stop", kind="align")
    until(client, "align", "stopped")
    ask(client, "compare")
    return until(client, "compare", "done")["blind"]


def test_a_blind_comparison_has_its_win_rate(client, panes, compared):
    """Whoever always says the trained one is better by what the videos show wins every pair; the
    page learns nothing before the end."""
    name = compared["name"]
    assert compared == {
        "name": name,
        "ready": True,
        "pairs": 4,
        "answered": 0,
        "run": state(client)["run"]["name"],
        "result": None,
    }
    assert "for Ada" in ask(client, "answer", name=name, place=0, answer="left", rater="Bob").text
    blind = panes.learning.blind(name)
    turned = []
    for place in range(4):
        pair, turn = blind.shown(place)
        owner_left = "ab"[pair % 2] if not turn else "ba"[pair % 2]
        told = "same" if place == 3 else "left" if owner_left == "a" else "right"
        turned.append(turn)
        video = client.get(f"/{TOKEN}/blind/{name}/{place}/left.mp4").content
        file = blind.folder / "page" / f"{pair:03d}-{'right' if turn else 'left'}.mp4"
        assert video == file.read_bytes()
        answer = ask(client, "answer", name=name, place=place, answer=told, rater="Ada").json()
        assert (answer["blind"]["result"] is None) == (place < 3)
    result = answer["blind"]["result"]
    assert (result["trained"], result["start"], result["same"]) == (3, 0, 1)
    assert result["win_rate"] == 0.875 and result["interval"] == list(wilson(0.875, 4))
    kept = json.loads((blind.folder / "answers.json").read_text())
    assert kept["result"] == result and kept["raters"] == ["Ada"]
    assert [given["rater"] for given in kept["answers"]] == ["Ada"] * 4
    again = ask(client, "answer", name=name, place=3, answer="left", rater="Ada")
    assert again.status_code == 400 and "not the next one" in again.text


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
