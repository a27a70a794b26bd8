"""The pane *Learn*: fit, align, compare, as processes that outlive the page and the studio."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from learners import NUMBERS, ask, finish, new_panes, wait_for, write_template
from starlette.testclient import TestClient
from tabs import HOST, TOKEN
from test_align import settings
from test_align import write_recipe as write_recipe_file

from kvpo.commands import main as cli
from kvpo.commands.main import _parse
from kvpo.config import load_config
from kvpo.evaluation.ab_answers import wilson
from kvpo.evaluation.evaluate import Scored, compare, kinds_of
from kvpo.evaluation.goodhart import judge
from kvpo.rewards.registry import make_reward
from kvpo.rewards.scorer import Scorer
from kvpo.studio.aligning import align_to, studio_recipe, write_recipe
from kvpo.studio.blind import SIDES, comparison
from kvpo.studio.learning import Learning, fresh_seed
from kvpo.studio.library import append_line
from kvpo.studio.programs import PAIRS, Programs
from kvpo.studio.server import new_app


@pytest.fixture
def client(pane_client):
    return pane_client


def state(client) -> dict:
    return client.get(f"/{TOKEN}/learn").json()


def until(client, kind: str, *states: str) -> dict:
    return wait_for(lambda: (s := state(client))[kind]["state"] in states and s)


# --- The command lines ---


def test_a_run_ends_where_what_the_recipe_trained_on_falls(tmp_path):
    """Aligned to a taste for brightness alone, the recipe's own rewards fell in every evaluation and
    nothing ended the run: they were guards, which the stop does not look at."""
    taste = write_template(tmp_path, 1) / "taste"
    config = align_to(studio_recipe("", "mini"), taste)
    watched = Scorer(make_reward("world_vq"), config.rewards[1])
    kinds = ["train", *kinds_of([watched], 1, ("preference",))]
    risen, fallen = torch.tensor([[1.0, 0.4]]).T.expand(2, 64), torch.tensor([[0.0, 0.5]]).T
    noise = 0.01 * torch.randn(2, 64, generator=torch.Generator().manual_seed(0))
    names = ("preference-taste", "VQ")
    a, b = (Scored(names, r.double(), ()) for r in (risen + noise, fallen.expand(2, 64)))
    rows = compare(a, b, kinds)
    assert judge({17: rows, 34: rows}).fallen == ("VQ",)


def test_a_comparison_leaves_the_videos_that_the_page_asks_for(folder, tmp_path, monkeypatch):
    """`kvpo ab` put small videos into its own page and removed the files: the pane waited for ever."""
    recipe = write_recipe_file(tmp_path / "tiny.yaml", settings(folder, steps=1))
    run, out = tmp_path / "run", tmp_path / "blind" / "one"
    assert cli.main(["align", recipe, "--out", str(run)]) == 0
    monkeypatch.setattr("kvpo.studio.programs.PAIRS", 2)
    programs = Programs(program=())
    assert cli.main(programs.compare(run, 7, out)) == 0
    blind = comparison(tmp_path, "one")
    assert blind.ready and len(blind.pairs()) == 2
    shown = [blind.video(place, side) for place in range(2) for side in SIDES]
    assert len(set(shown)) == 4 and all(path.is_file() for path in shown)


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
    assert roles["world_vq"] == roles["identity"] == "eval" and roles["world_facts"] == "guard"
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
        assert "Fit a preference" in ask(client, "align").json()["message"]
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
        "Reward of the explored window: preference",
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
